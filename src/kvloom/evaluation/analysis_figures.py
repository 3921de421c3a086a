"""Figures of analyses, made from a row and its tensors and from nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from kvloom.evaluation.analysis import Setting
from kvloom.evaluation.figures import COLOURS
from kvloom.evaluation.manifold import Manifold, topic_counts
from kvloom.evaluation.results import Text
from kvloom.evaluation.spectrum import KINDS, Spectrum

DPI = 110
TITLES = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
LABELS = {
    "with": "centroids, with log mass",
    "without": "centroids, without it",
    "full": "their tokens, in a full cache",
}
LOOKS = dict(zip(KINDS, zip(COLOURS, "os^", strict=False), strict=False))
MAP = "viridis"
FAINT = "#BBBBBB"
LEAST = -6  # power of ten below which shares of attention are one bin


def draw_manifold(row: Manifold, tensors: dict[str, Tensor], folder: Path) -> list[Path]:
    """`manifold.png`, and with topics `transitions.png`."""
    made = [(folder / "manifold.png", planes(row, tensors))]
    if row.topics:
        made.append((folder / "transitions.png", topic_transitions(row, tensors)))
    return _save(made)


def draw_attention(row: Spectrum, tensors: dict[str, Tensor], folder: Path) -> list[Path]:
    """`attention.png`."""
    return _save([(folder / "attention.png", energy(row, tensors))])


def _save(made: list[tuple[Path, Figure]]) -> list[Path]:
    for path, figure in made:
        figure.savefig(path, dpi=DPI)
    return [path for path, _ in made]


# -- where the keys lie --------------------------------------------------------------------------


def planes(row: Manifold, tensors: dict[str, Tensor]) -> Figure:
    """Above all keys, below centroids and the exact window; a column per projection."""
    columns = len(row.projections)
    figure = Figure(figsize=(1.5 + 4.6 * columns, 9.2), layout="constrained")
    panels = figure.subplots(2, columns, squeeze=False)
    shades, centroid_shades, colours = _shades(row, tensors)
    sizes = _sizes(tensors["mass"])
    exact, folded = tensors["exact"], tensors["folded"]
    for column, plane in enumerate(row.projections):
        keys, centroids = tensors[f"{plane.name}_keys"], tensors[f"{plane.name}_centroids"]
        style = {"cmap": colours[0], "norm": colours[1], "linewidths": 0}
        before, after = panels[0, column], panels[1, column]
        before.scatter(*keys.T, c=shades, s=9, alpha=0.8, **style)
        after.scatter(*keys[folded].T, c=FAINT, s=4, linewidths=0, zorder=1)
        after.scatter(*keys[exact].T, c=shades[exact], s=12, marker="s", zorder=2, **style)
        after.scatter(
            *centroids.T, c=centroid_shades, s=sizes, cmap=colours[0], norm=colours[1],
            edgecolors="black", linewidths=0.8, alpha=0.85, zorder=3,
        )  # fmt: skip
        labels = _axis_labels(plane.name, plane.facts)
        before.set_title(f"{TITLES[plane.name]}: all {len(keys)} keys", fontsize=10)
        after.set_title(_after(row), fontsize=10)
        after.sharex(before)
        after.sharey(before)
        for panel in (before, after):
            panel.set_xlabel(labels[0], fontsize=9)
            panel.set_ylabel(labels[1], fontsize=9)
            panel.tick_params(labelsize=8)
            if plane.name != "pca":  # their numbers mean nothing
                panel.set(xticks=[], yticks=[])
            panel.grid(True, alpha=0.2)
            panel.set_axisbelow(True)
    if not row.topics:
        bar = figure.colorbar(
            ScalarMappable(colours[1], colours[0]), ax=panels.ravel().tolist(), shrink=0.6, pad=0.02
        )
        bar.set_label("position in the text, tokens")
    figure.legend(
        handles=[*_topic_handles(row), *_partition_handles(tensors["mass"])],
        loc="outside lower center", ncols=4 if columns < 3 else 8, frameon=False, fontsize=9,
    )  # fmt: skip
    kind = row.setting.space.replace("p", "P", 1)
    what = f"{kind} keys before and after partition"
    figure.suptitle(_title(what, row.setting, row.setting.compared), fontsize=10)
    return figure


def _after(row: Manifold) -> str:
    """What is left of the keys."""
    setting = row.setting
    dropped = f", {setting.dropped} dropped" if setting.dropped else ""
    return f"{len(setting.masses)} centroids, {setting.exact} exact keys{dropped}"


def _shades(row: Manifold, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, tuple]:
    """Numbers for tokens and centroids, and the colours that they stand for."""
    topic = tensors["topic"]
    if not row.topics:
        norm = Normalize(0, len(topic))
        return torch.arange(len(topic)), tensors["centroid_positions"], (MAP, norm)
    folded, n = tensors["folded"], len(tensors["mass"])
    counts = topic_counts(tensors["nearest"][folded], topic[folded], n, len(row.topics))
    colours = ListedColormap([_topic_colour(i) for i in range(len(row.topics))])
    return topic, counts.argmax(1), (colours, Normalize(-0.5, len(row.topics) - 0.5))


def _topic_colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _sizes(mass: Tensor) -> list[float]:
    """Areas of markers in points squared: as the root of the mass, so that one in a thousand is seen."""
    return [float(x) for x in 14 * mass.clamp_min(1).sqrt()]


def _topic_handles(row: Manifold) -> list[Line2D]:
    return [
        Line2D([], [], ls="", marker="o", color=_topic_colour(i), ms=6, label=topic.name)
        for i, topic in enumerate(row.topics)
    ]


def _partition_handles(mass: Tensor) -> list[Line2D]:
    """What the marks after partition mean, with centroids of two sizes."""
    sizes = sorted({max(1, round(float(x))) for x in (mass.min(), mass.max())})
    return [
        Line2D([], [], ls="", marker="o", color=FAINT, ms=3, label="keys that were folded"),
        Line2D([], [], ls="", marker="s", color="dimgray", ms=4, label="exact keys"),
        *(
            Line2D(
                [], [], ls="", marker="o", mfc="none", mec="black",
                ms=_sizes(torch.tensor([float(size)]))[0] ** 0.5,
                label=f"centroid of {size:,} token{'s' if size > 1 else ''}",
            )
            for size in sizes
        ),
    ]  # fmt: skip


def _axis_labels(name: str, facts: dict[str, float]) -> tuple[str, str]:
    if name == "pca":
        first, second = (f"{facts[f'explained_{i}']:.0%} of the variance" for i in (1, 2))
        return f"component 1, {first}", f"component 2, {second}"
    return f"{TITLES[name]} 1 (no unit)", f"{TITLES[name]} 2 (no unit)"


def topic_transitions(row: Manifold, tensors: dict[str, Tensor]) -> Figure:
    """The nearest centroid of each token along the text; centroids by their topic, then by position."""
    nearest, topic = tensors["nearest"], tensors["topic"]
    main = _shades(row, tensors)[1]
    by_position = tensors["centroid_positions"].argsort()
    order = by_position[main[by_position].argsort(stable=True)]
    figure = Figure(figsize=(11, 5.4), layout="constrained")
    panel = figure.subplots()
    x, place = torch.arange(len(topic)), order.argsort()
    for i in range(len(row.topics)):
        at, rows = topic == i, (main[order] == i).nonzero().flatten()
        panel.scatter(x[at], place[nearest[at]], c=_topic_colour(i), s=9, linewidths=0, zorder=2)
        if len(rows):
            low, high = int(rows[0]) - 0.5, int(rows[-1]) + 0.5
            panel.axhspan(low, high, color=_topic_colour(i), alpha=0.1, lw=0, zorder=0)
    for transition in row.transitions:
        panel.axvline(transition.position - 0.5, color="black", lw=0.8, alpha=0.6)
    panel.set_xlim(-1, len(topic))
    panel.set_ylim(-1.5, len(order) + 0.5)
    panel.set_xlabel("position in the text, tokens")
    panel.set_ylabel("nearest centroid, by topic of most members, then position")
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    boundary = Line2D([], [], color="black", lw=0.8, alpha=0.6, label="boundary of topics")
    figure.legend(
        handles=[*_topic_handles(row), boundary], loc="outside lower center", ncols=8,
        frameon=False, fontsize=9,
    )  # fmt: skip
    figure.suptitle(
        _title("Topic transitions", row.setting, row.setting.compared)
        + f"\n{_transition_facts(row)}",
        fontsize=10,
    )
    return figure


def _transition_facts(row: Manifold) -> str:
    around = max(t.around for t in row.transitions)
    return (
        f"purity {row.purity:.0%} (one centroid for all: {row.purity_of_one:.0%}); from {around} tokens to "
        f"the next {around}, centroids shift by {row.shift:.0%} at boundaries, by "
        f"{row.shift_within:.0%} within passages"
    )


# -- attention -----------------------------------------------------------------------------------


def energy(row: Spectrum, tensors: dict[str, Tensor]) -> Figure:
    """Attention to centroids with and without their mass: along the text, over queries, by size."""
    figure = Figure(figsize=(13.5, 8), layout="constrained")
    panels = figure.subplots(2, 3)
    _along(panels[0, 0], tensors)
    _histogram(panels[0, 1], tensors)
    _by_bin(panels[0, 2], row)
    _scatter(panels[1, 0], tensors)
    _gain(panels[1, 1], tensors)
    panels[1, 2].set_axis_off()
    handles = [
        Line2D([], [], color=LOOKS[kind][0], marker=LOOKS[kind][1], label=LABELS[kind])
        for kind in KINDS
    ]
    panels[1, 2].legend(handles=handles, loc="upper left", frameon=False)
    panels[1, 2].text(
        0.03, 0.62, _facts(row), va="top", fontsize=9, transform=panels[1, 2].transAxes
    )
    for panel in panels.ravel()[:5]:
        panel.grid(True, alpha=0.25)
        panel.set_axisbelow(True)
        panel.tick_params(labelsize=8)
    figure.suptitle(_title("Attention to centroids", row.setting), fontsize=10)
    return figure


def _along(axes: Axes, tensors: dict[str, Tensor]) -> None:
    """Energy along the text, means of runs of queries."""
    positions = tensors["positions"]
    width = max(1, len(positions) // 24)
    for kind in KINDS:
        energy = tensors[f"energy_{kind}"].mean(0)
        runs = list(zip(positions.split(width), energy.split(width), strict=True))
        axes.plot(
            [float(p.float().mean()) for p, _ in runs], [float(e.mean()) for _, e in runs],
            color=LOOKS[kind][0], marker=LOOKS[kind][1], ms=4, lw=1.2,
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
    axes.set_xlabel("position of the query, tokens")
    axes.set_ylabel("share of attention")
    axes.set_title("along the text", fontsize=10)


def _histogram(axes: Axes, tensors: dict[str, Tensor]) -> None:
    """Of the energies' logarithms: most queries look elsewhere, and few look at nothing else."""
    edges = torch.logspace(LEAST, 0, 41).tolist()
    for kind in KINDS:
        energy = tensors[f"energy_{kind}"].flatten().clamp(edges[0], 1.0)
        axes.hist(
            energy.tolist(), bins=edges, histtype="step", lw=1.5, color=LOOKS[kind][0],
            weights=[1 / len(energy)] * len(energy),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0%}"))
    axes.set_xlabel("share of attention that a query gives to all")
    axes.set_ylabel("share of queries (and query heads)")
    axes.set_title(f"over queries (first bin: 1e{LEAST} and less)", fontsize=10)


