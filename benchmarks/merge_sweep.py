"""Quality against the fraction of the cache that is kept: mp_kvm beside what evicts, at equal bytes.

    python benchmarks/merge_sweep.py

On documents and tasks of 4,096 tokens, so that 1 % is still 41 entries per head. The model runs in fp32
(16 bits are slow on many CPUs), and fractions are of a dense cache in fp32: budgets, which are
against 16 bits, say twice as much. Rows go to docs/results/merging/sweep (finished ones are used
again); `docs/make_merging.py` makes the rest.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kvloom.cli.compare import Options, run
from kvloom.evaluation.results import Protocol

OUT = Path(__file__).parent.parent / "docs" / "results" / "merging" / "sweep"
FRACTIONS = (50, 25, 12.5, 6.25, 4, 2.5, 1)
EVICTING = ["streaming_llm", "h2o", "random", "knorm"]
LENGTH = 4096
MERGED = (0.3, 0.6)  # shares of the entries that are centroids


def merging(percent: float) -> list[str]:
    """mp_kvm with room for centroids in proportion to the budget."""
    entries = LENGTH * percent / 100
    return [f"mp_kvm(max_centroids={max(2, round(entries * share))})" for share in MERGED]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS)
    parser.add_argument("--needles", type=int, default=16)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    protocol = Protocol(
        LENGTH, LENGTH - given.decode, prefill_runs=1, needles=given.needles, needle_tokens=LENGTH
    )
    OUT.mkdir(parents=True, exist_ok=True)

    def measure(recipes: list[str], budgets: list[str]) -> None:
        run(
            Options(
                recipes=recipes, budgets=budgets, protocol=protocol, out=OUT, dtype="float32",
                threads=given.threads,
            )
        )  # fmt: skip

    measure(["none"], [])
    for percent in given.fractions:
        measure([*merging(percent), *EVICTING], [f"{2 * percent:g}%"])


if __name__ == "__main__":
    main()
