"""Muon for the matrices: momentum, then the nearest orthogonal matrix as the update direction.

    K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.

Newton-Schulz with the quintic coefficients of that page. Deviation: matrices of one shape are
orthogonalised together, because on a CPU many small products are slower than one batched product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of each matrix [N, R, C] towards one."""
    a, b, c = QUINTIC
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised; decoupled weight decay."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for same_shape in _by_shape(group["params"]):
                self._update(same_shape, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, params: list[Tensor], lr: float, momentum: float, decay: float) -> None:
        directions = []
        for p in params:
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            assert p.grad is not None
            average = state["momentum"].mul_(momentum).add_(p.grad)
            directions.append(p.grad.add(average, alpha=momentum))
        rows, columns = params[0].shape
        step = -lr * max(1.0, rows / columns) ** 0.5
        for p, update in zip(params, orthogonalize(torch.stack(directions)), strict=True):
            p.mul_(1 - lr * decay).add_(update, alpha=step)


def _by_shape(params: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    groups: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for p in params:
        if p.grad is not None:
            groups[p.shape].append(p)
    return groups.values()
