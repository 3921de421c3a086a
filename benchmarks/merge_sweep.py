"""Quality against the fraction of the cache that is kept: mp_kvm beside what evicts, at equal bytes.

    python benchmarks/merge_sweep.py

On documents and tasks of 4,096 tokens, so that 1 % is still 41 entries per head. The model runs in fp32
(16 bits are slow on many CPUs), and fractions are of a dense cache in fp32: budgets, which are
against 16 bits, say twice as much. A budget is a ceiling, under which recipes hold unequally much, so it is
adjusted for each recipe until the bytes that are really held are those of the fraction, as far as whole
pages allow. Rows go to docs/results/merging/sweep (finished ones are used again); `docs/make_merging.py`
makes the rest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from kvloom.core.budget import Budget
from kvloom.core.recipe import Recipe
from kvloom.evaluation import compare
from kvloom.evaluation.ledger import Ledger
from kvloom.evaluation.results import Protocol
from kvloom.evaluation.subjects import Cell

OUT = Path(__file__).parent.parent / "docs" / "results" / "merging" / "sweep"
FRACTIONS = (50, 25, 12.5, 6.25, 4, 2.5, 1)
EVICTING = ["streaming_llm", "h2o", "random", "knorm"]
LENGTH = 4096
MERGED = (0.3, 0.6)  # shares of the entries that are centroids
CLAIMED = 4  # percent at which the published claim stands: more shares, and twice as many tasks
MERGED_THERE = (0.3, 0.6, 0.8, 0.9)


def merging(percent: float) -> list[str]:
    """mp_kvm with room for centroids in proportion to the budget."""
    entries = LENGTH * percent / 100
    shares = MERGED_THERE if percent == CLAIMED else MERGED
    return [f"mp_kvm(max_centroids={max(2, round(entries * share))})" for share in shares]


def bench_of(needles: int, decode: int) -> compare.Bench:
    """The document and tasks that recipes share."""
    protocol = Protocol(
        LENGTH, LENGTH - decode, prefill_runs=1, needles=needles, needle_tokens=LENGTH
    )
    return compare.prepare(compare.TESTBED, "stdlib", protocol, "float32", "cpu")


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
    ledger, benches = Ledger(OUT), dict[int, compare.Bench]()
    wanted = [(percent, recipe) for percent in given.fractions
              for recipe in given.only or [*merging(percent), *EVICTING]]  # fmt: skip
    full = [] if given.only else [(None, "none")]
    for percent, recipe in [*full, *wanted]:
        needles = given.needles * (2 if percent == CLAIMED else 1)
        if needles not in benches:
            benches[needles] = bench_of(needles, given.decode)
        budget = None if percent is None else Budget.parse(f"{2 * percent:g}%")
        cell = Cell(Recipe.parse(recipe), budget, equal_bytes=True)
        (row,) = compare.run(benches[needles], [cell], ledger, compare.Progress())
        print(f"{percent or 100:g} % {recipe}: {row.bytes.mean / 1024:.0f} KiB, KL {row.quality.kl:.3f}, "
              f"{row.quality.needles_right}/{row.quality.needles}, {row.took:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
