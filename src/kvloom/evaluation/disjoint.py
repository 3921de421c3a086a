"""Texts that were calibrated on are not evaluated on.

A calibration keeps a hash of every block of 64 tokens that it read. A text that has one of them at any
place is refused: two texts that share 127 tokens in a row share a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from kvloom.core.recipe import Recipe
from kvloom.evaluation.subjects import Subject, files
from kvloom.formats._calibration import Calibration

BLOCK = 64  # tokens
_WIDTH = 8  # bytes of a token, and of a hash


def blocks(ids: Tensor) -> Tensor:
    """Hashes of the whole blocks of `ids` (any shape, read in order), int64 `[n]`."""
    return torch.tensor(_hashes(ids, BLOCK), dtype=torch.int64)


def check(subject: Subject, name: str, texts: Sequence[Tensor]) -> None:
    """Raise ValueError if the subject was calibrated on a part of `texts`, token ids of text `name`."""
    if not isinstance(subject, Recipe):
        return
    for path in files(subject):
        calibration = Calibration.load(path)
        known = set(calibration.text_blocks.tolist())
        shared = sum(h in known for ids in texts for h in _hashes(ids, 1))
        if shared:
            raise ValueError(
                f"text {name!r} cannot judge recipe '{subject}': {shared} stretches of {BLOCK} of its "
                f"tokens are in the text that {path!r} was calibrated on "
                f"({calibration.facts.get('text', 'unnamed')!r}); take another text for one of them"
            )


def _hashes(ids: Tensor, step: int) -> list[int]:
    """Hashes of the blocks that begin at multiples of `step`."""
    raw = b"".join(n.to_bytes(_WIDTH, "little", signed=True) for n in ids.flatten().tolist())
    starts = range(0, len(raw) - BLOCK * _WIDTH + 1, step * _WIDTH)
    return [_hash(raw[i : i + BLOCK * _WIDTH]) for i in starts]


def _hash(raw: bytes) -> int:
    return int.from_bytes(hashlib.sha256(raw).digest()[:_WIDTH], "little", signed=True)
