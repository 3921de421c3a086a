"""Attention over pages by the Triton kernels, against torch's flash attention on dense bf16 tensors.

    python benchmarks/gpu_attention.py                        (an NVIDIA GPU; a few minutes)
    python benchmarks/gpu_attention.py --check-only           (anywhere: Triton's interpreter, tiny shapes)

One step of decoding in one layer, 32 query and 8 KV heads of 128. Every result is checked first, against
float64 over the decoded pages, and the script stops where it is off. Times are medians of events on the
device, taken in rounds in which all contenders take turns, each behind a write that empties the GPU's cache.
Bandwidth is what a large copy reaches in the same rounds, bytes read plus bytes written. torch's attention is
timed with `enable_gqa` and with a group's queries as rows of one call; the faster one counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

if "--check-only" in sys.argv:  # read when triton is imported, and by kvloom's choice of backend
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("KVLOOM_BACKEND", "triton")

import torch
from _common import append_rows, provenance
from cpu_attention import bytes_in_use, check, layer_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvloom.core import paged
from kvloom.core.attend import Call, partials

RECIPES = ("none", "int8", "int4", "int3", "int2", "int4(keys='channel')", "kivi(bits=2)", "fp8",
           "rotated_int4", "turboquant_mse", "streaming_kvquant(rope='pair')", "kvquant")  # fmt: skip
WRONG = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-4}  # of the largest number, by dtype
COPY = 1 << 31  # bytes of the copy that bandwidth is measured with
CACHE = 1 << 28  # bytes that are written between two calls: more than any GPU's cache


def flash_infer(query: Tensor, keys: Tensor, values: Tensor) -> Callable[[], Any] | None:
    """FlashInfer's decode of a batch over pages of 16 dense entries, if it is installed."""
    try:
        import flashinfer
    except ImportError:
        return None
    (B, H, T, D), page = keys.shape, 16
    paged = tuple(
        x.view(B, H, T // page, page, D).transpose(1, 2).flatten(0, 1).contiguous()
        for x in (keys, values)
    )
    whole = {"dtype": torch.int32, "device": keys.device}
    each = T // page
    space = torch.empty(128 << 20, dtype=torch.uint8, device=keys.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "HND", use_tensor_cores=True)
    wrapper.plan(
        torch.arange(B + 1, **whole) * each, torch.arange(B * each, **whole),
        torch.full((B,), page, **whole), query.shape[2] * H, H, D, page,
        q_data_type=query.dtype, kv_data_type=keys.dtype,
    )  # fmt: skip
    q = query[:, :, :, 0].flatten(1, 2)
    return lambda: wrapper.run(q, paged)


def timed(
    calls: dict[str, Callable[[], Any]], repeats: int, between: Callable[[], Any]
) -> dict[str, list[float]]:
    """Milliseconds on the device, `repeats` times in turns; the order rotates. `between` precedes every
    call and is not measured.
    """
    names, times = list(calls), {name: [] for name in calls}
    for i in range(5 + repeats):
        marks = []
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            between()
            start.record()
            calls[name]()
            stop.record()
            marks.append((name, start, stop))
        torch.cuda.synchronize()
        for name, start, stop in marks:
            if i >= 5:
                times[name].append(start.elapsed_time(stop))
    return times


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph: what the launches themselves cost is left out."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(given: argparse.Namespace, batch: int, tokens: int) -> list[dict[str, Any]]:
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    H, G = given.kv_heads, given.heads // given.kv_heads
    generator = torch.Generator(device=device).manual_seed(0)
    keys, values, query = (
        torch.randn(batch, H, n, given.width, generator=generator, device=device, dtype=dtype)
        for n in (tokens, tokens, G)
    )
    query = query.unsqueeze(3)
    call = Call(query, given.width**-0.5, positions=torch.full((batch, 1), tokens, device=device))
    shape = {"dtype": given.dtype, "batch": batch, "heads": given.heads, "kv_heads": H,
             "width": given.width, "tokens": tokens}  # fmt: skip
    rows: list[dict[str, Any]] = []
    for recipe in given.recipes:
        store = layer_of(recipe, keys, values, G, given.chunk)
        reason = paged.why_not(store, call)
        if reason is not None:
            raise SystemExit(f"{recipe}: {reason}")
        error = check(store, call)
        if not error <= WRONG[given.dtype]:
            raise SystemExit(f"{recipe} at {shape}: {error:.1e} away from float64")
        row: dict[str, Any] = {**shape, "recipe": recipe, "bytes": bytes_in_use(store),
                               "error": f"{error:.1e}"}  # fmt: skip
        if not given.check_only:
            row |= against(store, call, keys, values, row["bytes"], given.repeats)
        rows.append(row)
        print(row, flush=True)
    return rows


def against(
    store: Any, call: Call, keys: Tensor, values: Tensor, nbytes: int, repeats: int
) -> dict[str, Any]:
    """Medians, and ratios to torch and FlashInfer in the same rounds."""
    flat = call.query[:, :, :, 0].flatten(1, 2)[:, :, None]  # [B, heads, 1, D]
    rows = call.query[:, :, :, 0]  # a group's queries as rows of one head

    def flash(query: Tensor, **options: Any) -> Callable[[], Any]:
        def run() -> Any:
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
                return sdpa(query, keys, values, **options)

        return graphed(run)

    source = torch.empty(COPY // 2, dtype=torch.uint8, device=keys.device)
    target = torch.empty_like(source)
    flush = torch.empty(CACHE, dtype=torch.uint8, device=keys.device)
    ours = graphed(lambda: partials(store, call, None))
    calls: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "ours": ours,
        "eager": lambda: partials(store, call, None),
        "gqa": flash(flat, enable_gqa=True),
        "grouped": flash(rows),
    }
    try:
        other = flash_infer(call.query, keys, values)
        if other is not None:
            calls["flashinfer"] = graphed(other)
    except (
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # versions differ: the column stays empty
        print(f"  flashinfer: {error}", flush=True)
    times = {name: statistics.median(ms) for name, ms in timed(calls, repeats, flush.zero_).items()}
    bandwidth = 2 * source.nbytes / times["copy"] / 1e6
    reached = nbytes / times["ours"] / 1e6
    infer, best = times.get("flashinfer"), min(times["gqa"], times["grouped"])
    return {
        **gpu(), "ms": round(times["ours"], 4), "ms_eager": round(times["eager"], 4),
        "GB_s": round(reached, 1), "copy_GB_s": round(bandwidth, 1),
        "of_copy": round(reached / bandwidth, 3), "sdpa_ms": round(best, 4),
        "sdpa_form": "gqa" if best == times["gqa"] else "grouped",
        "x_sdpa": round(best / times["ours"], 3),
        "x_flashinfer": "" if infer is None else round(infer / times["ours"], 3),
    }  # fmt: skip


def gpu() -> dict[str, Any]:
    import triton

    facts = {k: v for k, v in provenance(1).items() if k not in ("threads", "transformers")}
    return {**facts, "machine": torch.cuda.get_device_name(), "triton": triton.__version__}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--chunk", type=int, default=8192, help="entries that are packed at once")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--check-only", action="store_true", help="tiny shapes, no timing, no GPU")
    parser.add_argument("--dry-run", action="store_true", help="print, but write no rows")
    given = parser.parse_args(arguments)
    given.device = "cuda"
    if given.check_only:
        given.device, given.tokens, given.batch, given.width = "cpu", [200], [1], 32
        given.dtype, given.chunk, given.heads, given.kv_heads = "float32", 200, 4, 2
    elif not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can see: --check-only runs without one")
    with torch.no_grad():
        for tokens in given.tokens:
            for batch in given.batch:
                rows = measure(given, batch, tokens)
                if not given.dry_run and not given.check_only:
                    append_rows("gpu_attention", rows)


if __name__ == "__main__":
    main()
