"""Time to seal pages: coded and packed by the CPU kernels, and by torch, in turns.

    python benchmarks/sealing.py                    (512 tokens, 8 KV heads of 128, 1 thread)

One chunk of one layer, as a prefill seals it; both must make the same bits of it. Ratios are medians within
rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from _common import append_rows, interleaved, paired_ratio, provenance

from kvloom import Recipe
from kvloom.core.format import PAGE, Encoded, PageBatch, PageFormat, Place
from kvloom.kernels import ops

RECIPES = (
    "int8", "int4", "int4(keys='channel')", "kivi", "fp8", "turboquant_mse", "kvquant",
    "streaming_kvquant(rope='post')",
)  # fmt: skip
BACKENDS = ("cpu", "torch")


def sealed_by(backend: str, fmt: PageFormat, batch: PageBatch) -> Encoded:
    os.environ["KVLOOM_BACKEND"] = backend
    ops.forced_backend.cache_clear()
    return fmt.encode(batch, {})


def check(fmt: PageFormat, batch: PageBatch) -> None:
    """Raise RuntimeError unless both make the same bits."""
    ours, theirs = (sealed_by(name, fmt, batch).tile for name in BACKENDS)
    wrong = [name for name, x in theirs.items() if not torch.equal(ours[name], x)]
    if wrong:
        raise RuntimeError(f"{fmt}: {', '.join(wrong)} differ between {' and '.join(BACKENDS)}")


def measure(given: argparse.Namespace, recipe: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    n, H, D = given.tokens // PAGE, given.kv_heads, given.width
    keys, values = (torch.randn(n * H, PAGE, D, generator=generator) for _ in range(2))
    head = torch.arange(H).repeat_interleave(n)
    fmt = Recipe.parse(recipe).format
    assert fmt is not None
    tables = fmt.tables(Place(0, 1, H, D, D), keys.device)
    batch = PageBatch(keys, values, torch.zeros_like(head), head, 1, H, tables)
    check(fmt, batch)
    calls: dict[str, Callable[[], Any]] = {
        name: lambda name=name: sealed_by(name, fmt, batch)  # type: ignore[misc]
        for name in BACKENDS
    }
    times = interleaved(calls, given.repeats)
    ratio, low, high = paired_ratio(times["torch"], times["cpu"])
    row: dict[str, Any] = {**provenance(given.threads), "recipe": recipe, "tokens": given.tokens}
    row |= {"kv_heads": H, "width": D}
    row |= {f"{name}_ms": round(statistics.median(times[name]) * 1e3, 3) for name in BACKENDS}
    row |= {"x_torch": round(ratio, 2), "x_torch_q25": round(low, 2), "x_torch_q75": round(high, 2)}
    print(
        f"{recipe:32s} {row['cpu_ms']:8.2f} ms, {row['x_torch']:5.2f} times as fast as torch",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true", help="print, but write no rows")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with torch.no_grad():
        rows = [measure(given, recipe) for recipe in given.recipes]
    if not given.dry_run:
        append_rows("sealing", rows)


if __name__ == "__main__":
    main()
