"""The definition of every attention op, in plain torch and fp32; never optimised.

Shapes: B rows, H KV heads, G query heads per KV head, Q queries, S entries, D key width, E value width.

A tier's partial result is `(out, lse)`: the attention output normalised within the tier, and the
log of its normaliser. Partials of disjoint tiers combine exactly, as in flash-decoding
(arXiv:2311.01282 section 3): `out = sum_i exp(lse_i - lse) out_i` with `lse = logsumexp_i lse_i`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scores(
    query: Tensor,
    keys: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention logits `[B, H, G, Q, S]` in fp32.

    The order is fixed: scale, softcap, plus `bias`, mask. `query` is `[B, H, G, Q, D]`, `keys`
    `[B, H, S, D]`, `bias` `[B, H, S]` (log mass; -inf for a dead slot), `mask` a bool tensor that
    broadcasts to `[B, H, Q, S]` (True: attend).
    """
    logits = torch.einsum("bhgqd,bhsd->bhgqs", query.float(), keys.float()) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.float()[:, :, None, None, :]
    if mask is not None:
        logits = logits.masked_fill(~mask.unsqueeze(-3), float("-inf"))
    return logits


def partial_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One tier's attention: `out [B, H, G, Q, E]` and `lse [B, H, G, Q]`, both fp32.

    `values` is `[B, H, S, E]`; the rest as in `scores`. A query that sees no entry gets
    `lse = -inf, out = 0`.
    """
    logits = scores(query, keys, scale=scale, softcap=softcap, bias=bias, mask=mask)
    if logits.shape[-1] == 0:
        shape = logits.shape[:-1]
        out = logits.new_zeros(*shape, values.shape[-1])
        return out, logits.new_full(shape, float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse.clamp_min(torch.finfo(torch.float32).min)[..., None])
    out = torch.einsum("bhgqs,bhse->bhgqe", weights, values.float())
    return out, lse


def combine(
    partials: list[tuple[Tensor, Tensor]], sink_logits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Combine partials of disjoint tiers into `(out, lse)`, exactly.

    `sink_logits` `[H, G]` is a model's learned attention sink (gpt_oss): it takes part in the
    normaliser once and carries no value. A query that sees nothing at all gets `out = 0`.
    """
    lses = torch.stack([lse for _, lse in partials])
    if sink_logits is not None:
        sink = sink_logits.float()[None, :, :, None].expand(lses.shape[1:])
        lses = torch.cat([lses, sink[None]])
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - lse.clamp_min(torch.finfo(torch.float32).min))
    out = sum(
        (w[..., None] * o.float() for w, (o, _) in zip(weights, partials, strict=False)),
        start=torch.zeros((), device=lse.device),
    )
    return out, lse


def join_centroids(
    slots: Tensor,
    at: Tensor,
    rows: Tensor,
    mass: Tensor,
    columns: int,
    ema: float | None = None,
) -> Tensor:
    """Centroids that tokens have joined: fp32 `[M, b, columns + 1]`, content and mass of the centroid that
    each token is near.

    Of M cells' centroids `slots [N, R]` and tokens `rows [M, b, R]`, the first `columns` are content, the
    next is mass. `at [M, b]`: the slot that a token is near; `mass [M, b]`: with which it joins, 0: not at
    all. Content becomes the mean by mass, or with `ema` moves by `1 - ema` for each token, the last one
    last. Each centroid comes once for every token near it, always the same, so that no sum depends on the
    order in which a device adds.
    """
    together = (at[..., None] == at[:, None]) * mass[:, None]  # [M, to, from]
    held = slots.index_select(0, at.reshape(-1)).view(*at.shape, -1)
    old, total = held[..., :columns], held[..., columns] + together.sum(-1)
    if ema is None:
        share = together / total.clamp_min(1e-30)[..., None]
    else:  # the newest count most
        after = together.triu(1).sum(-1)
        moved = (1 - ema**mass) * ema**after
        share = (together > 0) * moved[:, None]
    new = old + share @ (rows[..., :columns] - old)
    return torch.cat([new, total[..., None]], -1)


def attention_mass(
    query: Tensor,
    keys: Tensor,
    lse: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    voters: Tensor | None = None,
) -> Tensor:
    """Attention that each entry receives, summed over the group's heads and queries: `[B, H, S]`.

    `lse` `[B, H, G, Q]` is the normaliser over *all* tiers; `voters` `[B, Q]` (bool) leaves out
    padded queries.
    """
    logits = scores(query, keys, scale=scale, softcap=softcap, bias=bias, mask=mask)
    weights = torch.exp(logits - lse.clamp_min(torch.finfo(torch.float32).min)[..., None])
    if voters is not None:
        weights = weights * voters[:, None, None, :, None]
    return weights.sum(dim=(2, 3))
