"""Attention over pages by the CPU kernels, against torch's SDPA on dense tensors of the same content.

    python benchmarks/cpu_attention.py                    (head_dim 128, 32k tokens, 2 threads)
    python benchmarks/cpu_attention.py --tokens 131072 --width 64

One step of decoding in one layer: 32 query heads, 8 KV heads. All calls take turns in one process and
ratios are medians within rounds. `grouped` is the faster form of SDPA (the queries of a group are rows
of one call), `enable_gqa` what transformers calls. Every result is checked first, against float64 over
the decoded pages. Bytes are those of pages in use, without spare ones; bandwidth is what summing a large
tensor reaches in the same rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from _common import append_rows, interleaved, paired_ratio, provenance
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import LlamaConfig, LlamaForCausalLM

from kvloom import CompressedCache
from kvloom.core.attend import Call, partials
from kvloom.core.store import LayerStore
from kvloom.kernels import ops

RECIPES = (
    "none", "int8", "int4", "int3", "int2", "int8(keys='channel')", "int4(keys='channel')",
    "rotated_int4", "kivi(bits=4)", "kivi(bits=2)", "fp8", "turboquant_mse", "turboquant_mse(bits=2)",
    "streaming_kvquant", "streaming_kvquant(rope='pair')", "kvquant",
)  # fmt: skip
MEGABYTES_READ = 512


def layer_of(recipe: str, keys: Tensor, values: Tensor, group: int, chunk: int) -> LayerStore:
    """A layer that holds these entries `[B, H, T, D]`, packed in the recipe's format."""
    H, T, D = keys.shape[1:]
    config = LlamaConfig(
        hidden_size=8 * H * group, intermediate_size=8, num_hidden_layers=1, vocab_size=8,
        num_attention_heads=H * group, num_key_value_heads=H, head_dim=D,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(keys.dtype).eval()
    layer: Any = CompressedCache(model, recipe).layers[0]
    layer.lazy_initialization(keys[:, :, :1], values[:, :, :1])
    for i in range(0, T, chunk):
        k, v = keys[:, :, i : i + chunk], values[:, :, i : i + chunk]
        positions = torch.arange(i, i + k.shape[2], device=k.device).expand(len(k), -1)
        none = Call(k.new_zeros(len(k), H, group, 1, D), 1.0, positions=positions)
        layer.store.commit(layer.store.stage(k, v, none, None, positions))
    return layer.store


def bytes_in_use(store: LayerStore) -> int:
    """Codes, scales and indices of the pages that hold entries: what one call has to read."""
    total = 0.0
    for slab in store.pool.slabs:
        part = int(slab.used.sum()) / slab.size
        total += part * sum(x.nbytes for x in (*slab.slot.values(), *slab.tile.values()))
        total += part * sum(x.nbytes for x in slab.index.values())
        for family, fields in slab.sets.items():
            total += sum(x[: slab.n_sets[family]].nbytes for x in fields.values())
    return round(total)


def check(store: LayerStore, call: Call) -> float:
    """Largest difference to float64 over decoded pages and tail, relative to the largest number."""
    got = ops.combine(partials(store, call, None))[0].double()
    sealed, tail = store.pool.decode_all(), store.tail
    assert sealed is not None
    keys, values = (x.double() for x in sealed)
    if store.plan.pre_rope:
        at = torch.cat([slab.positions() for slab in store.pool.slabs], 2)
        keys = store.rotate(keys.float(), at).double()
    blocks = [tail] if store.sinks is None else [tail, store.sinks]
    keys = torch.cat([keys, *(b.keys[:, :, : b.longest].double() for b in blocks)], 2)
    values = torch.cat([values, *(b.values[:, :, : b.longest].double() for b in blocks)], 2)
    logits = call.query.double() @ keys[:, :, None].mT * call.scale
    want = logits.softmax(-1) @ values[:, :, None]
    return float((got - want).abs().max() / want.abs().max())


def measure(given: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    torch.set_num_threads(given.threads)
    B, H, G, D, T = (
        given.batch,
        given.kv_heads,
        given.heads // given.kv_heads,
        given.width,
        given.tokens,
    )
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(B, H, T, D, generator=generator).to(dtype) for _ in range(2))
    query = torch.randn(B, H, G, 1, D, generator=generator).to(dtype)
    call = Call(query, D**-0.5, positions=torch.full((B, 1), T))
    stores = {r: layer_of(r, keys, values, G, given.chunk) for r in given.recipes}
    errors = {r: check(store, call) for r, store in stores.items()}
    large = torch.ones(MEGABYTES_READ << 18)
    first = next(iter(stores.values()))
    calls: dict[str, Callable[[], Any]] = {
        "read": lambda: large.sum(),
        "settle": lambda: partials(first, call, None),  # whatever follows `read` finds cold caches
        "grouped": lambda: sdpa(query[:, :, :, 0], keys, values),
        "enable_gqa": lambda: sdpa(query.reshape(B, H * G, 1, D), keys, values, enable_gqa=True),
    }
    calls |= {r: lambda s=s: partials(s, call, None) for r, s in stores.items()}  # type: ignore[misc]
    times = interleaved(calls, given.repeats)
    read = large.nbytes / statistics.median(times["read"])
    shape = {"dtype": str(dtype).removeprefix("torch."), "batch": B, "heads": given.heads,
             "kv_heads": H, "width": D, "tokens": T}  # fmt: skip
    rows = []
    for recipe, store in stores.items():
        nbytes = bytes_in_use(store)
        median = statistics.median(times[recipe])
        row = {
            **provenance(given.threads), "backend": ops.serving(), **shape, "recipe": recipe,
            "ms": round(median * 1e3, 3), "bytes": nbytes, "error": f"{errors[recipe]:.1e}",
            "GB_s": round(nbytes / median / 1e9, 2), "read_GB_s": round(read / 1e9, 2),
            "of_read": round(nbytes / median / read, 3),
        }  # fmt: skip
        for name in ("grouped", "enable_gqa"):
            ratio, low, high = paired_ratio(times[name], times[recipe])
            row |= {
                f"x_{name}": round(ratio, 3),
                f"x_{name}_q25": round(low, 3),
                f"x_{name}_q75": round(high, 3),
            }
        rows.append(row)
        print(f"{shape['dtype']} {T:7d} x {D:3d}  {recipe:32s} {row['ms']:8.3f} ms  {row['x_grouped']:5.2f}x grouped  "
              f"{row['x_enable_gqa']:6.2f}x enable_gqa  {row['GB_s']:5.1f} GB/s = {100 * row['of_read']:3.0f} % of reading  "
              f"error {row['error']}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=4096, help="entries that are packed at once")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="print, but write no rows")
    given = parser.parse_args()
    with torch.no_grad():
        for name in given.dtypes:
            rows = measure(given, getattr(torch, name))
            if not given.dry_run:
                append_rows("cpu_attention", rows)


if __name__ == "__main__":
    main()
