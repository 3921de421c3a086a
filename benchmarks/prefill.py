"""What compression adds to a prefill: the same tokens with and without a recipe, taking turns.

    python benchmarks/prefill.py --context 8192 --recipes knorm snapkv

The ratio is the median over rounds of the recipe's time / that of `none` (and of `DynamicCache`) in
the same round. Recipes evict to `--budget` once the prompt is in.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from _common import CLOCKS, append_rows, benchmark_model, interleaved, paired_ratio, provenance
from transformers import DynamicCache

from kvloom import CompressedCache
from kvloom.core.recipe import Recipe


def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    model, stock = benchmark_model(given.threads), benchmark_model(given.threads)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 4096, (1, given.context), generator=generator)
    chunk = given.chunk or given.context

    def run(net: Any, cache: Any) -> None:
        for i in range(0, given.context, chunk):
            net(ids[:, i : i + chunk], past_key_values=cache, logits_to_keep=1)

    budgets: dict[str, str | None] = {"none": None}
    calls = {"DynamicCache": lambda: run(stock, DynamicCache(config=stock.config))}
    for recipe in given.recipes:
        name, _, own = recipe.partition("@")
        default = given.budget if Recipe.parse(name).evicts else None
        budgets.setdefault(recipe, own.strip() or default)
    for recipe, budget in budgets.items():
        name = recipe.partition("@")[0].strip()
        calls[recipe] = lambda name=name, budget=budget: run(
            model, CompressedCache(model, name, budget=budget)
        )
    clock = CLOCKS[given.clock]
    times = interleaved(calls, given.repeats, warmup=1, clock=clock)
    rows = []
    for recipe, budget in budgets.items():
        against_none = paired_ratio(times[recipe], times["none"])
        against_dynamic = paired_ratio(times[recipe], times["DynamicCache"])
        rows.append({
            **provenance(given.threads), "context": given.context, "chunk": chunk, "recipe": recipe,
            "budget": budget or "", "repeats": given.repeats,
            "ratio_to_none": round(against_none[0], 4), "q25": round(against_none[1], 4),
            "q75": round(against_none[2], 4), "ratio_to_dynamic": round(against_dynamic[0], 4),
            "seconds": round(statistics.median(times[recipe]), 3), "clock": given.clock,
        })  # fmt: skip
        print(f"{recipe:40s} {against_none[0]:.3f} [{against_none[1]:.3f}, {against_none[2]:.3f}] x none, "
              f"{against_dynamic[0]:.3f} x DynamicCache", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--recipes", nargs="+", required=True)
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunk", type=int, help="prefill chunk (default: the whole context)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: seconds of work")
    parser.add_argument("--dry-run", action="store_true", help="print, but write no rows")
    given = parser.parse_args()
    with torch.no_grad():
        rows = measure(given)
    if not given.dry_run:
        append_rows("prefill", rows)


if __name__ == "__main__":
    main()
