"""Compiles the kernels for GPUs, which needs none: run by `test_triton_compiles.py`, without the interpreter.

python compile_triton.py CAPABILITY KERNEL...
"""

from __future__ import annotations

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvloom.kernels.layout import tile_nbytes
from kvloom.kernels.triton import append, attention, centroids, compact, decode, quantize
from kvloom.kernels.triton.spec import Home, Rope, Spec

W = 128


def packed(**facts):
    facts = {"bits": 4, "words": tile_nbytes(W, facts.get("bits", 4)) // 4, **facts}
    facts.setdefault("scale", Home("tile", 32))
    return Spec(facts.pop("kind", "uniform"), W, W, **facts)


DENSE = Spec("dense", W, W)
PARTS = {
    "dense": (DENSE, DENSE, None),
    "int8": (packed(bits=8, zero=Home("tile", 32)),) * 2 + (None,),
    "int4": (packed(zero=Home("tile", 32)),) * 2 + (None,),
    "int3_channel": (packed(bits=3, per_token=False, scale=Home("set", W), zero=Home("set", W)),
                     packed(bits=3, group=32, zero=Home("tile", 128)), None),
    "fp8": (packed(kind="fp8", bits=8),) * 2 + (None,),
    "levels": (packed(kind="levels", bits=2),) * 2 + (None,),
    "planes": (packed(per_token=False, scale=Home("set", W), middle=8.0, plane=4, plane_dtype=tl.int8,
                      plane_scaled=True),) * 2 + (None,),
    "pre_rope": (packed(bits=2, per_token=False, scale=Home("set", W), middle=2.0), packed(),
                 Rope(W, False, 1.0)),
}  # fmt: skip
RUN = ("*bf16", "*bf16", "*bf16", "constexpr", "*i32", ("i32",) * 7)


def kernels(name):
    """`(kernel, types, constants)`s by name; other arguments are int32."""
    if name in PARTS:
        key, value, rope = PARTS[name]
        plain = rope is None and name not in ("levels", "planes")
        shared = {"K": key, "V": value, "DTYPE": tl.bfloat16}
        types = {"query": "*bf16", "table": "*i64", "cells": "*i32", "splits": "*i32", "out": "*fp32",
                 "lse": "*fp32", "scale": "fp32", "softcap": "fp32"}  # fmt: skip
        constants = {**shared, "R": rope, "M": 16, "PAGES": 2 if plain else 1, "PRECISION": "tf32",
                     "CAPPED": True}  # fmt: skip
        if rope is None:
            constants["frequencies"] = None
        yield attention.attend_pages, types | {"frequencies": "*fp32"}, constants, 4 if plain else 8
        yield decode.decode_pages, types | {"keys": "*bf16", "values": "*bf16"}, shared, 8
        mass = {"norm": "*fp32", "received": "*fp32", "frequencies": "*fp32"}
        del constants["V"]
        constants["PARTS"] = 1
        yield attention.mass_of_pages, types | mass, constants, 4 if plain else 8
    elif name == "exact":
        types = {
            "tail": RUN,
            "sinks": RUN,
            "out": "*fp32",
            "lse": "*fp32",
            "scale": "fp32",
            "softcap": "fp32",
        }
        constants = {
            "K": DENSE,
            "V": DENSE,
            "M": 16,
            "N": 32,
            "EACH": 128,
            "DTYPE": tl.bfloat16,
            "CAPPED": False,
        }
        runs = {("tail", 3): None, ("sinks", 3): None}
        yield attention.attend_exact, types, constants | runs, 4
        types = {n: "*fp32" for n in ("outs", "lses", "out", "lse")}
        yield attention.combine, types, {"WIDTH": W, "BLOCK": W, "RUNS": 32}, 4
        types = {n: "*bf16" for n in ("key", "value", "keys", "values")} | {"count": "*i32"}
        for ring in (False, True):
            yield append.append_token, types, {"D": W, "E": W, "BLOCK": W, "RING": ring}, 4
    elif name == "encode":
        types = {"x": "*bf16", "codes": "*i32", "scale": "*fp16", "zero": "*fp16", "scratch": "*u8",
                 "signs": "*i8", "heads_of": "*i32", "matrix": "*fp32"}  # fmt: skip
        grid = packed(bits=3, per_token=False, group=64, zero=Home("tile", 0))
        yield quantize.encode_pages, types, {"S": grid, "KEYS": True, "BLOCK": W}, 8
        wide = Spec("uniform", 256, 256, bits=4, words=1024, group=256, zero=Home("tile", 0))
        yield quantize.encode_pages, types, {"S": wide, "KEYS": True, "BLOCK": 256}, 8
        plain = {"signs": None, "heads_of": None, "matrix": None}
        grid = packed(bits=4, group=W)
        yield quantize.encode_pages, types, {**plain, "S": grid, "KEYS": False, "BLOCK": W}, 8
    elif name == "centroids":
        types = {n: "*fp32" for n in ("slots", "rows", "mass", "out")}
        types |= {"at": "*i64", "log_ema": "fp32"}
        for ema in (False, True):
            constants = {"COLUMNS": 2 * W + 1, "EMA": ema, "BLOCK": W, "TOKENS": 16}
            yield centroids.join_centroids, types, constants, 4
    else:
        types = {"table": "*i64", "slabs": "*i32", "slots": "*i32", "out": "*i32"}
        spec = packed(bits=3)
        yield compact.move_codes, types, {"S": spec, "KEYS": False, "BLOCK": 512}, 4


def main(capability, names):
    for name in names:
        for kernel, types, constants, warps in kernels(name):
            at = {n: i for i, n in enumerate(kernel.arg_names)}
            held = {
                ((at[n],) if isinstance(n, str) else (at[n[0]], n[1])): x
                for n, x in constants.items()
            }
            signature = {
                n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names
            }
            made = triton.compile(
                ASTSource(kernel, signature, held), target=GPUTarget("cuda", capability, 32),
                options={"num_warps": warps, "num_stages": 2 if warps == 4 else 1},
            )  # fmt: skip
            print(kernel.__name__, name, made.metadata.shared, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
