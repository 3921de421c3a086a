"""Time per token and bytes of a model shaped like Llama-3.1-8B (random weights), eager and as a CUDA graph.

    python benchmarks/gpu_generate.py                        (an NVIDIA GPU with 60 GB; some minutes)
    python benchmarks/gpu_generate.py --check-only           (anywhere: Triton's interpreter, a tiny model)

The context is random keys, values and queries, the same for all caches, put into them as a prefill in chunks
would; then tokens are decoded one by one. `DynamicCache` and `QuantizedCache` run on the model's stock
attention. Recipes run as `generate` runs them (eager) and in fixed memory (graph: one graph of the whole
model's step; every 56 tokens the policies run between two replays, which is part of the time).

Before any timing a layer's attention is compared with the reference in torch, and the graph's logits with
those of the eager step; `none` also with `DynamicCache`. Bytes are what a cache holds after its context.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

if "--check-only" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("KVLOOM_BACKEND", "triton")

import torch
from _common import append_rows, provenance
from gpu_attention import WRONG, graphed
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache

from kvloom import CompressedCache
from kvloom.core.attend import Call, partials
from kvloom.hf.fixed import FixedCache
from kvloom.kernels import ops

RECIPES = ("none", "int8", "int4", "int2", "snapkv | int4 @ 25%",
           "streaming_llm(sinks=4) | lazy(every=64) | int4 @ 25%", "streaming_llm(sinks=4) | int4 @ 25%")  # fmt: skip
STEPS, BETWEEN = 64, 56  # tokens that fit in between two flushes, and after how many there is one


def model_of(tiny: bool, device: str) -> LlamaForCausalLM:
    """Llama-3.1-8B's shape, or a tiny one; weights are random."""
    torch.manual_seed(0)
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256,
             "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
    if tiny:
        shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64,
                 "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
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


def context(model: Any, given: Any, tokens: int, chunk: int) -> Iterator[tuple[int, list[Tensor]]]:
    """`(first token, [queries, keys, values] [B, heads, n, D])` of a layer's context, chunk by chunk."""
    config, generator = model.config, torch.Generator(device=model.device).manual_seed(1)
    heads = (config.num_attention_heads, *[config.num_key_value_heads] * 2)
    for start in range(0, tokens, chunk):
        shape = min(chunk, tokens - start), config.hidden_size // config.num_attention_heads
        yield start, [torch.randn(given.batch, h, *shape, generator=generator, device=model.device,
                                  dtype=model.dtype) for h in heads]  # fmt: skip


def stock_of(model: Any, cache: Any, given: Any, tokens: int) -> Any:
    """A cache of transformers with its context, which comes at once."""
    for layer in cache.layers:
        parts = list(context(model, given, tokens, given.chunk))
        keys, values = (torch.cat([x[i] for _, x in parts], 2) for i in (1, 2))
        layer.update(keys, values)
    return cache


def compressed_of(model: Any, recipe: str, given: Any, tokens: int) -> CompressedCache:
    """A cache with its context, compressed after every chunk."""
    name, _, budget = (part.strip() for part in recipe.partition("@"))
    cache = CompressedCache(model, name, budget=budget or None)
    for layer in cache.compressed:
        for start, (query, keys, values) in context(model, given, tokens, given.chunk):
            if layer.store is None:
                layer.lazy_initialization(keys, values)
            store, (B, H, n, D) = layer.store, keys.shape
            at = torch.arange(start, start + n, device=keys.device).expand(B, -1)
            call = Call(query.view(B, H, -1, n, D), D**-0.5, positions=at)
            assert store is not None
            store.commit(store.stage(keys, values, call, None, at))
            store.settled()
        layer.columns = tokens
    return cache


def away(cache: CompressedCache) -> float:
    """How far a layer's attention is from the reference in torch, relative to the largest number."""
    store = cache.compressed[0].store
    assert store is not None
    plan, B = store.plan, len(store.seen)
    generator = torch.Generator(device=store.device).manual_seed(2)
    query = torch.randn(B, plan.heads, plan.group, 1, plan.key_dim, generator=generator,
                        device=store.device, dtype=plan.dtype)  # fmt: skip
    at = store.seen[:, None].to(store.device)
    store.next_position = at[:, 0]
    call, forced = Call(query, plan.key_dim**-0.5, positions=at), os.environ.get("KVLOOM_BACKEND")
    found = []
    for backend in ("triton", "reference"):
        os.environ["KVLOOM_BACKEND"] = backend
        ops.forced_backend.cache_clear()
        found.append(ops.combine(partials(store, call, None))[0])
    os.environ.pop("KVLOOM_BACKEND")
    if forced is not None:
        os.environ["KVLOOM_BACKEND"] = forced
    ops.forced_backend.cache_clear()
    return difference(*found)


