"""Triton's interpreter, made quicker for tests: what it computes stays the same.

At every call of a device function it patches the language again, which the launch has patched already, and
for every sum and product of whole numbers it looks for an overflow in 64 bits: that is half of its time.
"""

from __future__ import annotations

from dataclasses import replace

from triton.language import core
from triton.runtime import interpreter


def hurry() -> None:
    """Leave both out."""
    interpreter.InterpretedFunction.__call__ = _call
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


def _call(self, *args, **kwargs):
    ours = not self.fn.__module__.startswith("triton.")
    if not ours and core.is_builtin(core.reshape):  # the language's own functions use its core
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)
