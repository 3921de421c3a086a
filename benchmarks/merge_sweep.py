"""Quality against the fraction of the cache that is kept: mp_kvm beside what evicts, at equal bytes.

    python benchmarks/merge_sweep.py

As in `merging.py`, on documents and tasks of 4,096 tokens, so that 1 % is still 41 entries per head. The model
runs in fp32 (16 bits are slow on many CPUs), and fractions are of a dense cache in fp32: budgets, which are
against 16 bits, say twice as much. A budget is a ceiling, under which recipes hold unequally much, so it is
adjusted for each recipe until the bytes that are really held are those of the fraction, as far as whole
pages allow. A line of docs/results/merging/sweep.jsonl holds one recipe at one fraction.
"""

from __future__ import annotations

import argparse
import json
from statistics import fmean
from typing import Any

import torch
from _common import provenance
from merging import RESULTS, SETTING, Bench, lines_of, said

from kvloom.core.budget import Budget
from kvloom.core.recipe import Recipe
from kvloom.evaluation import identity
from kvloom.evaluation.matching import Probe, match

PATH = RESULTS / "sweep.jsonl"
FRACTIONS = (50, 25, 12.5, 6.25, 4, 2.5, 1)
EVICTING = ["streaming_llm", "h2o", "random", "knorm"]
LENGTH = 4096
MERGED = (0.3, 0.6)  # shares of the entries that are centroids
CLAIMED = 4  # percent at which the published claim stands: more shares, and more tasks
MERGED_THERE = (0.3, 0.6, 0.8, 0.9)
TASKS_THERE = 32
PROBED = 16  # tokens


def merging(percent: float) -> list[str]:
    """mp_kvm with room for centroids in proportion to the budget."""
    entries = LENGTH * percent / 100
    shares = MERGED_THERE if percent == CLAIMED else MERGED
    return [f"mp_kvm(max_centroids={max(2, round(entries * share))})" for share in shares]


def dense_nbytes(bench: Bench, fed: int) -> float:
    """Of a dense cache in the model's dtype, per document, on average over `fed` tokens after the context."""
    c = bench.model.config
    entry = (
        2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * bench.model.dtype.itemsize
    )
    return float(entry * (bench.context + (fed + 1) / 2))


def matched(bench: Bench, subject: Recipe, percent: float) -> Budget:
    """The budget at which a recipe holds a fraction, by the first tokens after one document's context."""
    some = bench.documents[:1, : bench.context + PROBED + 1]
    means = dense_nbytes(bench, PROBED) * percent / 100

    def probe(budget: Budget) -> Probe:
        now = bench.read(subject, budget, some)
        return Probe(fmean(now.held) / means, now.floor / means, now.stats.evicted)

    return match(Budget.parse(f"{2 * percent:g}%"), probe)[0]


def measure(bench: Bench, recipe: str, percent: float | None) -> dict[str, Any]:
    """A recipe at a fraction; None: without a budget."""
    subject = Recipe.parse(recipe)
    given = None if percent is None else matched(bench, subject, percent)
    reading = bench.read(subject, given)
    return {
        "given": given and str(given),
        "dense": dense_nbytes(bench, len(reading.held)),
        "slack": reading.stats.slack / reading.stats.nbytes,
        **bench.row(reading),
        "right": bench.right(subject, given),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--tasks", type=int, default=16, help=f"{TASKS_THERE} at {CLAIMED} %%")
    parser.add_argument("--decode", type=int, default=97, help="tokens fed singly, per document")
    parser.add_argument("--only", nargs="*", help="only these recipes")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    source = identity.environment(torch.device("cpu")).source_sha256
    named = {p: given.only or [*merging(p), *EVICTING] for p in given.fractions}
    cells = [(percent, recipe) for percent, recipes in named.items() for recipe in recipes]
    benches: dict[int, Bench] = {}
    with torch.inference_mode():
        for percent, recipe in cells if given.only else [(None, "none"), *cells]:
            tasks = TASKS_THERE if percent == CLAIMED else given.tasks
            context = LENGTH - given.decode
            setting = dict(zip(SETTING, (context, given.decode, given.documents, tasks, "float32"), strict=True))  # fmt: skip
            cell = {"recipe": recipe, "percent": percent, "setting": setting}
            if any(
                cell.items() <= row.items() and row["source_sha256"] == source
                for row in lines_of(PATH)
            ):
                continue
            if tasks not in benches:
                benches[tasks] = Bench(**setting)
            row = measure(benches[tasks], recipe, percent)
            line = {**cell, **provenance(given.threads), "source_sha256": source, **row}
            with PATH.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{percent or 100:g} % ({row['given']}) {said(recipe, row)}", flush=True)


if __name__ == "__main__":
    main()
