"""The token map as a figure: a line per layer and head, a column per token, a colour per tier."""

from __future__ import annotations

import itertools
from pathlib import Path

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from kvloom.evaluation.token_map import DROPPED, TIERS, TokenMap

# Okabe and Ito's; what is gone is light, what is exact is dark, so that it reads in grey as well
COLOURS = ("#F2F2F2", "#E69F00", "#56B4E9", "#0072B2", "#000000")
LONGEST = 60  # characters of a text's name
DPI = 110


def labels(row: TokenMap) -> list[str]:
    """What each tier means here, with its bits."""
    bits = [(x.key_bits, x.value_bits) for x in row.layers if x.key_bits is not None]
    exact = row.layers[0].exact_bits
    packed = ""
    if bits:
        keys, values = (sum(b[i] or 0 for b in bits) / len(bits) for i in (0, 1))
        packed = f", {keys:.2f} bits per key element, {values:.2f} per value element"
    return [
        "dropped", "merged into others", f"packed{packed}", f"exact, {exact} bits",
        f"sink, {exact} bits",
    ]  # fmt: skip


def figure(row: TokenMap, tensors: dict[str, Tensor]) -> Figure:
    """All heads along the text above; below, the share of them in which a token has each fate."""
    tier = tensors["tier"]
    lines, tokens = tier.shape[0] * tier.shape[1], tier.shape[2]
    drawn = Figure(figsize=(12, 2.6 + min(7.0, 0.22 * lines + 1.2)), layout="constrained")
    above, below = drawn.subplots(2, 1, sharex=True, height_ratios=[max(1.0, lines / 12), 0.7])
    above.imshow(
        tier.flatten(0, 1), cmap=ListedColormap(list(COLOURS)), vmin=-0.5, vmax=4.5, aspect="auto",
        interpolation="nearest", extent=(0, tokens, lines, 0),
    )  # fmt: skip
    edges = [i * row.heads for i in range(len(row.layers) + 1)]
    above.hlines(edges[1:-1], 0, tokens, color="white", lw=1.5)
    middle = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    above.set_yticks(middle, [str(x.layer) for x in row.layers], fontsize=8)
    above.set_ylabel(f"layer, {row.heads} KV heads each", fontsize=9)
    x = [i + 0.5 for i in range(tokens)]
    for kind in range(
        DROPPED + 1, len(TIERS)
    ):  # each in front of the one before: shares stand on top
        share = (tier >= kind).float().mean((0, 1)).tolist()
        below.fill_between(x, 0, share, step="mid", color=COLOURS[kind], lw=0)
    below.set_ylim(0, 1.02)
    below.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    below.set_ylabel("share of all heads", fontsize=9)
    below.set_xlabel("position in the text, tokens", fontsize=9)
    handles = [
        Patch(facecolor=colour, edgecolor="#999999", label=label)
        for i, (colour, label) in enumerate(zip(COLOURS, labels(row), strict=True))
        if bool((tier == i).any())
    ]
    drawn.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    drawn.suptitle(title(row), fontsize=10)
    return drawn


def title(row: TokenMap) -> str:
    at = f" @ {row.subject.budget}" if row.subject.budget else ""
    model, text = Path(row.model.name).name, row.text.name[:LONGEST]
    return (
        f"What became of each token: {model}, {row.text.tokens} tokens of {text}\n"
        f"{row.subject.recipe}{at}: {row.kept / row.seen:.1%} kept, {row.merged / row.seen:.1%} merged, "
        f"{row.dropped / row.seen:.1%} dropped"
    )


def draw(row: TokenMap, tensors: dict[str, Tensor], folder: Path) -> list[Path]:
    """`tokens.png`."""
    path = folder / "tokens.png"
    figure(row, tensors).savefig(path, dpi=DPI)
    return [path]


assert len(COLOURS) == len(TIERS)
