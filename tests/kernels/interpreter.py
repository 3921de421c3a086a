"""Triton's interpreter as the tests need it: quicker, and rounding to bf16 as GPUs do.

At every call of a device function it patches the language again, which the launch has patched already, and
for every sum and product of whole numbers it looks for an overflow in 64 bits: that is half of its time. It
cuts numbers off where bf16 ends, and takes what is no fp32 for the bits of a bf16.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from triton import language as tl
from triton.runtime import interpreter

_BUILDER = interpreter.InterpreterBuilder
_CAST = _BUILDER.cast_impl


def prepare() -> None:
    """Leave out what costs time, and round."""
    interpreter.InterpretedFunction.__call__ = _call
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    _BUILDER.cast_impl = _cast


def _call(self, *args, **kwargs):
    ours = not self.fn.__module__.startswith("triton.")
    if not ours and tl.core.is_builtin(
        tl.core.reshape
    ):  # the language's own functions use its core
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def _cast(self, source, target):
    of, to = source.dtype.scalar, target.scalar
    if tl.bfloat16 not in (of, to) or of == to:
        return _CAST(self, source, target)
    x = source.data
    if of == tl.bfloat16:
        x = (x.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(x.astype(interpreter._get_np_dtype(target)), to)
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # halves to even
    return interpreter.TensorHandle(nearest.astype(np.uint16).reshape(x.shape), to)
