"""Rotary position embedding (RoPE, arXiv:2104.09864) as an algebra: rotate, un-rotate, shift.

All arithmetic is fp32 and starts from the stored tensor, never from an earlier rotation of a
low-precision tensor (re-rotating bf16 keys step by step loses 5 % in 100 steps).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeSpec:
    """How a model rotates its queries and keys.

    Attributes:
        inv_freq: angular frequency per rotated pair, `[n_rot / 2]`, fp32.
        n_rot: how many leading channels are rotated (all of them, or a part: GPT-NeoX, Phi, GLM).
        pairing: `"half"` pairs channel i with i + n_rot / 2, `"interleaved"` pairs 2i with 2i + 1.
        scale: factor that the model puts on cos and sin (yarn's attention scaling), else 1.
    """

    inv_freq: Tensor
    n_rot: int
    pairing: str = "half"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.pairing not in ("half", "interleaved"):
            raise ValueError(f"pairing={self.pairing!r}: use 'half' or 'interleaved'")
        if self.inv_freq.numel() * 2 != self.n_rot:
            raise ValueError(
                f"{self.inv_freq.numel()} frequencies rotate {2 * self.inv_freq.numel()} channels, "
                f"not n_rot={self.n_rot}"
            )

    def __deepcopy__(self, memo: object) -> RopeSpec:
        return self  # immutable: copies of a cache share it

    def to(self, device: torch.device) -> RopeSpec:
        """The same with its frequencies on a device, so that no use has to copy them there and wait."""
        if self.inv_freq.device == device:
            return self
        return replace(self, inv_freq=self.inv_freq.to(device))

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `x [..., T, D]` to `positions [..., T]` and scale, as the model does; fp32."""
        return self._turn(x, positions, 1.0) * self._gain(x)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `rotate`: pre-RoPE keys from post-RoPE keys; fp32."""
        return self._turn(x, positions, -1.0) / self._gain(x)

    def shift(self, x: Tensor, by: Tensor) -> Tensor:
        """Move an already rotated `x [..., T, D]` by `by [..., T]` positions, without scaling; fp32."""
        return self._turn(x, by, 1.0)

    def average(self, x: Tensor, positions: Tensor, count: int) -> Tensor:
        """Mean of `rotate` over `positions`, `positions + 1`, .. (`count` of them); linear in x; fp32."""
        steps = torch.arange(count, device=positions.device)
        angle = self._angle(positions[..., None] + steps, x.device)
        return self._apply(x, angle.cos().mean(-2), angle.sin().mean(-2)) * self._gain(x)

    def _gain(self, x: Tensor) -> Tensor | float:
        if self.scale == 1.0:
            return 1.0
        gain = torch.ones(x.shape[-1], device=x.device)
        gain[: self.n_rot] = self.scale
        return gain

    def _angle(self, positions: Tensor, device: torch.device) -> Tensor:
        freq = self.inv_freq.to(device=device, dtype=torch.float32)
        return positions.to(torch.float32)[..., None] * freq

    def _turn(self, x: Tensor, positions: Tensor, sign: float) -> Tensor:
        angle = self._angle(positions, x.device)
        return self._apply(x, angle.cos(), angle.sin() * sign)

    def _apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Each pair of channels times the complex number `cos + i sin`."""
        x = x.float()
        turned, rest = x[..., : self.n_rot], x[..., self.n_rot :]
        if self.pairing == "half":
            a, b = turned.chunk(2, dim=-1)
            out = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        else:
            a, b = turned[..., 0::2], turned[..., 1::2]
            out = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        return torch.cat([out, rest], dim=-1) if rest.shape[-1] else out
