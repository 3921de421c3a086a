"""Attention over pages beside llama.cpp's flash attention over its q8_0 and q4_0 caches, on a CPU.

    pip install llama-cpp-python      (built here for this machine's instruction set)
    python benchmarks/llama_cpp.py
    python benchmarks/llama_cpp.py --libraries build/ggml/src      (where libggml*.so lie)

One step of decoding in one layer: 32 query heads, 8 KV heads of 128. All calls take turns in one process and
ratios are medians within rounds. llama.cpp's keys and values lie as in its cache, all heads of a token side by
side, and are not masked, which a server would do. Errors are to float64 over the numbers before quantization,
relative to the largest output: what a cache loses and what a kernel loses together.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import append_rows, interleaved, paired_ratio, provenance
from cpu_attention import bytes_in_use, layer_of
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvloom.core.attend import Call, partials
from kvloom.kernels import ops

TYPES = {"f16": 1, "q4_0": 2, "q8_0": 8}  # of ggml
F32 = 0
OURS = ("none", "int8", "int4")
LIBRARIES = ("libggml-base.so", "libggml-cpu.so")


class InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class Ggml:
    """The few functions of ggml that one attention needs.

    Raises SystemExit if the libraries are not there.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        missing = [name for name in LIBRARIES if not (folder / name).exists()]
        if missing:
            raise SystemExit(
                f"{folder} lacks {', '.join(missing)}: pip install llama-cpp-python, or --libraries"
            )
        self.base, self.cpu = (
            ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in LIBRARIES
        )
        pointer, size, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self.init = self._of(self.base, "ggml_init", pointer, InitParams)
        self.tensor = self._of(
            self.base, "ggml_new_tensor_4d", pointer, pointer, ctypes.c_int, *4 * [size]
        )
        self.data = self._of(self.base, "ggml_get_data", pointer, pointer)
        self.permute = self._of(
            self.base, "ggml_permute", pointer, pointer, pointer, *4 * [ctypes.c_int]
        )
        self.row_size = self._of(self.base, "ggml_row_size", ctypes.c_size_t, ctypes.c_int, size)
        self.quantize = self._of(
            self.base,
            "ggml_quantize_chunk",
            ctypes.c_size_t,
            ctypes.c_int,
            pointer,
            pointer,
            *3 * [size],
            pointer,
        )
        self.attention = self._of(
            self.base, "ggml_flash_attn_ext", pointer, *5 * [pointer], *3 * [real]
        )
        self.graph = self._of(self.base, "ggml_new_graph", pointer, pointer)
        self.expand = self._of(self.base, "ggml_build_forward_expand", None, pointer, pointer)
        self.compute = self._of(
            self.base, "ggml_backend_graph_compute", ctypes.c_int, pointer, pointer
        )
        self.version = self._of(self.base, "ggml_version", ctypes.c_char_p)().decode()
        self.backend = self._of(self.cpu, "ggml_backend_cpu_init", pointer)()
        self._of(self.cpu, "ggml_backend_cpu_set_n_threads", None, pointer, ctypes.c_int)(
            self.backend, threads
        )

    @staticmethod
    def _of(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
        return function

    def cached(self, context: int, form: str, x: Tensor) -> int:
        """A tensor of keys or values `[H, T, D]` as the cache holds them: `[T][H][D]`, seen by heads."""
        H, T, D = x.shape
        x = x.transpose(0, 1).contiguous()
        held = self.tensor(context, TYPES[form], D, H, T, 1)
        if form == "f16":
            half = x.half()
            ctypes.memmove(self.data(held), half.data_ptr(), half.nbytes)
        else:
            self.quantize(TYPES[form], x.data_ptr(), self.data(held), 0, T * H, D, None)
        seen: int = self.permute(context, held, 0, 2, 1, 3)
        return seen

    def step(
        self, form: str, query: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Callable[[], Tensor], int]:
        """Attention of `query [heads, D]` over `[H, T, D]`, and the bytes that the cache takes."""
        H, T, D = keys.shape
        heads = query.shape[0]
        nbytes = 2 * T * H * self.row_size(TYPES[form], D)
        context = self.init(InitParams(nbytes + (64 << 20), None, False))
        q = self.tensor(context, F32, D, 1, heads, 1)
        ctypes.memmove(self.data(q), query.contiguous().data_ptr(), query.nbytes)
        k, v = (self.cached(context, form, x) for x in (keys, values))
        result = self.attention(context, q, k, v, None, D**-0.5, 0.0, 0.0)
        graph = self.graph(context)
        self.expand(graph, result)
        out = (ctypes.c_float * (heads * D)).from_address(self.data(result))

        def run() -> Tensor:
            if self.compute(self.backend, graph):
                raise RuntimeError(f"ggml could not attend over {form}")
            return torch.frombuffer(out, dtype=torch.float32).view(heads, D)

        return run, nbytes


def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(given.threads)
    ggml = Ggml(given.libraries, given.threads)
    H, G, D, T = given.kv_heads, given.heads // given.kv_heads, given.width, given.tokens
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, H, T, D, generator=generator) for _ in range(2))
    query = torch.randn(1, H, G, 1, D, generator=generator)
    call = Call(query, D**-0.5, positions=torch.full((1, 1), T))
    want = sdpa(query[:, :, :, 0].double(), keys.double(), values.double()).view(H * G, D)
    calls: dict[str, Callable[[], Any]] = {"grouped": lambda: sdpa(query[:, :, :, 0], keys, values)}
    found, held = {}, {}
    for form in given.forms:
        calls[form], held[form] = ggml.step(form, query.view(H * G, D), keys[0], values[0])
        found[form] = calls[form]().clone()
    for recipe in given.recipes:
        store = layer_of(recipe, keys, values, G, 4096)
        calls[recipe], held[recipe] = lambda s=store: partials(s, call, None), bytes_in_use(store)  # type: ignore[misc]
        found[recipe] = ops.combine(calls[recipe]())[0].view(H * G, D)
    times = interleaved(calls, given.repeats)
    rows = []
    for name, nbytes in held.items():
        peer = name in given.forms
        ratio, low, high = paired_ratio(times["grouped"], times[name])
        error = (found[name].double() - want).abs().max() / want.abs().max()
        rows.append({
            **provenance(given.threads), "backend": f"ggml {ggml.version}" if peer else ops.serving(),
            "heads": given.heads, "kv_heads": H, "width": D, "tokens": T, "cache": name,
            "ms": round(statistics.median(times[name]) * 1e3, 3), "bytes": nbytes, "error": f"{error:.1e}",
            "x_grouped": round(ratio, 3), "x_grouped_q25": round(low, 3), "x_grouped_q75": round(high, 3),
        })  # fmt: skip
        print(f"{rows[-1]['backend']:14s} {name:8s} {T:7d} x {D}  {rows[-1]['ms']:9.3f} ms  {nbytes / 1e6:6.1f} MB  "
              f"{ratio:6.3f}x grouped  error {rows[-1]['error']}", flush=True)  # fmt: skip
    return rows


def _installed() -> Path:
    spec = importlib.util.find_spec("llama_cpp")
    return Path(spec.origin).parent / "lib" if spec and spec.origin else Path("llama_cpp/lib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--libraries", type=Path, default=_installed(), help="the folder of libggml*.so"
    )
    parser.add_argument("--forms", nargs="+", choices=list(TYPES), default=list(TYPES))
    parser.add_argument("--recipes", nargs="+", default=list(OURS))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="print, but write no rows")
    given = parser.parse_args()
    with torch.no_grad():
        rows = measure(given)
    if not given.dry_run:
        append_rows("llama_cpp", rows)


if __name__ == "__main__":
    main()
