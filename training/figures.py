"""Figures of an evaluation, for the model card: PNG files, drawn from the recorded figures alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# Okabe and Ito's colours, told apart by everybody.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
PERCENT = FuncFormatter(lambda y, _: f"{y:.0%}")


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """One PNG per kind of measurement; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    makers = {
        "recall": recall,
        "loss": loss,
        "first_tokens": first_tokens,
        "retrieval_heads": retrieval_heads,
        "key_channels": key_channels,
    }
    made = []
    for name, maker in makers.items():
        made.append(folder / f"{name}.png")
        maker(results).savefig(made[-1], dpi=110)
    return made


def recall(results: dict[str, Any]) -> Figure:
    """Depth by length, seen and unseen phrasings side by side."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    lengths = list(results["recall"])
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("seen", "unseen"), strict=True):
        depths = [k for k in results["recall"][lengths[0]][kind] if k.startswith("depth")]
        depths = sorted(depths, key=lambda k: float(k.split()[1]))
        shares = [[results["recall"][n][kind][depth] for depth in depths] for n in lengths]
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(f"{kind} phrasings", fontsize=10)
        axes.set_xlabel("depth of the asked fact")
        axes.set_xticks(range(len(depths)), [f"{float(d.split()[1]):.0%}" for d in depths])
        axes.set_yticks(range(len(lengths)), [f"{int(n):,}" for n in lengths])
        axes.tick_params(axis="x", labelsize=7)
        for row, line in enumerate(shares):
            for column, share in enumerate(line):
                colour = "black" if share > 0.6 else "white"
                label = f"{100 * share:.0f}"
                axes.text(column, row, label, ha="center", va="center", color=colour, fontsize=7)
    figure.axes[0].set_ylabel("tokens")
    figure.colorbar(image, ax=figure.axes, format=PERCENT)
    figure.suptitle(
        "Exact recall of planted five-digit numbers, dense cache, per cent", fontsize=11
    )
    return figure


def loss(results: dict[str, Any]) -> Figure:
    """The same tokens with more and more context, and all tokens by their position."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for (name, by), colour in zip(results["loss_by_context"].items(), COLOURS, strict=False):
        left.plot([int(n) for n in by], list(by.values()), "o-", label=name, color=colour)
        position = results["loss"][name]["bits_per_byte_by_position"]
        right.plot(list(position), list(position.values()), "o-", color=colour)
    left.set_xscale("log", base=2)
    left.set_xticks([int(n) for n in by], [f"{int(n):,}" for n in by])
    left.set_xlabel("tokens of context, the same 128 tokens predicted")
    left.set_ylabel("bits per byte (lower is better)")
    right.set_xlabel("position in the window")
    right.tick_params(axis="x", labelsize=6.5)
    left.legend(frameon=False)
    figure.suptitle("Loss on held-out text, dense cache", fontsize=11)
    return figure


def first_tokens(results: dict[str, Any]) -> Figure:
    """Attention mass on the first four tokens, head by head."""
    sinks = results["phenomena"]["sinks"]
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    axes = figure.subplots()
    even = sinks["uniform_share_of_four"]
    _bars(axes, sinks["first_four"], above=even)
    axes.margins(y=0.1)
    axes.axhline(even, color="black", ls=":", lw=1, label=f"spread evenly: {even:.2%}")
    axes.set_ylabel("attention mass")
    _legend(axes)
    axes.set_title("Attention of later tokens on the first four, by head", fontsize=11)
    return figure


def retrieval_heads(results: dict[str, Any]) -> Figure:
    """How often a head looks exactly at the token to be copied."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    axes = figure.subplots()
    _bars(axes, results["phenomena"]["retrieval_heads"]["score"])
    axes.set_ylim(0, 1.08)
    axes.axhline(0.5, color="black", ls=":", lw=1, label="counted as retrieval head above")
    axes.set_ylabel("share of answer tokens")
    _legend(axes)
    axes.set_title("Strongest attention on the token to be copied, by head", fontsize=11)
    return figure


def key_channels(results: dict[str, Any]) -> Figure:
    """Mean magnitude of every channel: keys above, values below, one panel per layer."""
    channels = results["phenomena"]["channels"]
    rows = (("keys", channels["key_magnitude"]), ("values", channels["value_magnitude"]))
    layers = len(channels["key_magnitude"])
    figure = Figure(figsize=(2.6 * layers, 4.4), layout="constrained")
    panels = figure.subplots(2, layers, sharex=True, sharey="row", squeeze=False)
    for line, (name, magnitude) in zip(panels, rows, strict=True):
        for layer, axes in enumerate(line):
            for head, sizes in enumerate(magnitude[layer]):
                axes.plot(sizes, lw=1.2, color=COLOURS[head], label=f"KV head {head}")
            spread = " ".join(f"{s:.1f}" for s in channels[name][layer])
            axes.set_title(f"layer {layer}, max/median {spread}", fontsize=8)
        line[0].set_ylim(0, 1.05 * max(max(sizes) for layer in magnitude for sizes in layer))
        line[0].set_ylabel(f"{name}: mean magnitude")
    for axes in panels[1]:
        axes.set_xlabel("channel")
    panels[0][-1].legend(frameon=False, fontsize=7)
    figure.suptitle("Channels of cached keys and values", fontsize=11)
    return figure


def _bars(axes: Axes, by_layer: Sequence[Sequence[float]], above: float = 0.0) -> None:
    """One group of bars per layer, one bar per query head, its per cent above it and ``above``."""
    heads = len(by_layer[0])
    for head in range(heads):
        at = [layer + (head - (heads - 1) / 2) * 0.8 / heads for layer in range(len(by_layer))]
        heights = [layer[head] for layer in by_layer]
        colour = COLOURS[head % len(COLOURS)]
        axes.bar(at, heights, 0.74 / heads, color=colour, label=f"query head {head}", zorder=2)
        for x, height in zip(at, heights, strict=True):
            axes.annotate(
                f"{100 * height:.0f}",
                (x, max(height, above)),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    axes.yaxis.set_major_formatter(PERCENT)
    axes.set_xticks(range(len(by_layer)), [f"layer {layer}" for layer in range(len(by_layer))])


def _legend(axes: Axes) -> None:
    """Beside the bars, since any corner inside may hold some."""
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
