"""Measurements as markdown: for reading on their own, and for the model card."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Where the true share lies with 95 % confidence (Wilson's interval)."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    spread /= 1 + z * z / count
    return max(0.0, middle - spread), min(1.0, middle + spread)


def with_interval(all: float, count: int) -> str:
    """The share ``all`` of ``count`` tasks, in per cent, with its interval."""
    low, high = interval(all, count)
    return f"{percent(all)} ({100 * low:.1f} to {100 * high:.1f})"


def recall(results: dict[str, Any]) -> str:
    """Recall by length with intervals, and by number of facts for the unseen phrasings."""
    rows = []
    for length, by in results["recall"].items():
        unseen = by["unseen"]
        both = [with_interval(kind["all"], kind["count"]) for kind in (by["seen"], unseen)]
        facts = [percent(unseen[f"facts {n}"]) for n in (1, 2, 3, 4)]
        rows.append([length, *both, *facts, unseen["count"]])
    head = ["tokens", "seen phrasings", "unseen phrasings", "1 fact", "2", "3", "4 facts"]
    return table([*head, "tasks per kind of phrasing"], rows)


def key_values(results: dict[str, Any]) -> str:
    rows = [
        [pairs, by["tokens"], with_interval(by["all"], by["count"]), by["count"]]
        for pairs, by in results["key_value"].items()
    ]
    return table(["keys", "tokens", "exact values", "tasks"], rows)


CPU_TARGETS = {"512": 0.95, "1024": 0.95, "2048": 0.90}
GPU_TARGETS = {"512": 0.98, "1024": 0.98, "2048": 0.98, "4096": 0.90}


def targets(results: dict[str, Any], gpu: bool) -> str:
    """What was set out to be reached, and whether it was: by the figures as measured."""
    rows = []
    for length, least in (GPU_TARGETS if gpu else CPU_TARGETS).items():
        for kind in ("seen", "unseen"):
            if length in results["recall"]:
                share = results["recall"][length][kind]["all"]
                aim = f"recall at {length} tokens, {kind} phrasings"
                rows.append(
                    [aim, f"at least {percent(least)}", percent(share), _met(share >= least)]
                )
    last = 2048 if gpu else 1024
    for name, by in results["loss_by_context"].items():
        bits = [value for length, value in by.items() if int(length) <= last]
        falls = all(after < before for before, after in pairwise(bits))
        measured = ", ".join(f"{value:.3f}" for value in bits)
        rows.append([f"bits per byte, {name}", f"fall up to {last} tokens", measured, _met(falls)])
    return table(["aim", "set", "measured", ""], rows)


def _met(reached: bool) -> str:
    return "reached" if reached else "**missed**"


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
    scores = enumerate(heads["score"])
    found = [str(layer) for layer, score in scores if max(score) > 0.5] or ["none"]
    summary = (
        f"Mean attention mass on the first four tokens: {sinks['mean_first_four']} (evenly spread "
        f"it would be {sinks['uniform_share_of_four']}). Heads whose strongest attention lies on "
        f"the token to be copied for more than half of the answer tokens: {heads['above_half']} of "
        f"{heads['heads']} (layers: {', '.join(found)}). Largest over median channel magnitude: keys {channels['mean_keys']}, "
        f"values {channels['mean_values']}."
    )
    return f"{summary}\n\n{table(head, rows)}"


def ends(results: dict[str, Any]) -> str:
    """Forms of stating and asking, contexts beyond what was trained, layers without a past."""
    form_rows = [[name, with_interval(**by), by["count"]] for name, by in results["forms"].items()]
    beyond = results["beyond"]
    lengths = [[n, with_interval(**by), by["count"]] for n, by in beyond["recall"].items()]
    bits = beyond["bits_per_byte_by_position"]
    cut = results["layers"]
    cuts = [
        [layer, with_interval(**only), with_interval(**rest), only["count"]]
        for layer, (only, rest) in enumerate(zip(cut["only"], cut["all_but"], strict=True))
    ]
    return "\n\n".join(
        [
            "One fact in 512 tokens; found if its number is among the next 16 tokens:",
            table(["form", "found", "tasks"], form_rows),
            "Needle recall, seen phrasings, in contexts longer than any that was trained:",
            table(["tokens", "recall", "tasks"], lengths),
            "Bits per byte of code and prose by position in such a window:",
            table(list(bits), [list(bits.values())]),
            f"Needle recall at {cut['tokens']:,} tokens, unseen phrasings, if the context is read in full and "
            f"some layers then keep its newest {cut['left']} tokens alone, for question and answer "
            f"(the fact stands further back; with nothing cut: {percent(cut['none']['all'])}):",
            table(["layer", "cut in this layer", "cut in all others", "tasks"], cuts),
        ]
    )


def limits(results: dict[str, Any]) -> str:
    """The same in sentences, for the card."""
    trained, completed, asked, value_first = (
        percent(by["all"]) for by in results["forms"].values()
    )
    beyond = ", ".join(
        f"{percent(by['all'])} at {int(length):,}"
        for length, by in results["beyond"]["recall"].items()
    )
    cut = results["layers"]
    shares = [by["all"] for by in cut["only"]]
    layer = shares.index(min(shares))
    return (
        f"- It completes sentences that lead up to a value (found in {trained} of tasks; without the word for\n"
        f"  the value or a colon before it, {completed}). Questions that end in a question mark ({asked}) and\n"
        f"  values stated before their owner ({value_first}) mostly go unanswered.\n"
        f"- In contexts longer than any that was trained, recall of planted facts is\n  {beyond} tokens.\n"
        f"- With the past cut in layer {layer}, recall at {cut['tokens']:,} tokens falls from "
        f"{percent(cut['none']['all'])} to {percent(shares[layer])};\n"
        f"  cut in all other layers, it is {percent(cut['all_but'][layer]['all'])}. So recall on this model rewards "
        "whatever spares that\n"
        "  layer: judge how a budget is split over layers by perplexity and KL divergence as well."
    )


def provenance(results: dict[str, Any]) -> str:
    """What was measured, and with what."""
    about = results["about"]
    rows = [
        [name, text["from"], f"`{text['sha256'][:16]}`"] for name, text in about["texts"].items()
    ]
    by_environment: dict[str, list[str]] = {}
    for part, environment in results["measured_with"].items():
        words = ", ".join(f"{name} {value}" for name, value in environment.items())
        by_environment.setdefault(words, []).append(part)
    with_what = "\n".join(
        f"- {', '.join(parts)}: {words}" for words, parts in by_environment.items()
    )
    return (
        f"`model.safetensors` with SHA-256 `{about['weights_sha256'][:16]}...`, by `training.evaluate`:\n\n"
        f"{with_what}\n\n{table(['text', 'from', 'SHA-256'], rows)}"
    )


def evaluation(results: dict[str, Any]) -> str:
    """The whole evaluation as one page."""
    return "\n\n".join(
        [
            "## Needle recall\n\nExact five-digit numbers by greedy generation with a dense cache, "
            "depths 0 to 100 %, one of 1 to 4 planted facts asked. In brackets the 95 % interval. "
            "Columns by facts: unseen phrasings.",
            recall(results),
            figure("recall", "Recall by depth and length"),
            "## Key-value lists\n\nLines of `key: value` with five-digit values, one key asked at the "
            "end. Keys share their parts with other keys.",
            key_values(results),
            "## Loss on held-out text\n\nOverall over the first 1,024 tokens; the columns by context "
            "give the bits per byte of the same 128 tokens after that many tokens in all.",
            losses(results),
            "Bits per byte by position in the window:",
            positions(results),
            figure("loss", "Loss by context and position"),
            f"## Phenomena\n\n{phenomena(results)}",
            "Attention mass on the first tokens:",
            figure("first_tokens", "Attention mass on the first four tokens by head"),
            "Retrieval heads:",
            figure("retrieval_heads", "Retrieval score by head"),
            "Magnitudes of key and value channels:",
            figure("key_channels", "Mean magnitude of key and value channels"),
            f"## Where it ends\n\n{ends(results)}",
            f"## What these figures are of\n\n{provenance(results)}\n",
        ]
    )


def figure(name: str, words: str) -> str:
    """A figure of ``training.figures``, which lies beside the page."""
    return f"![{words}](figures/{name}.png)"


def _row(values: Sequence[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)
