"""Quality against the fraction of the cache that is kept: mp_kvm beside what evicts, at equal bytes.

    python benchmarks/merge_sweep.py

On documents and tasks of 4,096 tokens, so that 1 % is still 41 entries per head. The model runs in fp32
(16 bits are slow on many CPUs), and fractions are of a dense cache in fp32. A budget in bytes is a
ceiling, under which recipes hold unequally much; so each gets a budget in entries with which the bytes
that it really holds, on average over the tokens decoded, are those of the fraction, as nearly as whole
pages allow. Rows go to docs/results/merging/sweep (finished ones are used again); `docs/make_merging.py`
makes the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch

from kvloom.core.budget import Budget
from kvloom.core.recipe import Recipe
from kvloom.evaluation import compare, equal
from kvloom.evaluation.decoders import decoder_for, feed_prompt
from kvloom.evaluation.ledger import Ledger
from kvloom.evaluation.results import Protocol
from kvloom.evaluation.subjects import Cell

OUT = Path(__file__).parent.parent / "docs" / "results" / "merging" / "sweep"
FRACTIONS = (50, 25, 12.5, 6.25, 4, 2.5, 1)
EVICTING = ["streaming_llm", "h2o", "random", "knorm"]
LENGTH = 4096
MERGED = (0.3, 0.6)  # shares of the entries that are centroids
CLAIMED = 4  # percent at which the claim stands, where more shares and more tasks are tried
MERGED_THERE = (0.3, 0.6, 0.8, 0.9)
SINKS = 4
TRIES = 6


def entries_for(held: Callable[[int], float], target: float, first: int, least: int) -> int:
    """The number of entries at which `held(entries)` bytes are nearest to `target`, as far as a few
    tries tell; never fewer than `least`.
    """
    tried: dict[int, float] = {}
    n = max(first, least)
    while n not in tried and len(tried) < TRIES:
        tried[n] = held(n)
        if abs(tried[n] / target - 1) <= equal.TOLERANCE / 2:
            break
        n = max(least, round(n * target / tried[n]))
    return min(tried, key=lambda n: abs(tried[n] - target))


class Sweep:
    """The document and tasks that all recipes share."""

    def __init__(self, needles: int, decode: int):
        protocol = Protocol(
            LENGTH, LENGTH - decode, prefill_runs=1, needles=needles, needle_tokens=LENGTH
        )
        self.bench = compare.prepare(compare.TESTBED, "stdlib", protocol, "float32", "cpu")
        self.ledger = Ledger(OUT)

    def held(self, recipe: str, budget: Budget) -> float:
        """Bytes that a recipe holds, on average over the tokens that are fed singly.

        Of the tokens before, only so many are fed as leave the budget used up.
        """
        ids, at = self.bench.document.ids, self.bench.protocol.prefill
        decoder = decoder_for(self.bench.model, Recipe.parse(recipe), budget)
        feed_prompt(decoder, ids[max(0, at - 2 * int(budget.amount) - 256) : at], 0)
        found = []
        for token in ids[at:-1].split(1):
            decoder.feed(token)
            found.append(decoder.nbytes())
        return fmean(found)

    def budget(self, recipe: str, percent: float) -> Budget:
        """The budget in entries that holds this percentage of a dense fp32 cache."""
        model, protocol = self.bench.model_facts, self.bench.protocol
        entry = model.layers * model.kv_heads * 2 * model.head_dim * 4
        target = percent / 100 * entry * (protocol.prefill + protocol.tokens) / 2
        parsed = Recipe.parse(recipe)
        least = SINKS + 1 + (parsed.merger.centroids if parsed.merger else 0)

        def held(entries: int) -> float:
            with torch.inference_mode():
                return self.held(recipe, Budget.parse(f"{entries}tok"))

        return Budget.parse(f"{entries_for(held, target, round(target / entry), least)}tok")

    def measure(self, recipe: str, percent: float | None) -> None:
        """One row, unless it is there: a recipe at a fraction, or without a budget."""
        budget = None if percent is None else self.budget(recipe, percent)
        cell = Cell(Recipe.parse(recipe), budget)
        (row,) = compare.run(self.bench, [cell], self.ledger, compare.Progress())
        print(f"{percent or 100:g} % {cell.facts.recipe} @ {budget}: {row.bytes.mean / 1024:.0f} KiB, KL "
              f"{row.quality.kl:.3f}, {row.quality.needles_right}/{row.quality.needles}, {row.took:.0f} s",
              flush=True)  # fmt: skip


def merging(percent: float) -> list[str]:
    """mp_kvm with room for centroids in proportion to the entries."""
    entries = LENGTH * percent / 100
    shares = MERGED_THERE if percent == CLAIMED else MERGED
    return [f"mp_kvm(max_centroids={max(2, round(entries * share))})" for share in shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS)
    parser.add_argument("--needles", type=int, default=16, help=f"twice as many at {CLAIMED} %%")
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--only", nargs="*", help="only these recipes")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    OUT.mkdir(parents=True, exist_ok=True)
    sweeps: dict[int, Sweep] = {}
    for percent in (None, *given.fractions):
        needles = given.needles * (2 if percent == CLAIMED else 1)
        if needles not in sweeps:
            sweeps[needles] = Sweep(needles, given.decode)
        named = ["none"] if percent is None else [*merging(percent), *EVICTING]
        for recipe in given.only if given.only and percent is not None else named:
            sweeps[needles].measure(recipe, percent)


if __name__ == "__main__":
    main()
