"""Streaming KVQuant in naive loops, for one (row, head) and one of keys or values.

Written from SYSTEMS.md's algorithm: chunks, absmax per channel, detection before the update, moving
absmax, symmetric rounding. Numbers are fp32 where the format computes in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

F = np.float32


def half(x) -> np.float32:
    return F(np.float16(x))


def scale_of(peak, bits: int) -> np.float32:
    s = F(peak) / F(2 ** (bits - 1) - 1)
    return half(min(max(s, F(1e-7)), F(65504)))


def quantized(x, s, bits: int) -> np.float32:
    """One number through the grid."""
    q = round(float(F(x) / s))  # ties to even, as torch
    return F(min(max(q, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)) * s


@dataclass
class Stream:
    """State and rules of one stream of pages `[64, W]`."""

    bits: int = 4
    outlier_bits: int = 8
    chunk: int = 512
    decay: float = 0.9
    relative: float = 3.0
    absolute: float | None = None
    detect: bool = True
    room: int = 4
    groups: int = 0
    reset: int = 0
    clip: bool = True
    e: list = field(default_factory=list)
    updates: int = 0
    found: list = field(default_factory=list)  # outlier channels of each chunk

    def chunks(self, pages: np.ndarray) -> list[np.ndarray]:
        n = self.chunk // 64
        return [np.concatenate(pages[i : i + n]) for i in range(0, len(pages), n)]

    def seal(self, pages: np.ndarray) -> np.ndarray:
        """What the pages `[N, 64, W]` of one call read back as, `[N * 64, W]`."""
        return np.concatenate([self.read(tokens) for tokens in self.chunks(pages)])

    def read(self, tokens: np.ndarray) -> np.ndarray:
        width = tokens.shape[1]
        a = [max(F(abs(x)) for x in tokens[:, c]) for c in range(width)]
        fresh = self.updates % self.reset == 0 if self.reset else self.updates == 0
        before = list(a) if fresh else self.e
        outliers = self.outliers(a, before)
        self.e = [F(self.decay) * before[c] + F(1 - self.decay) * a[c] for c in range(width)]
        self.updates += 1
        self.found.append(sorted(outliers))
        peak = self.e if self.clip else [max(self.e[c], a[c]) for c in range(width)]
        out = np.zeros_like(tokens)
        for c in range(width):
            if c in outliers and self.outlier_bits == 16:
                out[:, c] = [half(x) for x in tokens[:, c]]
                continue
            bits = self.outlier_bits if c in outliers else self.bits
            s = scale_of(a[c] if c in outliers else self.shared(peak, c, outliers), bits)
            out[:, c] = [quantized(x, s, bits) for x in tokens[:, c]]
        return out

    def outliers(self, a: list, before: list) -> list[int]:
        """The channels above their threshold, at most `room`: those farthest above it."""
        if not self.detect:
            return []
        over = {}
        for c in range(len(a)):
            if a[c] > F(self.relative) * before[c]:
                with np.errstate(divide="ignore"):
                    over[c] = a[c] / (F(self.relative) * before[c])
            if self.absolute is not None and a[c] > F(self.absolute):
                over[c] = max(over.get(c, F(0)), a[c] / F(self.absolute))
        return sorted(over, key=lambda c: (-over[c], c))[: self.room]

    def shared(self, peak: list, c: int, outliers: list[int]) -> np.float32:
        """The absmax that channel c has its scale from."""
        if not self.groups:
            return peak[c]
        size = len(peak) // self.groups
        first = c // size * size
        others = [peak[i] for i in range(first, first + size) if i not in outliers]
        return max(others, default=F(0))