def difference(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def eager(model: Any, cache: Any, given: Any) -> Callable[[int], Tensor]:
    token = torch.full((given.batch, 1), 7, device=model.device)
    return lambda position: model(token, past_key_values=cache).logits


class Graph:
    """Steps as replays of one graph; on a CPU the same steps without one."""

    def __init__(self, model: Any, cache: FixedCache, given: Any, tokens: int):
        token = torch.full((given.batch, 1), 7, device=model.device)
        self.place = torch.full((given.batch, 1), tokens, device=model.device)
        self.cache = cache
        self.logits = torch.empty(0)

        def forward() -> None:
            self.logits = model(
                token, past_key_values=cache, position_ids=self.place, use_cache=True
            ).logits

        self.run = graphed(forward) if model.device.type == "cuda" else forward
        self.forget()

    def forget(self) -> None:
        """Steps since the last flush were rehearsals; what the cache holds now counts."""
        self.cache.flush(0)
        self.since = 0

    def __call__(self, position: int) -> Tensor:
        if self.since == BETWEEN:
            self.cache.flush(self.since)
            self.since = 0
        self.place.fill_(position)
        self.since += 1
        self.run()
        return self.logits


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


class Bench:
    """One model, and rows of time and bytes for one cache after the other."""

    def __init__(self, given: Any):
        self.given, self.cuda = given, not given.check_only
        device = "cuda" if self.cuda else "cpu"
        self.model, self.stock = (model_of(given.check_only, device) for _ in range(2))
        self.stock.load_state_dict(self.model.state_dict(), assign=True)  # one set of weights
        self.limit = WRONG["bfloat16" if self.cuda else "float32"]
        self.dense: dict[int, Tensor] = {}  # DynamicCache's first logits

    def row(self, recipe: str, tokens: int, way: str, held: int, error: float | str, step: Any, at: int) -> dict[str, Any]:  # fmt: skip
        given = self.given
        measure(step, at, given.warmup, self.cuda)
        times = measure(step, at + given.warmup, given.repeats, self.cuda)
        row = {
            "machine_gpu": torch.cuda.get_device_name() if self.cuda else "none", **provenance(1),
            "tokens": tokens, "batch": given.batch, "recipe": recipe, "way": way, "nbytes": held,
            "error": error if isinstance(error, str) else f"{error:.1e}",
            "ms_median": round(statistics.median(times), 3), "ms_mean": round(statistics.fmean(times), 3),
            "ms_worst": round(max(times), 3), "repeats": given.repeats,
        }  # fmt: skip
        shown = ("tokens", "recipe", "way", "nbytes", "error", "ms_median")
        print({k: row[k] for k in shown}, flush=True)
        return row

    def checked(self, what: str, error: float) -> float:
        """`error`. Raises SystemExit if it is more than the dtype explains."""
        if not error <= self.limit:
            raise SystemExit(f"{what}: {error:.1e} away")
        return error

    def stock_rows(self, recipe: str, tokens: int) -> Iterator[dict[str, Any]]:
        """`DynamicCache`, or `QuantizedCache 4`."""
        config = self.stock.config
        if recipe == "DynamicCache":
            cache: Any = DynamicCache(config=config)
        else:
            cache = QuantizedCache("quanto", config, nbits=int(recipe.rsplit(" ", 1)[1]))
        stock_of(self.stock, cache, self.given, tokens)
        held = sum(
            x.nbytes
            for layer in cache.layers
            for x in (layer.keys, layer.values, *quantized(layer))
        )
        step = eager(self.stock, cache, self.given)
        first = step(tokens)
        if recipe == "DynamicCache":
            self.dense[tokens] = first
        yield self.row(recipe, tokens, "eager", held, "", step, tokens + 1)

    def rows(self, recipe: str, tokens: int) -> Iterator[dict[str, Any]]:
        """A recipe, eager and as a graph."""
        given = self.given
        cache = compressed_of(self.model, recipe, given, tokens)
        error, held = self.checked(recipe, away(cache)), cache.nbytes
        fixed = FixedCache(cache, STEPS)
        replay, step = Graph(self.model, fixed, given, tokens), eager(self.model, cache, given)
        more = fixed.nbytes
        got = replay(tokens).clone()
        replay.forget()  # the eager step takes this token again
        want = step(tokens)
        off = self.checked(f"{recipe}: graph", difference(got, want))
        if recipe == "none" and tokens in self.dense:
            self.checked("none", difference(want, self.dense[tokens]))
        yield self.row(recipe, tokens, "eager", held, error, step, tokens + 1)
        replay.forget()
        at = tokens + 1 + given.warmup + given.repeats
        yield self.row(recipe, tokens, "graph", more, off, replay, at)

    def run(self, recipe: str, tokens: int) -> None:
        """Measure one cache, and append its rows; what does not fit, or is not installed, has none."""
        rows = []
        try:
            stock = recipe.startswith(("DynamicCache", "QuantizedCache"))
            for row in (self.stock_rows if stock else self.rows)(recipe, tokens):
                rows.append(row)
        except (torch.OutOfMemoryError, ImportError) as error:
            print(f"  {recipe}: {str(error).splitlines()[0]}", flush=True)
        if self.cuda:
            torch.cuda.empty_cache()
            if rows and not self.given.dry_run:
                append_rows("gpu_generate", rows)


def quantized(layer: Any) -> list[Tensor]:
    """The packed tensors of a layer of `QuantizedCache`."""
    held = [getattr(layer, name, None) for name in ("_quantized_keys", "_quantized_values")]
    parts = [getattr(x, name, None) for x in held for name in ("_data", "_scale", "_shift")]
    return [getattr(x, "_data", x) for x in parts if x is not None]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    stock = ["DynamicCache", "QuantizedCache 4", "QuantizedCache 2"]
    parser.add_argument("--recipes", nargs="+", default=[*stock, *RECIPES])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=8192, help="tokens that are packed at once")
    parser.add_argument("--repeats", type=int, default=112)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--check-only", action="store_true", help="a tiny model, no GPU, no rows")
    parser.add_argument("--dry-run", action="store_true", help="print, but write no rows")
    given = parser.parse_args(arguments)
    if given.check_only:
        given.tokens, given.repeats, given.warmup, given.chunk = [1200], 1, 0, 1200
        given.recipes = [r for r in given.recipes if not r.startswith("QuantizedCache")]
    elif not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can see: --check-only runs without one")
    with torch.no_grad():
        bench = Bench(given)
        for tokens in given.tokens:
            for recipe in given.recipes:
                bench.run(recipe, tokens)


if __name__ == "__main__":
    main()
