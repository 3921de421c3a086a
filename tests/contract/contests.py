"""Selections that rounding decides: scores at the border that differ by fp32 noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from kvloom.core import compress
from tests.oracle.shadow import NOISE


@contextmanager
def contests() -> Iterator[list[bool]]:
    """Takes down, for every selection made meanwhile, whether some entry is worth as much as the last one
    that stays, up to noise. Equal scores are no contest: age decides.
    """
    found: list[bool] = []
    chosen = compress.select

    def select(scores, entries, target):
        found.append(_contested(scores, target))
        return chosen(scores, entries, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "select", select)
        yield found


def _contested(scores, target) -> bool:
    ranked = scores.sort(-1, descending=True).values
    last = ranked.gather(-1, (target[..., None] - 1).clamp(0, ranked.shape[-1] - 1))
    gap = (ranked - last).abs()
    close = (gap > 0) & (gap < NOISE * last.abs())
    return bool((close & torch.isfinite(last)).any())
