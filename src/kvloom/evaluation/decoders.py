"""How a document is fed to a model: through a compressed cache, or by recomputing a window.

Every forward is timed: from before the call to after the cache's commit and a synchronisation of the
device.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kvloom.core.budget import Budget
from kvloom.evaluation.recompute import Recompute
from kvloom.evaluation.results import Counts
from kvloom.evaluation.subjects import Subject
from kvloom.hf import load
from kvloom.hf.cache import CompressedCache
from kvloom.hf.layer import CompressedLayer
from kvloom.hf.stats import unique_nbytes


class Decoder(Protocol):
    """Takes a document's tokens in order, each once.

    Attributes:
        seconds: how long the last `feed` took.
    """

    seconds: float

    def feed(self, ids: Tensor, keep: int = 1) -> Tensor:
        """Take tokens `[n]`; logits `[keep, V]` of the last ones, on the model's device."""
        ...

    def entries(self) -> float:
        """Entries kept per KV head, mean over layers and heads."""
        ...

    def nbytes(self) -> int:
        """Bytes of the cache now."""
        ...

    def other_nbytes(self) -> int:
        """Bytes in it of layers that kvloom does not compress."""
        ...


class WatchedCache(CompressedCache):
    """Notes the most bytes that it holds within a forward, if told to: that takes time.

    Attributes:
        watched: whether to. most: bytes, tokens on their way into a layer included.
    """

    watched, most = False, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """See `CompressedCache`; a layer holds most when it has its tokens and compresses next: within
        the call where it hands out dense tensors, else after it.
        """
        if self.watched:
            arriving = key_states.nbytes + value_states.nbytes
            self.most = max(self.most, self.nbytes + arriving)
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self.watched:
            self.most = max(self.most, self.nbytes)
        return result


class CacheDecoder:
    """Feeds through a `CompressedCache`."""

    def __init__(self, model: Any, cache: WatchedCache):
        self.model, self.cache, self.seconds = model, cache, 0.0

    def feed(self, ids: Tensor, keep: int = 1) -> Tensor:
        """See `Decoder`."""
        ids = ids.to(self.model.device)[None]
        synchronize(self.model.device)
        start = time.perf_counter()
        logits = load.forward(self.model, ids, self.cache, keep)
        synchronize(self.model.device)
        self.seconds = time.perf_counter() - start
        return logits

    def entries(self) -> float:
        """See `Decoder`."""
        stored = [layer.store.stored for layer in self.cache.compressed if layer.store is not None]
        return float(torch.stack([s.double().mean() for s in stored]).mean()) if stored else 0.0

    def nbytes(self) -> int:
        """See `Decoder`."""
        return self.cache.nbytes

    def other_nbytes(self) -> int:
        """See `Decoder`."""
        return unique_nbytes(x for x in self.cache.layers if not isinstance(x, CompressedLayer))

    def feed_watched(self, ids: Tensor, keep: int) -> tuple[Tensor, int]:
        """`feed`, and the most bytes that the cache held meanwhile."""
        self.cache.watched, self.cache.most = True, 0
        logits = self.feed(ids, keep)
        self.cache.watched = False
        return logits, max(self.cache.most, self.cache.nbytes)


class WindowDecoder:
    """No cache: every token forwards the last `window` tokens, at positions 0 .. window-1."""

    def __init__(self, model: Any, window: int):
        self.model, self.window, self.seconds = model, window, 0.0
        self.history = torch.empty(0, dtype=torch.int64)

    def skip(self, ids: Tensor) -> None:
        """Take tokens `[n]` without a forward."""
        self.history = torch.cat([self.history, ids])[-self.window :]

    def feed(self, ids: Tensor, keep: int = 1) -> Tensor:
        """See `Decoder`; `keep` beyond 1 gives logits of a shorter context than the window."""
        self.skip(ids)
        window = self.history.to(self.model.device)[None]
        synchronize(self.model.device)
        start = time.perf_counter()
        logits = load.forward(self.model, window, None, keep)
        synchronize(self.model.device)
        self.seconds = time.perf_counter() - start
        return logits

    def entries(self) -> float:
        """See `Decoder`."""
        return float(len(self.history))

    def nbytes(self) -> int:
        """Nothing is kept between tokens but their ids."""
        return 0

    def other_nbytes(self) -> int:
        """See `nbytes`."""
        return 0


def decoder_for(model: Any, subject: Subject, budget: Budget | None) -> Decoder:
    """A fresh decoder. Raises ValueError if recipe, budget and model do not fit together."""
    if isinstance(subject, Recompute):
        if budget is not None:
            raise ValueError(
                f"budget {str(budget)!r} with {subject}: it keeps no cache; leave the budget out"
            )
        return WindowDecoder(model, subject.window)
    return CacheDecoder(model, WatchedCache(model, subject, budget))


def feed_prompt(decoder: Decoder, ids: Tensor, chunk: int = 0) -> Tensor:
    """Feed a prompt `[n]` at once, or `chunk` tokens at a time; logits `[1, V]` of its last token.

    `decoder.seconds` is then of all of it. A window is recomputed once, however long the prompt.
    """
    if isinstance(decoder, WindowDecoder):
        return decoder.feed(ids)
    taken = 0.0
    for part in ids.split(chunk or len(ids)):
        logits = decoder.feed(part)
        taken += decoder.seconds
    decoder.seconds = taken
    return logits


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def forget_device_peak(device: torch.device) -> None:
    """`device_peak` counts from here, where the device keeps count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def device_peak(device: torch.device) -> int | None:
    """The most bytes that torch had allocated on a device; None on the CPU.

    CUDA tells the peak; MPS only what it holds now, which it is slow to give back.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(torch.mps.driver_allocated_memory()) if device.type == "mps" else None


@dataclass(frozen=True)
class Final:
    """What the end of a document tells, in bytes (see `Bytes`), and the counts."""

    nbytes: int = 0
    by_part: dict[str, int] = field(default_factory=dict)
    dense: int = 0
    dtype_dense: int = 0
    floor: int = 0
    slack: int = 0
    key_bits: float = 0.0
    value_bits: float = 0.0
    counts: Counts = field(default_factory=Counts)


def final(decoder: Decoder) -> Final:
    """The figures of a decoder's cache now; all zero where there is none."""
    if not isinstance(decoder, CacheDecoder):
        return Final()
    stats = decoder.cache.stats()
    held = max(1, stats.nbytes - stats.by_part.get("other layers", 0))
    return Final(
        nbytes=stats.nbytes,
        by_part=stats.by_part,
        dense=stats.dense_nbytes,
        dtype_dense=round(stats.dtype_ratio * held),
        floor=decoder.cache.floor(),
        slack=stats.slack,
        key_bits=stats.avg_key_bits,
        value_bits=stats.avg_value_bits,
        counts=Counts(
            stats.compressions, stats.evicted, stats.merged, stats.sealed, stats.compactions
        ),
    )
