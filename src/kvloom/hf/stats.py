"""What a cache holds, in bytes by part, bits and counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvloom.core.format import PAGE
from kvloom.core.store import LayerStore
from kvloom.hf.usage import Usage

if TYPE_CHECKING:
    from kvloom.hf.cache import CompressedCache

PARTS = (
    "pages",
    "page metadata",
    "sinks",
    "tail",
    "centroids",
    "query memory",
    "staged",
    "counters",
    "other layers",
)


@dataclass(frozen=True)
class CacheStats:
    """A snapshot of a cache.

    Attributes:
        recipe, budget: as text. rows, layers: compressed ones. seen: valid tokens per row.
        stored_min, stored_mean, stored_max: entries kept per KV head, centroids excluded.
        nbytes: all live storages. by_part: the same, split. slack: bytes within `nbytes` that hold
            no live entry (free and dead page slots, free tail slots).
        dense_nbytes: a 16-bit dense cache for the tokens seen.
        compression_ratio: dense_nbytes / nbytes. dtype_ratio: against the model's own dtype.
        avg_key_bits, avg_value_bits: effective bits per stored element: codes, scales, ids and side
            planes as the live entries hold them; sets that entries share are counted once.
        avg_key_code_bits, avg_value_code_bits: the same without metadata (scales, zero points, ids).
        compression_ratio_key, compression_ratio_value: 16 bits for every key (value) seen / bits of
            those stored. total_outliers: sealed keys and values that lie beside their codes;
            outlier_ratio: their share of all that are sealed.
        layer_stats: the same by layer.
        compressions, evicted, merged, sealed, compactions: counts, entries over all heads.
    """

    recipe: str
    budget: str | None
    rows: int
    layers: int
    seen: list[int]
    stored_min: int
    stored_mean: float
    stored_max: int
    nbytes: int
    by_part: dict[str, int]
    slack: int
    dense_nbytes: int
    compression_ratio: float
    dtype_ratio: float
    avg_key_bits: float
    avg_value_bits: float
    avg_key_code_bits: float
    avg_value_code_bits: float
    compression_ratio_key: float
    compression_ratio_value: float
    outlier_ratio: float
    total_outliers: int
    layer_stats: list[dict[str, float]]
    compressions: int
    evicted: int
    merged: int
    sealed: int
    compactions: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return dataclasses.asdict(self)

    def table(self) -> str:
        """A small table for people."""
        seen = "/".join(str(n) for n in sorted(set(self.seen))) or "0"
        lines = [
            f"CompressedCache  {self.recipe}" + (f"  budget {self.budget}" if self.budget else ""),
            f"  tokens seen      {seen:>12}   rows {self.rows}, compressed layers {self.layers}",
            f"  entries per head {self.stored_mean:12.1f}   min {self.stored_min}, max {self.stored_max}",
            f"  bits key / value {self.avg_key_bits:6.2f}/{self.avg_value_bits:5.2f}",
        ]
        lines += [f"  {part:<16} {_size(n):>12}" for part, n in self.by_part.items() if n]
        lines += [
            f"  {'total':<16} {_size(self.nbytes):>12}   of which slack {_size(self.slack)}",
            f"  16-bit dense     {_size(self.dense_nbytes):>12}   compression ratio "
            f"{self.compression_ratio:.2f}x ({self.dtype_ratio:.2f}x against the model's dtype)",
            f"  evicted {self.evicted}, merged {self.merged}, sealed {self.sealed} entries in "
            f"{self.compressions} compressions, {self.compactions} compactions",
        ]
        return "\n".join(lines)


def _size(n: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024 or (unit == "MiB" and n < 1024**2):
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n_next = n / 1024
        n = n_next  # type: ignore[assignment]
    return f"{n:.2f} GiB"


def storages(tensors: Iterable[Tensor]) -> dict[tuple[str, int], int]:
    """Unique storages: (device, address) -> bytes."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[(str(tensor.device), storage.data_ptr())] = storage.nbytes()
    return found


