"""Streaming KVQuant (EvelynHung-79/RealTime-KV-cache-Compression): scales that follow the stream.

    a_c = max |x_c| over a chunk;  outlier_c = a_c > relative * e_c  or  a_c > absolute;
    e_c <- decay * e_c + (1 - decay) * a_c;  q = round(x / s), s = e_c / (2^(b-1) - 1)

KVQuant's axes (arXiv:2401.18079: keys before rotation) and no calibration; chunks are quantized once.

Deviations: the current forward sees itself exactly, then its full pages of 64 form chunks, so that one
has the pages of one forward at most, and a page sealed while decoding is a chunk. Statistics are of one
(row, KV head), padding in none. Sinks stay exact, not 8-bit. An outlier channel's plane is scaled by its
own absmax: e, which has only begun to rise, would clip a = 3 e at 0.4 a. Other rising channels are clipped
by up to that much, as moving scales are: at 8 bits that is nearly all of the error, and `clip=False`,
ours, takes the larger of e and a.

`rope="pair"` stores keys after rotation; both channels of a rotary pair get the scale of its radius,
max sqrt(x_i^2 + x_j^2), which turning leaves alone. r^2 <= a_i^2 + a_j^2, so that the pair's squared
error at most doubles: half a bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvloom.core.format import PAGE, Encoded, Layout, PageBatch, PageFormat, Place, Stored
from kvloom.formats import _streaming, _streaming_pages
from kvloom.formats._streaming_codes import EXACT, Channels
from kvloom.kernels.packed import Parts


@dataclass(frozen=True)
class StreamingKVQuant(PageFormat):
    """Symmetric scales from a moving absmax per channel; sinks and outlier channels protected.

    Attributes:
        key_bits: `key_bits_normal`. value_bits: `value_bits_normal`; 16: that part stays exact.
        key_outlier_bits: `key_bits_sink_outlier`, a byte each up to 8; 16: fp16.
        value_outlier_bits: `value_bits_sink_outlier`.
        chunk: `chunk_size`, tokens that share scales at most, a multiple of 64.
        decay: `ema_decay`. sinks: `attention_sink_size`, the first tokens of a row stay exact.
        relative: `outlier_threshold_relative`. absolute: `outlier_threshold_abs`.
        detect: `outlier_detection_enabled`.
        room: channels that a tile of 32 tokens may have as outliers; farther above their threshold
            goes first, the rest is stored like other channels.
        key_per_channel: `key_quant_per_channel`; False: a head's key channels share a scale.
        value_groups: `value_quant_groups`, each with the largest e of its non-outliers; 0: no groups.
        rope: keys are stored before rotation (`"pre"`, `quantize_pre_rope`) or after it (`"post"`); or
            after it with scales shared by rotary pairs (`"pair"`).
        mixed_precision: `enable_mixed_precision_cache`; False protects neither sinks nor outliers.
        adaptive: `adaptive_chunk_size`; a chunk ends before a page with a channel above `relative`
            times its absmax in the chunk so far, so that the new level has scales of its own.
        reset: `stat_reset_interval` if `periodic_stat_reset`: every so many chunks e starts over
            with that chunk's absmax; 0: never.
        clip: scales are made of e, as published; False: of the larger of e and a.
    """

    key_bits: int = 4
    value_bits: int = 4
    key_outlier_bits: int = 8
    value_outlier_bits: int = 8
    chunk: int = 512
    decay: float = 0.9
    sinks: int = 4
    relative: float = 3.0
    absolute: float | None = None
    detect: bool = True
    room: int = 4
    key_per_channel: bool = True
    value_groups: int = 0
    rope: str = "pre"
    mixed_precision: bool = True
    adaptive: bool = False
    reset: int = 0
    clip: bool = True
    movable = False

    def __post_init__(self) -> None:
        _streaming.check_parameters(self)

    @property
    def pre_rope(self) -> bool:
        return self.rope == "pre" and self.key_bits < EXACT

    @property
    def pinned(self) -> int:
        return self.sinks if self.mixed_precision else 0

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"rope"} if self.rope == "pair" else ())

    @property
    def _parts(self) -> tuple[Channels, Channels]:
        room = self.room if self.detect and self.mixed_precision else 0
        groups = (0 if self.key_per_channel else 1), self.value_groups
        keys = Channels("key", self.key_bits, groups[0], room, self.key_outlier_bits)
        return keys, Channels("value", self.value_bits, groups[1], room, self.value_outlier_bits)

    def layout(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> Layout:
        return _streaming_pages.layout(self._parts, (key_dim, value_dim), dtype)

    def tables(self, place: Place, device: torch.device) -> dict[str, Tensor]:
        return _streaming.partners(place, device) if self.rope == "pair" else {}

    def encode(self, batch: PageBatch, statistics: dict[str, Tensor]) -> Encoded:
        most = self.chunk // PAGE, self.adaptive, self.decay, self.reset
        rule = _streaming.Rule(*most, self.relative, self.absolute, self.clip)
        return _streaming_pages.encode(self._parts, rule, batch, statistics)

    def packed(self, key_dim: int, value_dim: int) -> Parts:
        return _streaming_pages.packed(self._parts, (key_dim, value_dim))

    def outlier_counts(self, stored: Stored) -> Tensor | None:
        return _streaming_pages.outlier_counts(self._parts, stored)

    def decode(self, stored: Stored, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return _streaming_pages.decode(self._parts, stored, dtype)
