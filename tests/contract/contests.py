"""Selections that rounding decides: scores at the border that differ by fp32 noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from kvloom.core import compress
from tests.oracle.shadow import NOISE


@contextmanager
def contests() -> Iterator[list[torch.Tensor]]:
    """Takes down, for every selection made meanwhile, in which rows some entry at the border between those that
    stay and those that go is worth as much as another up to noise: bool `[B]` each. Equal scores are no
    contest: age decides.
    """
    found: list[torch.Tensor] = []
    chosen = compress.select

    def select(scores, entries, target):
        found.append(_contested(scores, target))
        return chosen(scores, entries, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "select", select)
        yield found


def _contested(scores, target) -> torch.Tensor:
    S = scores.shape[-1]
    ranked, place = scores.sort(-1, descending=True).values, target[..., None]
    last, first = (ranked.gather(-1, (place - i).clamp(0, S - 1)) for i in (1, 0))
    noise = NOISE * last.abs()
    gap = (ranked - last).abs()
    decided = (place > 0) & (place < S) & (last - first < noise) & torch.isfinite(last)
    return (decided & (gap > 0) & (gap < noise)).flatten(1).any(1)
