"""Time per output token of recipes against `DynamicCache`, interleaved in one process.

    python benchmarks/decode.py --contexts 2048 8192 16384 --recipes none
    python benchmarks/decode.py --contexts 32768 --recipes int4 "quanto 4 bits" --filled
    python benchmarks/decode.py --contexts 16384 --recipes int4 --model 1b

A context is prefilled (at once, as generate() does by default, or in chunks), or caches are filled with
random keys and values; then all caches decode in turns, one token each. The ratio is the median over
rounds of ours / DynamicCache within the same round. Two recipes are none: `no past` is the model without
any cache, the least that a token can take, and `quanto 4 bits` transformers' QuantizedCache.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import Any

import torch
from _common import (
    CLOCKS,
    SHAPES,
    append_rows,
    benchmark_model,
    interleaved,
    paired_ratio,
    provenance,
)
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaForCausalLM, QuantizedCache

from kvloom import CompressedCache
from kvloom.core.attend import Call

TOKEN = torch.tensor([[7]])
PIECE = 2048  # tokens that are filled in at once
STOCK = ("DynamicCache", "no past", "quanto 4 bits")  # run on the model's own attention


def prefilled(model: Any, cache: Any, ids: torch.Tensor, chunk: int | None = None) -> Any:
    chunk = chunk or ids.shape[1]
    for i in range(0, ids.shape[1], chunk):
        model(ids[:, i : i + chunk], past_key_values=cache, logits_to_keep=1)
    return cache


def filled(model: Any, cache: Any, context: int, chunk: int | None = None) -> Any:
    """A cache that holds random keys and values, as if this model had read so many tokens."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    H, D = config.num_key_value_heads, config.head_dim
    for layer in cache.layers:
        for start in range(0, context, chunk or PIECE):
            n = min(chunk or PIECE, context - start)
            if not isinstance(cache, CompressedCache) and not isinstance(cache, DynamicCache):
                start, n = 0, context  # it would quantize all that it has for every piece
            keys, values = (torch.randn(1, H, n, D, generator=generator) for _ in range(2))
            if isinstance(cache, CompressedCache):
                _read(layer, keys, values, config.num_attention_heads // H, start, generator)
            else:
                layer.update(keys, values)
            if n == context:
                break
    return cache


def _read(
    layer: Any, keys: Tensor, values: Tensor, group: int, start: int, generator: torch.Generator
) -> None:
    n, D = keys.shape[2:]
    positions = torch.arange(start, start + n)[None]
    if layer.store is None:
        layer.lazy_initialization(keys, values)
    queries = torch.randn(1, keys.shape[1], group, n, D, generator=generator)
    call, store = Call(queries, D**-0.5, positions=positions), layer.store
    if store.plan.recipe.scorer is None:  # nothing looks at attention
        forward = store.stage(keys, values, call, None, positions)
    else:
        _, forward = store.forward(keys, values, call, None, positions)
    store.commit(forward)
    store.settled()
    layer.columns += n


def _stepper(model: Any, cache: Any) -> Any:
    if cache is None:
        return lambda: model(TOKEN, use_cache=False)
    return lambda: model(TOKEN, past_key_values=cache)


def _cache(model: Any, recipe: str, budget: str | None) -> Cache | None:
    if recipe == "no past":
        return None
    if recipe == "quanto 4 bits":
        return QuantizedCache("quanto", model.config, nbits=4)
    name, _, own = recipe.partition("@")
    return CompressedCache(model, name.strip(), budget=own.strip() or budget)


def measure(
    context: int,
    recipes: list[str],
    budget: str | None,
    repeats: int,
    threads: int,
    chunk: int | None,
    shape: str = "small",
    random: bool = False,
    clock: str = "wall",
) -> list[dict]:
    # DynamicCache runs on the model's stock attention, exactly as without kvloom
    stock = benchmark_model(threads, shape)
    model = LlamaForCausalLM(copy.copy(stock.config)).eval()
    model.load_state_dict(stock.state_dict(), assign=True)  # the same weights in memory
    ids = torch.randint(2, 4096, (1, context), generator=torch.Generator().manual_seed(0))
    caches: dict[str, Any] = {"DynamicCache": DynamicCache(config=model.config)}
    caches |= {recipe: _cache(model, recipe, budget) for recipe in recipes}
    models = {name: stock if name in STOCK else model for name in caches}
    for name, cache in caches.items():
        if cache is not None and random:
            filled(models[name], cache, context, chunk)
        elif cache is not None:
            prefilled(models[name], cache, ids, chunk)
    steps = {n: _stepper(models[n], c) for n, c in caches.items()}
    times = interleaved(steps, repeats, clock=CLOCKS[clock])
    rows = []
    for recipe in recipes:
        ratio, low, high = paired_ratio(times[recipe], times["DynamicCache"])
        rows.append({
            **provenance(threads), "model": shape, "context": context,
            "prefill_chunk": "random" if random else chunk or context, "recipe": recipe, "repeats": repeats,
            "ratio_median": round(ratio, 4), "ratio_q25": round(low, 4), "ratio_q75": round(high, 4),
            "ours_ms": round(statistics.median(times[recipe]) * 1e3, 3),
            "dynamic_ms": round(statistics.median(times["DynamicCache"]) * 1e3, 3),
            "nbytes": _held(caches[recipe]), "dynamic_nbytes": _held(caches["DynamicCache"]),
            "clock": clock,
        })  # fmt: skip
        print(f"{context:6d} {recipe:40s} {ratio:.3f} [{low:.3f}, {high:.3f}] x DynamicCache  "
              f"{rows[-1]['ours_ms']} ms against {rows[-1]['dynamic_ms']} ms", flush=True)  # fmt: skip
    return rows


def _held(cache: Any) -> int:
    if isinstance(cache, CompressedCache):
        return cache.nbytes
    if isinstance(cache, DynamicCache):
        return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    return 0  # see benchmarks/quantized_cache.py


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
    parser.add_argument("--model", choices=SHAPES, default="small", help="1b is always filled")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: seconds of work")
    parser.add_argument("--filled", action="store_true", help="with random numbers, not a prefill")
    parser.add_argument("--dry-run", action="store_true", help="print, but write no rows")
    given = parser.parse_args()
    with torch.no_grad():
        for context in given.contexts:
            rows = measure(
                context, given.recipes, given.budget, given.repeats, given.threads, given.chunk,
                given.model, given.filled or given.model == "1b", given.clock,
            )  # fmt: skip
            if not given.dry_run:
                append_rows("decode", rows)


if __name__ == "__main__":
    main()
