"""Values that make the kept entries of a group answer its remembered queries as all of them did."""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.core.block import from_newest
from kvloom.core.merge import Group
from kvloom.policies.merge._counts import finest

_BLOCK_ELEMENTS = 1 << 22  # attention weights held at once: 32 MiB in fp64


def refitted(group: Group, ridge: float) -> Tensor:
    """`group.values [B, H, S, E]` with the least-squares change of what is open.

    The group's memory has `queries [B, H, G, n, D]`, newest last, and `held [B]`, how many of them
    there are. The r-th newest query sees none of the r - 1 newest entries.
    """
    queries, held = group.memory["queries"], group.memory["held"]
    B, H, G, n, _ = queries.shape
    S, T = group.values.shape[2], G * n
    rank = torch.arange(n, 0, -1, device=queries.device)
    there = (rank <= held[:, None]).repeat(1, G)[:, None].expand(B, H, T)
    fields = (
        queries.flatten(2, 3), there, group.keys, group.values, group.lost, group.kept, group.open
    )  # fmt: skip
    cells = [x.flatten(0, 1) for x in fields]
    step = max(1, _BLOCK_ELEMENTS // max(1, S * T))
    parts = zip(*(x.split(step) for x in cells), strict=True)
    changed = [_solve(group, rank.repeat(G), ridge, *part) for part in parts]
    return torch.cat(changed).view_as(group.values)


def _solve(
    group: Group, rank: Tensor, ridge: float, queries: Tensor, there: Tensor, keys: Tensor,
    values: Tensor, lost: Tensor, kept: Tensor, open_: Tensor,
) -> Tensor:  # fmt: skip
    """For cells `[N, ...]`, each a KV head of a row: T queries, S entries; values `[N, S, E]`."""
    logits = queries.float() @ keys.transpose(1, 2) * group.scale
    if group.softcap is not None:
        logits = group.softcap * torch.tanh(logits / group.softcap)
    newer = from_newest((lost | kept)[None])[0]
    seen = there[..., None] & (newer[:, None] >= rank[:, None])
    before = _attention(logits, seen & (lost | kept)[:, None])
    after = _attention(logits, seen & kept[:, None])
    exact = values.to(finest(values.device))
    left = before @ exact - after @ exact
    free = after * open_[:, None]
    return (exact + _ridge(free, left, ridge)).float()


def _attention(logits: Tensor, seen: Tensor) -> Tensor:
    """Softmax over what is seen, fp64; 0 throughout where nothing is, which is then no equation."""
    return (
        logits.to(finest(logits.device))
        .masked_fill(~seen, float("-inf"))
        .softmax(-1)
        .nan_to_num(0.0)
    )


def _ridge(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """argmin_d ||y - x d||^2 + ridge ||d||^2 for `x [N, T, S]`, `y [N, T, E]`, in fp64."""
    dual = x.shape[1] < x.shape[2]
    gram = x @ x.mT if dual else x.mT @ x
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
    factor, _ = torch.linalg.cholesky_ex(gram)  # definite, and the device is not waited for
    if dual:
        return x.mT @ torch.cholesky_solve(y, factor)
    return torch.cholesky_solve(x.mT @ y, factor)