def _pending(layer: Any) -> list[Tensor]:
    """What a forward that waits for `crop` keeps alive."""
    forward = layer.pending
    if forward is None:
        return []
    call = forward.call
    kept = [call.query, call.new_mask, call.past_mask, call.voters, forward.lse, forward.columns]
    return [*forward.block.tensors(), forward.tokens, *(t for t in kept if t is not None)]


def layer_tensors(layer: Any) -> list[Tensor]:
    """Every tensor that a layer of any kind holds."""
    store = getattr(layer, "store", None)
    if isinstance(store, LayerStore):
        return [*store.tensors(), *(layer.staged or ()), *_pending(layer)]
    return list(_tensors(vars(layer)))


def _tensors(held: Any) -> Iterator[Tensor]:
    """Tensors in a value, or in containers of it (linear layers keep their states in dicts)."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict | list | tuple):
        for x in held.values() if isinstance(held, dict) else held:
            yield from _tensors(x)


def unique_nbytes(layers: Iterable[Any]) -> int:
    """Bytes of all live storages of these layers, each once."""
    return sum(storages(t for layer in layers for t in layer_tensors(layer)).values())


def _parts(layer: Any) -> dict[str, list[Tensor]]:
    store = getattr(layer, "store", None)
    if not isinstance(store, LayerStore):
        return {"other layers": layer_tensors(layer)}
    return {**store.parts(), "staged": [*(layer.staged or ()), *_pending(layer)]}


def _by_part(layers: Iterable[Any]) -> dict[str, int]:
    total, seen = dict.fromkeys(PARTS, 0), set()
    for layer in layers:
        for part, tensors in _parts(layer).items():
            for key, n in storages(tensors).items():
                if key not in seen:
                    seen.add(key)
                    total[part] += n
    return total


def _slack(store: LayerStore) -> int:
    plan, pool = store.plan, store.pool
    room = sum(slab.size for slab in pool.slabs) * PAGE
    live = int(pool.live.sum())
    return int(max(0, room - live) * plan.cost.page / PAGE + store.tail.free * plan.cost.exact_slot)


def collect_stats(cache: CompressedCache) -> CacheStats:
    """See `CompressedCache.stats`."""
    stores = [layer.store for layer in cache.compressed if layer.store is not None]
    seen = stores[0].seen.tolist() if stores else []
    stored = [n for store in stores for n in store.stored.flatten().tolist()]
    dense = sum(s.plan.cost.dense_slot * s.plan.heads * sum(seen) for s in stores)
    own = sum(
        (s.plan.key_dim + s.plan.value_dim) * s.plan.dtype.itemsize * s.plan.heads * sum(seen)
        for s in stores
    )
    by_part = _by_part(cache.layers)
    nbytes = sum(by_part.values())
    compressed = max(1, nbytes - by_part["other layers"])
    counts = {
        name: sum(getattr(s.counters, name) for s in stores)
        for name in ("compressions", "evicted", "merged", "sealed", "compactions")
    }
    return CacheStats(
        recipe=str(cache.recipe),
        budget=None if cache.budget is None else str(cache.budget),
        rows=len(seen),
        layers=len(cache.compressed),
        seen=seen,
        stored_min=min(stored, default=0),
        stored_mean=sum(stored) / len(stored) if stored else 0.0,
        stored_max=max(stored, default=0),
        nbytes=nbytes,
        by_part=by_part,
        slack=sum(_slack(s) for s in stores),
        dense_nbytes=dense,
        compression_ratio=dense / compressed,
        dtype_ratio=own / compressed,
        layer_stats=[
            {
                "layer": layer.layer_idx,
                "stored_mean": float(store.stored.double().mean()),
                **Usage.of(store).figures(),
            }
            for layer in cache.compressed
            if (store := layer.store) is not None
        ],
        **Usage.total(map(Usage.of, stores)).figures(),
        **counts,
    )
