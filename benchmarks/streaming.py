"""A long stream through a fixed window: constant memory, constant time, strict against lazy.

    python benchmarks/streaming.py --steps 20000

Ours, strict (R = 1) and lazy (R = 64), decode the whole stream in turns. Then, over the steady
state, come the same two by gathering (the published implementation: keep = sinks and window are
gathered into new tensors, kept keys are rotated to their new places), and full recomputation of
the window, which caches nothing. Times are medians; ratios are paired, token by token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from _common import append_rows, benchmark_model, interleaved, paired_ratio, provenance
from transformers import DynamicCache

from kvloom import CompressedCache
from kvloom.hf.rope import rope_of

SINKS, WINDOW, LAZY = 4, 1020, 64
STRICT = f"streaming_llm(sinks={SINKS}, recent={WINDOW})"
RECIPES = {"strict": STRICT, "lazy": f"{STRICT} | lazy(every={LAZY})"}


class Gathered:
    """Sliding window by gathering a `DynamicCache`: every R tokens the kept keys are copied and turned."""

    def __init__(self, model: Any, every: int):
        self.model, self.every = model, every
        self.cache = DynamicCache(config=model.config)
        self.rope = rope_of(model, 0)

    def feed(self, ids: torch.Tensor) -> None:
        start = self.cache.get_seq_length()
        at = torch.arange(start, start + ids.shape[1])[None]
        self.model(ids, past_key_values=self.cache, position_ids=at, logits_to_keep=1)
        over = start + ids.shape[1] - SINKS - WINDOW
        if over >= self.every:
            self._prune(over)

    def _prune(self, over: int) -> None:
        keep = torch.cat([torch.arange(SINKS), torch.arange(SINKS + over, SINKS + over + WINDOW)])
        by = torch.full((WINDOW,), -over)
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
            layer.keys[:, :, SINKS:] = self.rope.shift(layer.keys[:, :, SINKS:], by)


def stream(model: Any, ids: torch.Tensor, steps: int) -> tuple[dict[str, Any], dict[str, list]]:
    """Decode `steps` tokens through both recipes in turns; seconds and bytes of each step."""
    caches = {name: CompressedCache(model, recipe) for name, recipe in RECIPES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    nbytes: dict[str, list[int]] = {name: [] for name in caches}
    began = time.perf_counter()
    for i in range(steps):
        for name in list(caches)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            model(ids[:, i : i + 1], past_key_values=caches[name])
            seconds[name].append(time.perf_counter() - start)
            if i % 64 == 0:
                nbytes[name].append(caches[name].nbytes)
        if i % 500 == 499:
            print(f"  {i + 1} of {steps} steps, {time.perf_counter() - began:.0f} s", flush=True)
    return {"seconds": seconds, "nbytes": nbytes}, caches


def steady(model: Any, stock: Any, ids: torch.Tensor, repeats: int) -> dict[str, list[float]]:
    """Time per token of every variant, taking turns, once all windows are full."""
    full = SINKS + WINDOW
    calls: dict[str, Any] = {}
    token = ids[:, :1]
    for name, recipe in RECIPES.items():
        cache = CompressedCache(model, recipe)
        model(ids[:, :full], past_key_values=cache, logits_to_keep=1)
        calls[f"ours, {name}"] = lambda cache=cache: model(token, past_key_values=cache)
    for name, every in (("strict", 1), ("lazy", LAZY)):
        gathered = Gathered(stock, every)
        gathered.feed(ids[:, :full])
        calls[f"gathered, {name}"] = lambda gathered=gathered: gathered.feed(token)
    window = ids[:, :full]
    calls["recomputation"] = lambda: stock(window, use_cache=False, logits_to_keep=1)
    return interleaved(calls, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=130, help="steady-state tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="print, but write no rows")
    given = parser.parse_args()
    if given.steps < 4000:
        parser.error("--steps: at least 4000, so that the window is full long before the end")
    model, stock = benchmark_model(given.threads), benchmark_model(given.threads)
    ids = torch.randint(2, 4096, (1, given.steps), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows = long_rows(model, ids, given) + steady_rows(model, stock, ids, given)
    for row in rows:
        print({k: v for k, v in row.items() if k in ("what", "variant", "value", "unit")})
    if not given.dry_run:
        append_rows("streaming", rows)


def long_rows(model: Any, ids: torch.Tensor, given: argparse.Namespace) -> list[dict[str, Any]]:
    measured, _ = stream(model, ids, given.steps)
    rows = []
    for name, times in measured["seconds"].items():
        early, late = times[2000:3000], times[-1000:]
        ratio = statistics.median(late) / statistics.median(early)
        held = measured["nbytes"][name]
        warm = held[-(-2000 // 64) :]
        rows += [
            row(given, "last 1,000 steps / steps 2,000 to 3,000", name, round(ratio, 4), "ratio"),
            row(given, "least bytes after 2,000 steps", name, min(warm), "bytes"),
            row(given, "most bytes after 2,000 steps", name, max(warm), "bytes"),
        ]
    pair = paired_ratio(measured["seconds"]["strict"][2000:], measured["seconds"]["lazy"][2000:])
    rows.append(row(given, "strict / lazy, paired", "ours", round(pair[0], 4), "ratio"))
    mean = [statistics.fmean(measured["seconds"][n][2000:]) for n in ("strict", "lazy")]
    rows.append(row(given, "strict / lazy, means", "ours", round(mean[0] / mean[1], 4), "ratio"))
    return rows


def steady_rows(
    model: Any, stock: Any, ids: torch.Tensor, given: argparse.Namespace
) -> list[dict[str, Any]]:
    times = steady(model, stock, ids, given.repeats)
    slow = statistics.fmean(times["recomputation"])
    rows = []
    for name, seconds in times.items():
        mean = statistics.fmean(seconds)  # lazy work comes in bursts, which a median would hide
        rows.append(row(given, "mean time per token", name, round(mean * 1e3, 3), "ms"))
        rows.append(row(given, "recomputation / this", name, round(slow / mean, 2), "ratio"))
    return rows


def row(given: argparse.Namespace, what: str, variant: str, value: float, unit: str) -> dict:
    return {
        **provenance(given.threads), "sinks": SINKS, "window": WINDOW, "every": LAZY,
        "steps": given.steps, "what": what, "variant": variant, "value": value, "unit": unit,
    }  # fmt: skip


if __name__ == "__main__":
    main()
