"""The token map: a figure of every head, and the text itself, each word in the colour of its fate."""

from __future__ import annotations

import json

from torch import Tensor

from kvloom.evaluation import token_figures, token_map
from kvloom.evaluation.report.blocks import Block, Entry, Markup, Note, Picture, Table
from kvloom.evaluation.report.data import Data
from kvloom.evaluation.report.html import Html, join, tag
from kvloom.evaluation.token_map import DROPPED, MERGED, TIERS, TokenMap

OPTIONS: dict[str, str] = {}
TOGETHER = True
INK = ("#888888", "#000000", "#000000", "#FFFFFF", "#FFFFFF")  # readable on `token_figures.COLOURS`


def make(data: Data) -> list[Block]:
    """One map per `tokens.jsonl` in the folder. Raises Missing if it holds none."""
    blocks: list[Block] = []
    for number, folder in enumerate(data.analyses(token_map.NAME), 1):
        row, tensors = token_map.load_map(folder)
        words = token_figures.title(row)
        blocks += [
            Picture(token_figures.figure(row, tensors), words, str(number)),
            Markup(strip(row, tensors), words),
            _table(row),
            Note(
                "Bits are means over a layer's pages, scales included; what is not packed is exact."
            ),
        ]
    return blocks


def strip(row: TokenMap, tensors: dict[str, Tensor]) -> Html:
    """The text; a word is the darker, the more heads keep it, or, for one head, shows its tier."""
    tier, mass = tensors["tier"], tensors["mass"]
    lines = tier.flatten(0, 1)
    names = [f"layer {x.layer}, head {h}" for x in row.layers for h in range(row.heads)]
    choices = [tag("option", f"all {len(names)} heads")]
    choices += [
        tag("option", name, data_tiers="".join(map(str, line.tolist())))
        for name, line in zip(names, lines, strict=True)
    ]
    looks = [
        f"background:{paper};color:{ink}"
        for paper, ink in zip(token_figures.COLOURS, INK, strict=True)
    ]
    counts = [(lines == i).sum(0).tolist() for i in range(len(TIERS))]
    heaviest = mass.flatten(0, 1).max(0).values.tolist()
    spans = [
        _word(word, i, [count[i] for count in counts], heaviest[i])
        for i, word in enumerate(row.words)
    ]
    keys = [
        tag("span", label, class_="key", style=look)
        for i, (label, look) in enumerate(zip(token_figures.labels(row), looks, strict=True))
        if sum(counts[i])
    ]
    chooser = tag(
        "p", tag("label", "Show ", tag("select", *choices, data_looks=json.dumps(looks))), *keys,
        class_="view",
    )  # fmt: skip
    text = tag("div", *spans, class_="tokens", tabindex="0")
    return tag("div", join(chooser, text), class_="map")


def _word(word: str, position: int, counts: list[int], mass: float) -> Html:
    """One token. `counts`: heads by tier; with all heads shown, blue is kept and orange is merged."""
    heads = sum(counts)
    kept, merged = sum(counts[MERGED + 1 :]) / heads, counts[MERGED] / heads
    said = [f"{TIERS[i]} in {n}" for i, n in enumerate(counts) if n]
    weight = f", stands for up to {mass:.1f} tokens" if mass > 1.05 else ""
    blend = "background:" + _blend(kept, merged) + (";color:#fff" if kept > 0.55 else "")
    faint = ";color:#888" if counts[DROPPED] == heads else ""
    title = f"token {position}, of {heads} heads: {', '.join(said)}{weight}"
    return tag("span", word, style=blend + faint, title=title)


def _blend(kept: float, merged: float) -> str:
    """White towards blue by the share that keeps a token, and towards orange by that which merged it."""
    blue, orange = (0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)
    gone = max(0.0, 1 - kept - merged)
    mixed = (round(kept * b + merged * o + gone * 255) for b, o in zip(blue, orange, strict=True))
    return "#" + "".join(f"{min(255, x):02x}" for x in mixed)


def _table(row: TokenMap) -> Table:
    """Layers with their bits and centroids."""
    rows = [
        [
            Entry(str(x.layer), value=x.layer), Entry(str(x.exact_bits)),
            *(Entry("n/a" if b is None else f"{b:.2f}", value=b) for b in (x.key_bits, x.value_bits)),
            Entry(", ".join(map(str, x.centroids)), value=sum(x.centroids)),
            Entry(f"{x.heaviest:.1f}", value=x.heaviest),
        ]
        for x in row.layers
    ]  # fmt: skip
    columns = [
        "layer", "bits of exact entries", "bits of packed keys", "bits of packed values",
        "centroids per head", "most tokens in one entry",
    ]  # fmt: skip
    return Table(columns, rows, words=1, folded=True)
