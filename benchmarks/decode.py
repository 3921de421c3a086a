"""Time per output token of recipes against `DynamicCache`, interleaved in one process.

    python benchmarks/decode.py --contexts 2048 8192 16384 --recipes none

A context is prefilled (at once, as generate() does by default, or in chunks), then all caches
decode in turns, one token each. The ratio is the median over rounds of ours / DynamicCache within
the same round.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from _common import append_rows, benchmark_model, interleaved, paired_ratio, provenance
from transformers import DynamicCache

from kvloom import CompressedCache

TOKEN = torch.tensor([[7]])


def prefilled(model: Any, cache: Any, ids: torch.Tensor, chunk: int | None = None) -> Any:
    chunk = chunk or ids.shape[1]
    for i in range(0, ids.shape[1], chunk):
        model(ids[:, i : i + chunk], past_key_values=cache, logits_to_keep=1)
    return cache


def _stepper(model: Any, cache: Any) -> Any:
    return lambda: model(TOKEN, past_key_values=cache)


def measure(
    context: int,
    recipes: list[str],
    budget: str | None,
    repeats: int,
    threads: int,
    chunk: int | None,
) -> list[dict]:
    model = benchmark_model(threads)
    ids = torch.randint(2, 4096, (1, context), generator=torch.Generator().manual_seed(0))
    caches: dict[str, Any] = {"DynamicCache": DynamicCache(config=model.config)}
    for recipe in recipes:
        name, _, own = recipe.partition("@")
        caches[recipe] = CompressedCache(model, name.strip(), budget=own.strip() or budget)
    # DynamicCache runs on the model's stock attention, exactly as without kvloom
    stock = benchmark_model(threads)
    models = {name: stock if name == "DynamicCache" else model for name in caches}
    for name, cache in caches.items():
        prefilled(models[name], cache, ids, chunk)
    times = interleaved({n: _stepper(models[n], c) for n, c in caches.items()}, repeats)
    rows = []
    for recipe in recipes:
        ratio, low, high = paired_ratio(times[recipe], times["DynamicCache"])
        rows.append({
            **provenance(threads), "context": context, "prefill_chunk": chunk or context, "recipe": recipe, "repeats": repeats,
            "ratio_median": round(ratio, 4), "ratio_q25": round(low, 4), "ratio_q75": round(high, 4),
            "ours_ms": round(statistics.median(times[recipe]) * 1e3, 3),
            "dynamic_ms": round(statistics.median(times["DynamicCache"]) * 1e3, 3),
            "nbytes": caches[recipe].nbytes,
        })  # fmt: skip
        print(f"{context:6d} {recipe:40s} {ratio:.3f} [{low:.3f}, {high:.3f}] x DynamicCache  "
              f"{rows[-1]['ours_ms']} ms against {rows[-1]['dynamic_ms']} ms", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument(
        "--recipes", nargs="+", default=["none"], help="'recipe' or 'recipe @ budget'"
    )
    parser.add_argument("--budget")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunk", type=int, help="prefill chunk (default: the whole context)")
    parser.add_argument("--dry-run", action="store_true", help="print, but write no rows")
    given = parser.parse_args()
    with torch.no_grad():
        for context in given.contexts:
            rows = measure(
                context, given.recipes, given.budget, given.repeats, given.threads, given.chunk
            )
            if not given.dry_run:
                append_rows("decode", rows)


if __name__ == "__main__":
    main()
