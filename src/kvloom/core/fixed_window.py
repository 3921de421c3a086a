"""A sliding window in fixed memory: what `fixed` is for compressed layers, for those that keep a window.

The window is a ring: token p lies in slot p mod W, and a new one overwrites the one that leaves. Keys are
rotated already, so that their order does not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.core.attend import Call
from kvloom.core.block import take_slots
from kvloom.core.paged import exact
from kvloom.kernels import ops, triton_backend
from kvloom.kernels.triton_backend import Launch


class FixedWindow:
    """The newest `window` tokens of every row.

    Attributes:
        keys, values: `[B, H, window, W]`. count: int32 `[B * H]`, tokens so far.
    """

    def __init__(self, keys: Tensor, values: Tensor, window: int):
        """`keys`, `values [B, H, n, W]`: shapes, dtype and device. Raises ValueError if the kernels cannot
        serve them.
        """
        widest = max(keys.shape[3], values.shape[3])
        reason = ops.triton_why_not(keys.device, keys.dtype, widest)
        if reason is not None:
            raise ValueError(f"a window of {window} cannot slide in fixed memory: {reason}")
        self.keys, self.values = (
            x.new_zeros(*x.shape[:2], window, x.shape[3]) for x in (keys, values)
        )
        self.count = torch.zeros(
            keys.shape[0] * keys.shape[1], dtype=torch.int32, device=keys.device
        )

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values, self.count]

    def refresh(self, keys: Tensor, values: Tensor, seen: int) -> None:
        """Hold the last tokens `keys`, `values [B, H, n, W]` of `seen`, in place."""
        n = min(keys.shape[2], self.keys.shape[2])
        at = self._slots(seen - n, n)
        for mine, x in ((self.keys, keys), (self.values, values)):
            mine.index_copy_(2, at, x[:, :, x.shape[2] - n :])
        self.count.fill_(seen)

    def newest(self, start: int, n: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens `start .. start + n`, as many of them as there are, in order."""
        held = min(n, self.keys.shape[2])
        at = self._slots(start + n - held, held).expand(*self.keys.shape[:2], -1)
        return take_slots(self.keys, at), take_slots(self.values, at)

    def _slots(self, start: int, n: int) -> Tensor:
        at = torch.arange(start, start + n, device=self.keys.device)
        return at % self.keys.shape[2]

    def step(self, call: Call, key: Tensor, value: Tensor) -> Tensor:
        """See `FixedLayer.step`."""
        return _step(call, key, value, *self.tensors())


def _step(
    call: Call, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, count: Tensor
) -> Tensor:
    cells, (B, H, G, Q, _) = count.shape[0], call.query.shape
    key, value = (x.reshape(cells, -1).contiguous() for x in (key, value))
    triton_backend.append(key, value, keys, values, count, ring=True)
    run = exact(call.query, keys, values, keys.shape[2], count=count)
    launch = Launch(
        cells, H, G * Q, values.shape[3], keys.dtype, keys.device, call.scale, call.softcap, run.runs
    )  # fmt: skip
    launch.exact(run, None, 0)
    out, lse = launch.combined()
    part = out.view(B, H, G, Q, -1), lse.view(B, H, G, Q)
    return part[0] if call.sink_logits is None else ops.combine([part], call.sink_logits)[0]


@torch.library.custom_op("kvloom::fixed_window_step", mutates_args=("keys", "values", "count"))
def fixed_window_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor | None,
    keys: Tensor,
    values: Tensor,
    count: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """`FixedWindow.step` as torch.compile sees it."""
    return _step(Call(query, scale, softcap, sink_logits), key, value, keys, values, count)


@fixed_window_step.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor | None,
    keys: Tensor,
    values: Tensor,
    count: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1], dtype=torch.float32)
