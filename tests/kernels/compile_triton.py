"""Compiles the kernels for GPUs, which needs none: run by `test_triton_compiles.py`, without the interpreter.

    python compile_triton.py CAPABILITY WHAT...

What is compiled is what kvloom launches: its own calls bind the arguments, on tensors of the CPU, and each
launch ends once its kernel is compiled. Prints the shared memory of each.
"""

from __future__ import annotations

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kvloom.core import paged
from kvloom.core.attend import Call, partials
from kvloom.core.fixed import FixedLayer
from kvloom.formats import _hadamard
from kvloom.formats._grid import Grid
from kvloom.kernels import ops, triton_backend
from kvloom.kernels.layout import Codes
from tests.kernels import stores

W = 128


class Driver:
    """A GPU of a capability, which nobody ever asks to run anything."""

    def __init__(self, capability: int):
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=None: 0


def compiled(module, name, grid, device):
    kernel = getattr(triton_backend.kernels(module), name)

    def compile_only(*arguments, **options):
        made = kernel.run(*arguments, grid=grid, warmup=True, **options)
        print(name, made.metadata.shared, flush=True)

    return compile_only


def layer(recipe, budget=None):
    """A layer of bf16 entries, filled without Triton."""
    force(None)
    store = stores.filled(recipe, H=1, D=W, n=200, dtype=torch.bfloat16, budget=budget)
    force("triton")
    return store


def force(backend):
    ops.forced_backend = lambda: backend
    ops.triton_why_not = lambda *about: None if backend else "not now"


def pages(recipe):
    """Attention over pages, what they receive, and pages decoded."""
    store = layer(recipe)
    call = stores.call_of(store, softcap=30.0)
    _, lse = ops.combine(partials(store, call, None))
    known = paged.of(store)
    if recipe != "none":
        known.read(store, store.pool.slabs[0])
    known.mass(store, call, lse)


def step():
    """A step in fixed memory."""
    fixed = FixedLayer(layer("streaming_llm(sinks=4) | int8", "180tok"), 4)
    token = torch.zeros(1, 1, 1, W, dtype=torch.bfloat16)
    fixed.step(Call(token[:, :, None].expand(1, 1, 2, 1, W), 0.1), token, token)


def encode():
    """Sealing, with a rotation too wide for shared memory, too."""
    Grid("key", 3, "channel")._by_kernels(torch.zeros(1, 64, W), triton_backend.encode)
    turned = torch.ones(1, 256, dtype=torch.int8), _hadamard.matrix(256), torch.zeros(1).int()
    Grid("value", 4)._by_kernels(
        torch.zeros(1, 64, 256).bfloat16(),
        lambda *given: triton_backend.encode(*given, turned=turned),
    )


def compact():
    old = torch.zeros(1, 2, 1536, dtype=torch.uint8)
    none = torch.full((64,), -1, dtype=torch.int32)
    triton_backend.move_codes([old], none, none, old.clone(), Codes("value", 3, W))


def centroids():
    rows, at = torch.zeros(1, 16, 2 * W + 2), torch.zeros(1, 16, dtype=torch.int64)
    for ema in (None, 0.9):
        triton_backend.join_centroids(rows[0], at, rows, torch.ones(1, 16), 2 * W + 1, ema)


def main(capability, names):
    torch.set_grad_enabled(False)
    driver.set_active(Driver(capability))
    triton_backend.launch = compiled
    triton_backend.missing = triton_backend.why_not = lambda *about: None
    others = {f.__name__: f for f in (step, encode, compact, centroids)}
    for name in names:
        others[name]() if name in others else pages(name)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
