"""Measurements as markdown: for reading on their own, and for the model card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def recall(results: dict[str, Any]) -> str:
    """Recall by length, and the same by number of facts for the unseen phrasings."""
    rows = []
    for length, by in results["recall"].items():
        seen, unseen = by["seen"], by["unseen"]
        facts = [percent(unseen[f"facts {n}"]) for n in (1, 2, 3, 4)]
        rows.append([length, percent(seen["all"]), percent(unseen["all"]), *facts, seen["count"]])
    head = ["tokens", "seen phrasings", "unseen phrasings", "1 fact", "2", "3", "4 facts", "tasks"]
    return table([*head[:-1], "tasks per column 2, 3"], rows)


def losses(results: dict[str, Any]) -> str:
    """Overall loss, and loss of the same tokens with growing context."""
    contexts = list(next(iter(results["loss_by_context"].values())))
    head = ["text", "bits per byte", "perplexity", *(f"{c} tokens" for c in contexts)]
    rows = []
    for name, loss in results["loss"].items():
        by = results["loss_by_context"][name]
        rows.append([name, loss["bits_per_byte"], loss["perplexity"], *by.values()])
    return table(head, rows)


def positions(results: dict[str, Any]) -> str:
    spans = list(next(iter(results["loss"].values()))["bits_per_byte_by_position"])
    rows = [
        [name, *loss["bits_per_byte_by_position"].values()]
        for name, loss in results["loss"].items()
    ]
    return table(["text", *spans], rows)


def phenomena(results: dict[str, Any]) -> str:
    p = results["phenomena"]
    sinks, heads, channels = p["sinks"], p["retrieval_heads"], p["channels"]
    rows = [
        [layer, *(_row(part) for part in parts)]
        for layer, parts in enumerate(
            zip(
                sinks["first_four"],
                heads["score"],
                channels["keys"],
                channels["values"],
                strict=True,
            )
        )
    ]
    head = ["layer", "mass on first 4", "retrieval score", "keys max/median", "values max/median"]
    summary = (
        f"Mean attention mass on the first four tokens: {sinks['mean_first_four']} (evenly spread "
        f"it would be {sinks['uniform_share_of_four']}). Heads whose strongest attention lies on "
        f"the token to be copied for more than half of the answer tokens: {heads['above_half']} of "
        f"{heads['heads']}. Largest over median channel magnitude: keys {channels['mean_keys']}, "
        f"values {channels['mean_values']}."
    )
    return f"{summary}\n\n{table(head, rows)}"


def evaluation(results: dict[str, Any]) -> str:
    """The whole evaluation as one page."""
    key_value = ", ".join(f"{n} keys {percent(s)}" for n, s in results["key_value"].items())
    return "\n\n".join(
        [
            "## Needle recall\n\nExact five-digit numbers by greedy generation with a dense cache, "
            "depths 0 to 100 %, one of 1 to 4 planted facts asked. Columns by facts: unseen "
            "phrasings.",
            recall(results),
            f"Key-value lists: {key_value}.",
            "## Loss on held-out text\n\nOverall over the first 1,024 tokens; the columns by context "
            "give the bits per byte of the same 128 tokens after that many tokens in all.",
            losses(results),
            "Bits per byte by position in the window:",
            positions(results),
            f"## Phenomena\n\n{phenomena(results)}\n",
        ]
    )


def _row(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)
