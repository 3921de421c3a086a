"""When to compress, and how far: independent of the scorer.

The parameters and the three rules are those of lazy pruning and soft eviction for StreamingLLM
(hopecommon/CS3602: paper, first code, final code), here usable with every scorer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvloom.core.policy import Policy, check


@dataclass(frozen=True)
class Lazy(Policy):
    """Compress every R tokens, down to the capacity C plus what slack and max_drop leave.

    With L entries, R = `every`, s = `slack`, d = `max_drop` (0: no limit), a head is compressed

    - `rule="seed"` (default): when L - C >= R, to clamp(L - d, C, C + s);
    - `rule="paper"`: at tokens t with t mod R = 0 when L > C + s, by min(L - C, d). With d < R the
      published rule grows without bound, so it is refused unless `unbounded=True`;
    - `rule="final"`: when L - C >= R and at least R tokens after the last time, to
      clamp(L - d, C, C + s) if C + s - (R - 1) allows it, else to C (soft eviction is inert unless
      s >= R - 1, as in the authors' final code).

    R = 1 is strict, R = 0 never compresses. A head never holds more than `peak` entries after a
    commit.

    Attributes:
        every: R, tokens. slack: s, entries. max_drop: d, entries. rule: see above.
        unbounded: allow the paper's rule where it grows.
    """

    kind: ClassVar[str] = "schedule"

    every: int = 1
    slack: int = 0
    max_drop: int = 0
    rule: str = "seed"
    unbounded: bool = False

    def __post_init__(self) -> None:
        for name in ("every", "slack", "max_drop"):
            value = getattr(self, name)
            check(self, type(value) is int and value >= 0, f"{name} must be an int >= 0")
        check(self, self.rule in ("seed", "paper", "final"), "rule is 'seed', 'paper' or 'final'")
        grows = self.rule == "paper" and 0 < self.max_drop < self.every
        check(
            self,
            self.unbounded or not grows,
            f"the paper's rule drops at most {self.max_drop} entries every {self.every} tokens "
            "and so grows without bound; raise max_drop or say unbounded=True",
        )

    @property
    def bounded(self) -> bool:
        return self.every > 0 and not (self.rule == "paper" and 0 < self.max_drop < self.every)

    def peak(self, capacity: Tensor) -> Tensor:
        """The most entries that a head holds: max(C + R, C + s + 1), for the paper's rule C + s + R
        (a head within its slack at one boundary waits for the next).
        """
        if self.rule == "paper":
            return capacity + self.slack + self.every
        return capacity + max(self.every, self.slack + 1)

    def target(
        self,
        length: Tensor,
        capacity: Tensor,
        seen: Tensor,
        new: Tensor,
        since: Tensor,
        cells: int = 1,
    ) -> Tensor:
        """Entries to keep, host int64 `[B, H]`; equal to `length` where nothing is due.

        Args:
            length: entries that each head holds now, new ones included. capacity: C per head.
            seen: valid tokens of each row so far, new: those of this forward, host int64 `[B, 1]`.
            since: tokens after each head's last compression.
            cells: how many heads a length and a capacity are the sum of.
        """
        if self.every == 0:
            return length
        if cells == 1 and self == STRICT:
            return torch.minimum(length, capacity)
        over, slack = length - capacity, self.slack * cells
        drop = self.max_drop * cells if self.max_drop > 0 else torch.iinfo(torch.int64).max // 2
        if self.rule == "paper":
            boundaries = seen // self.every - (seen - new) // self.every
            due = (over > slack) & (boundaries > 0)
            goal = length - torch.minimum(over, boundaries.clamp_max(1 << 20) * min(drop, 1 << 40))
            return torch.where(due, goal, length)
        due = (over >= self.every * cells) & (over > 0)
        goal = torch.minimum(length - drop, capacity + slack)
        if self.rule == "final":
            due = due & (since >= self.every)
            goal = torch.minimum(goal, capacity + slack - (self.every - 1) * cells)
        return torch.where(due, torch.maximum(goal, capacity), length)


STRICT = Lazy()
