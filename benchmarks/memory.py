"""Freed memory is free: evict 90 % of a cache and report its bytes against the ideal.

    python benchmarks/memory.py

The ideal stores the survivors and nothing else: sealed ones at the format's bytes per slot, the
newest ones exactly. What lies above it is slack, by cause.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from _common import append_rows, benchmark_model, provenance

from kvloom import CompressedCache

TOKENS, KEPT = 10_000, 1_000
SIZE = f"streaming_llm(sinks=0, recent={KEPT}) | lazy(every={TOKENS - KEPT})"


def measure(model: Any, fmt: str) -> dict[str, Any]:
    cache = CompressedCache(model, f"{SIZE} | {fmt}")
    ids = torch.randint(2, 4096, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    for start in range(0, TOKENS - 1, 1024):
        model(
            ids[:, start : min(start + 1024, TOKENS - 1)], past_key_values=cache, logits_to_keep=1
        )
    before = cache.nbytes
    model(ids[:, -1:], past_key_values=cache)  # the token that makes eviction due
    stores = [layer.store for layer in cache.compressed]
    plan, cost = stores[0].plan, stores[0].plan.cost
    sealed = sum(int(s.pool.live.sum()) for s in stores)
    exact = sum(int(s.tail.count.sum()) for s in stores)
    pages = sum(s.fields[next(iter(s.fields))].shape[0] for x in stores for s in x.pool.slabs)
    tail = sum(s.tail.count.numel() * s.tail.capacity for s in stores) - exact
    ideal = int(sealed * cost.page / 64 + exact * cost.exact_slot)
    after = cache.nbytes
    edge = int((pages - sealed / 64) * cost.page)
    return {
        **provenance(torch.get_num_threads()), "format": plan.format.name, "tokens": TOKENS,
        "kept": stores[0].stored.max().item(), "bytes_before": before, "bytes_after": after,
        "ideal": ideal, "above_ideal": round(after / ideal, 4), "slack_page_edge": edge,
        "slack_tail": tail * cost.exact_slot,
        "metadata_and_counters": after - ideal - edge - tail * cost.exact_slot,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="print, but write no rows")
    given = parser.parse_args()
    with torch.no_grad():
        model = benchmark_model()
        rows = [measure(model, fmt) for fmt in ("dense", "int4", "int4_channel")]
    for row in rows:
        print({k: v for k, v in row.items() if k not in provenance(0)})
    if not given.dry_run:
        append_rows("memory", rows)


if __name__ == "__main__":
    main()
