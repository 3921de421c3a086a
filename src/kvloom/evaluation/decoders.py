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
from kvloom.evaluation.results import Counts
from kvloom.evaluation.subjects import Recompute, Subject
from kvloom.hf import load
from kvloom.hf.cache import CompressedCache


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


class CacheDecoder:
    """Feeds through a `CompressedCache`."""

    def __init__(self, model: Any, cache: CompressedCache):
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


def decoder_for(model: Any, subject: Subject, budget: Budget | None) -> Decoder:
    """A fresh decoder. Raises ValueError if recipe, budget and model do not fit together."""
    if isinstance(subject, Recompute):
        if budget is not None:
            raise ValueError(
                f"budget {str(budget)!r} with {subject}: it keeps no cache; leave the budget out"
            )
        return WindowDecoder(model, subject.window)
    return CacheDecoder(model, CompressedCache(model, subject, budget))


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


class DevicePeak:
    """The most bytes that torch had allocated on a device since construction; None on the CPU.

    CUDA tells the peak; of MPS only the present amount is known, so `note` samples it.
    """

    def __init__(self, device: torch.device):
        self.device, self.sampled = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def note(self) -> None:
        """Sample, where the device knows no peak."""
        if self.device.type == "mps":
            self.sampled = max(self.sampled, torch.mps.driver_allocated_memory())

    def value(self) -> int | None:
        """Bytes, or None where it is not known."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return self.sampled if self.device.type == "mps" else None


@dataclass(frozen=True)
class Final:
    """What the end of a document tells, in bytes (see `Bytes`), and the counts."""

    nbytes: int = 0
    by_part: dict[str, int] = field(default_factory=dict)
    dense: int = 0
    dtype_dense: int = 0
    floor: int = 0
    slack: int = 0
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
        counts=Counts(
            stats.compressions, stats.evicted, stats.merged, stats.sealed, stats.compactions
        ),
    )