def _by_bin(axes: Axes, row: Spectrum) -> None:
    ticks = [str(b.least) if b.least == b.most else f"{b.least} to {b.most}" for b in row.bins]
    for kind in KINDS:
        values = [getattr(b, "full" if kind == "full" else f"{kind}_mass") for b in row.bins]
        colour, marker = LOOKS[kind]
        axes.plot(range(len(ticks)), values, color=colour, marker=marker, ms=6, lw=1.2)
    axes.set_yscale("log")
    axes.set_xlim(-0.5, len(ticks) - 0.5)
    slant: dict[str, Any] = (
        {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(ticks) > 4 else {}
    )
    axes.set_xticks(range(len(ticks)), ticks, **slant)
    axes.set_xlabel("mass of the centroid, tokens")
    axes.set_ylabel("share of attention of one, mean")
    axes.set_title("by size", fontsize=10)


def _scatter(axes: Axes, tensors: dict[str, Tensor]) -> None:
    for kind in KINDS[::-1]:
        weight = tensors[f"weight_{kind}"]
        at = weight > 0
        axes.scatter(
            tensors["mass"][at], weight[at], c=LOOKS[kind][0], marker=LOOKS[kind][1], s=8,
            alpha=0.5, linewidths=0,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlabel("mass of the centroid, tokens")
    axes.set_ylabel("share of attention, mean over a forward")
    axes.set_title("mass against weight", fontsize=10)


def _gain(axes: Axes, tensors: dict[str, Tensor]) -> None:
    """What the bias does to the log of a weight; the rest of log(mass) goes into the normaliser."""
    mass, shown = tensors["mass"], tensors["weight_without"] > 0
    gain = (tensors["weight_with"][shown] / tensors["weight_without"][shown]).log()
    axes.scatter(mass[shown], gain, c=LOOKS["with"][0], s=8, alpha=0.5, linewidths=0)
    top = max(2.0, float(mass.max()))
    curve = torch.logspace(0, torch.tensor(top).log2().item(), 60, base=2.0)
    axes.plot(curve, curve.log(), color="black", lw=1.2, ls="--", label="bias = log(mass)")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlabel("mass of the centroid, tokens")
    axes.set_ylabel("log(weight with / weight without), nats")
    axes.set_title("what the mass adds (dashed: log(mass))", fontsize=10)


def _facts(row: Spectrum) -> str:
    e = row.energy
    bias = "adds" if row.biased else "does not add"
    return (
        f"{row.queries} queries of the second half, {row.group} query heads each\n"
        f"with log mass: {e.with_mass:.1%} of the attention\n"
        f"without it: {e.without_mass:.1%}\n"
        f"their tokens in a full cache: {e.full:.1%}\n"
        f"mean difference to the full cache, query by query:\n"
        f"    with {e.error_with:.1%}, without {e.error_without:.1%}\n"
        f"(this recipe {bias} the log mass itself)"
    )


def _title(what: str, setting: Setting, whose: str = "own head") -> str:
    """`whose`: keys of which heads the figure shows, see `Setting.compared`."""
    budget = f" @ {setting.subject.budget}" if setting.subject.budget else ""
    recipe = f"{setting.subject.recipe}{budget}"
    recipe = recipe if len(recipe) <= 90 else recipe[:87] + "..."
    model, text = Path(setting.model.name).name, _text(setting.text)
    head = {"all heads": "all KV heads side by side", "mean": "mean of the KV heads"}.get(
        whose, f"KV head {setting.head}"
    )
    return f"{what}: {model}, layer {setting.layer}, {head}, {text}\n{recipe}"


def _text(text: Text) -> str:
    name = text.name if len(text.name) <= 48 else text.name[:45] + "..."
    return f"{text.tokens} tokens of {name}"
