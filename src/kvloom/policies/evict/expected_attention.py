"""Expected Attention: what future queries will attend to (Devoto et al., arXiv:2510.00636).

    q ~ N(mu, Sigma) before rotation,   R = mean rotation to the next n positions
    z_j = s k_j . R mu + s^2 / 2  k_j^T R Sigma R^T k_j,    score_j = (softmax(z)_j + eps) |v_j|

exp(z_j) is the expectation of exp(s q . k_j) over Gaussian queries; s scales the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvloom.core.entries import Entries
from kvloom.core.policy import Queries, Scorer, check


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """Expected attention weight times the value's norm, averaged over the query group.

    Attributes:
        n_future: positions ahead over which the rotation is averaged.
        sinks: first tokens pinned, and left out of the statistics (their queries are outliers).
        covariance: use Sigma (fp32 [D, D] per query head, counted in the budget), else mu only.
        value_norm: weigh by |v_j|. epsilon: added to the softmax before; 0.02 with `ada`.
        half_life: forget queries with this half-life in tokens; None: all since the start count.
        recent_fraction: share of the budget that is a recent window (paper: none).

    Deviations: mean and covariance come from the queries themselves, not from hidden states and
    W_q, so query norms (Qwen3, Gemma) are included; they are updated by every forward, and chunks
    merge exactly (Chan et al.). The softmax leaves out the pinned sinks. A softcap is ignored.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"pre_rope_queries", "keys", "values"})
    scores_attention: ClassVar[bool] = True

    n_future: int = 512
    sinks: int = 4
    covariance: bool = True
    value_norm: bool = True
    epsilon: float = 0.0
    half_life: int | None = None
    recent_fraction: float = 0.0

    def __post_init__(self) -> None:
        check(self, type(self.n_future) is int and self.n_future >= 1, "n_future: an int >= 1")
        check(self, type(self.sinks) is int and self.sinks >= 0, "sinks must be an int >= 0")
        for name in ("covariance", "value_norm"):
            check(self, type(getattr(self, name)) is bool, f"{name} must be True or False")
        number = type(self.epsilon) in (int, float) and 0 <= self.epsilon < float("inf")
        check(self, number, "epsilon must be a number >= 0")
        half = self.half_life is None or (type(self.half_life) is int and self.half_life >= 1)
        check(self, half, "half_life must be an int >= 1, or None")
        sound = type(self.recent_fraction) in (int, float) and 0 <= self.recent_fraction <= 1
        check(self, sound, "recent_fraction must be within 0..1")

    @property
    def pinned(self) -> int:
        return self.sinks

    def protected(self, capacity: Tensor) -> Tensor:
        return (capacity.double() * self.recent_fraction).long()

    def remember(self, memory: dict[str, Tensor], queries: Queries) -> dict[str, Tensor]:
        states, valid = queries.states, queries.valid
        B, H, G, _, D = states.shape
        if not memory:
            count = torch.zeros(B, dtype=torch.int64, device=states.device)
            mean = states.new_zeros(B, H, G, D)
            memory = {"seen": count, "next": count, "weight": count.double(), "mean": mean}
            if self.covariance:
                memory["covariance"] = states.new_zeros(B, H, G, D, D)
        left = valid.sum(-1, keepdim=True) - valid.cumsum(-1)  # valid ones after this one
        counted = valid & (memory["seen"][:, None] + valid.cumsum(-1) > self.sinks)
        fade = 1.0 if self.half_life is None else 0.5 ** (1 / self.half_life)
        weight = counted * fade ** left.double()
        old = memory["weight"] * fade ** valid.sum(-1)
        after = torch.where(valid, queries.positions + 1, 0).amax(-1)
        new = {
            "seen": memory["seen"] + valid.sum(-1),
            "next": torch.maximum(memory["next"], after),
            "weight": old + weight.sum(-1),
        }
        total = new["weight"].clamp_min(torch.finfo(torch.float64).tiny)
        share = (weight.sum(-1) / total).float()[:, None, None, None]
        each = (weight / weight.sum(-1, keepdim=True).clamp_min(1e-300)).float()
        batch = torch.einsum("bhgqd,bq->bhgd", states, each)
        step = (batch - memory["mean"]) * (share > 0)
        new["mean"] = memory["mean"] + share * step
        if self.covariance:
            spread = (states - batch[..., None, :]) * each.sqrt()[:, None, None, :, None]
            inner = spread.transpose(-1, -2) @ spread
            between = step[..., None] * step[..., None, :] * (1 - share)[..., None]
            held = memory["covariance"] * (1 - share)[..., None]
            new["covariance"] = held + share[..., None] * (inner + between)
        return new

    def score(self, entries: Entries) -> Tensor:
        assert entries.rope is not None
        memory, keys, scale = entries.memory, entries.keys.float(), entries.scale
        start = memory["next"][:, None, None]
        mean = entries.rope.average(memory["mean"], start, self.n_future)
        logits = scale * torch.einsum("bhgd,bhsd->bhgs", mean, keys)
        if self.covariance:
            turned = memory["covariance"]
            for _ in range(2):  # R Sigma, then (R (R Sigma)^T)^T
                turned = entries.rope.average(turned, start[..., None], self.n_future).mT
            for g in range(turned.shape[2]):
                logits[:, :, g] += scale**2 / 2 * ((keys @ turned[:, :, g]) * keys).sum(-1)
        hidden = ~entries.valid[:, :, None]
        scores = logits.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0).mean(2)
        return (scores + self.epsilon) * (
            entries.values.float().norm(dim=-1) if self.value_norm else 1
        )
