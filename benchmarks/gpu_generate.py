"""Time per token and bytes of a model shaped like Llama-3.1-8B (random weights), eager and as a CUDA graph.

    python benchmarks/gpu_generate.py                        (an NVIDIA GPU with 40 GB or more)
    python benchmarks/gpu_generate.py --check-only           (anywhere: Triton's interpreter, a tiny model)

A context is prefilled in chunks, then tokens are decoded one by one. `DynamicCache` runs on the model's
stock attention. Recipes run as `generate` runs them (eager) and in fixed memory (graph: one graph of the
whole model's step; every 64 tokens the policies run between two replays, which is part of the time).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

if "--check-only" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("KVLOOM_BACKEND", "triton")

import torch
from _common import append_rows, provenance
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache

from kvloom import CompressedCache
from kvloom.hf.fixed import FixedCache

RECIPES = ("none", "int8", "int4", "int2", "snapkv | int4 @ 25%",
           "streaming_llm(sinks=4) | lazy(every=64) | int4 @ 25%", "streaming_llm(sinks=4) | int4 @ 25%")  # fmt: skip
STEPS = 64


def model_of(tiny: bool, device: str) -> LlamaForCausalLM:
    """Llama-3.1-8B's shape, or a tiny one; weights are random."""
    torch.manual_seed(0)
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256,
             "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
    if tiny:
        shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64,
                 "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    config = LlamaConfig(
        **shape, max_position_embeddings=131072 + 4096, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    torch.set_default_dtype(torch.float32 if tiny else torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def prefilled(model: Any, cache: Any, tokens: int, batch: int, chunk: int) -> Any:
    ids = torch.randint(2, model.config.vocab_size, (batch, tokens), device=model.device)
    for i in range(0, tokens, chunk):
        model(ids[:, i : i + chunk], past_key_values=cache, logits_to_keep=1)
    return cache


def eager(model: Any, cache: Any, batch: int) -> Callable[[int], Any]:
    token = torch.full((batch, 1), 7, device=model.device)
    return lambda position: model(token, past_key_values=cache).logits


def graph(model: Any, cache: FixedCache, batch: int, tokens: int) -> Callable[[int], Any]:
    """Steps as replays of one graph; on a CPU the same steps without one."""
    token = torch.full((batch, 1), 7, device=model.device)
    place = torch.full((batch, 1), tokens, device=model.device)

    def forward() -> Any:
        return model(token, past_key_values=cache, position_ids=place, use_cache=True).logits

    run = forward
    if model.device.type == "cuda":
        from gpu_attention import graphed

        counts = [layer.fixed.count.clone() for layer in cache.fixed]
        run = graphed(forward)  # its rehearsals appended tokens
        for layer, count in zip(cache.fixed, counts, strict=True):
            layer.fixed.count.copy_(count)
    since = [0]

    def step(position: int) -> Any:
        if since[0] == cache.steps - 8:
            cache.flush(since[0])
            since[0] = 0
        place.fill_(position)
        since[0] += 1
        return run()

    return step


def measure(step: Callable[[int], Any], start: int, repeats: int, cuda: bool) -> list[float]:
    """Milliseconds of each step, all that the policies do included."""
    times = []
    for i in range(repeats):
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        step(start + i)
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) * 1e3)
    return times


def contenders(model: Any, stock: Any, recipe: str, tokens: int, given: Any) -> Any:
    """`(way, bytes, step)` of one recipe."""
    batch, chunk = given.batch, given.chunk
    if recipe == "DynamicCache":
        cache = prefilled(stock, DynamicCache(config=stock.config), tokens, batch, chunk)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        yield "eager", held, eager(stock, cache, batch)
        return
    if recipe.startswith("QuantizedCache"):
        bits = int(recipe.rsplit(" ", 1)[1])
        cache = prefilled(
            stock, QuantizedCache("quanto", stock.config, nbits=bits), tokens, batch, chunk
        )
        yield "eager", "", eager(stock, cache, batch)
        return
    name, _, budget = (part.strip() for part in recipe.partition("@"))
    cache = CompressedCache(model, name, budget=budget or None)
    prefilled(model, cache, tokens, batch, chunk)
    yield "eager", cache.nbytes, eager(model, cache, batch)
    cache = CompressedCache(model, name, budget=budget or None)
    prefilled(model, cache, tokens, batch, chunk)
    try:
        fixed = FixedCache(cache, STEPS)
    except ValueError as error:
        print(f"  {recipe}: no graph: {error}", flush=True)
        return
    yield "graph", fixed.nbytes, graph(model, fixed, batch, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    quantized = [f"QuantizedCache {bits}" for bits in (4, 2)]
    parser.add_argument("--recipes", nargs="+", default=["DynamicCache", *quantized, *RECIPES])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=4096, help="tokens of a prefill's forward")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--check-only", action="store_true", help="a tiny model, no GPU, no rows")
    parser.add_argument("--dry-run", action="store_true", help="print, but write no rows")
    given = parser.parse_args()
    cuda = not given.check_only
    if cuda and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can see: --check-only runs without one")
    if given.check_only:
        given.tokens, given.repeats, given.chunk = [140], 3, 140
        given.recipes = [r for r in given.recipes if not r.startswith("QuantizedCache")]
    device = "cuda" if cuda else "cpu"
    model, stock = (model_of(given.check_only, device) for _ in range(2))
    stock.load_state_dict(model.state_dict(), assign=True)  # one set of weights
    with torch.no_grad():
        for tokens in given.tokens:
            for recipe in given.recipes:
                rows = run(model, stock, recipe, tokens, given, cuda)
                if cuda and rows and not given.dry_run:
                    append_rows("gpu_generate", rows)


def run(
    model: Any, stock: Any, recipe: str, tokens: int, given: Any, cuda: bool
) -> list[dict[str, Any]]:
    rows = []
    try:
        for way, held, step in contenders(model, stock, recipe, tokens, given):
            measure(step, tokens, min(5, given.repeats), cuda)
            times = measure(step, tokens + 5, given.repeats, cuda)
            rows.append({
                "machine_gpu": torch.cuda.get_device_name() if cuda else "none", **provenance(1),
                "tokens": tokens, "batch": given.batch, "recipe": recipe, "way": way, "nbytes": held,
                "ms_median": round(statistics.median(times), 3), "ms_mean": round(statistics.fmean(times), 3),
                "ms_worst": round(max(times), 3), "repeats": given.repeats,
            })  # fmt: skip
            print(
                {k: rows[-1][k] for k in ("tokens", "recipe", "way", "nbytes", "ms_median")},
                flush=True,
            )
    except (torch.OutOfMemoryError, ImportError) as error:  # the row is missing, and it is said why
        print(f"  {recipe}: {str(error).splitlines()[0]}", flush=True)
    if cuda:
        torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    main()
