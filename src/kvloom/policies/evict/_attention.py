"""The newest queries of a layer, remembered, and the attention that they pay to its entries."""

from __future__ import annotations

import torch
from torch import Tensor

from kvloom.core.block import from_newest
from kvloom.core.entries import Entries
from kvloom.core.policy import Queries

_BLOCK_ELEMENTS = 1 << 22  # logits held at once: 16 MiB in fp32


def remember_newest(memory: dict[str, Tensor], new: Queries, n: int) -> dict[str, Tensor]:
    """The newest `n` valid queries of each row: `queries [B, H, G, n, D]`, newest last, and how
    many of them there are so far, `held [B]`.
    """
    states, valid = new.states, new.valid
    B, H, G, Q, D = states.shape
    if not memory:
        memory = {
            "queries": states.new_zeros(B, H, G, n, D),
            "held": torch.zeros(B, dtype=torch.int64, device=states.device),
        }
    old, held = memory["queries"], memory["held"]
    total = (held + valid.sum(-1)).clamp_max(n)
    if Q == 1:
        rolled = torch.cat([old[..., 1:, :], states], -2)
        return {"queries": torch.where(valid[:, None, None, :, None], rolled, old), "held": total}
    slot = torch.arange(n, device=states.device)
    real = torch.cat([slot >= n - held[:, None], valid], -1)  # old and new side by side
    order = torch.argsort(real.to(torch.int8), dim=-1, stable=True)[:, None, None, -n:, None]
    from_old = old.gather(3, order.clamp_max(n - 1).expand(B, H, G, n, D))
    from_new = states.gather(3, (order - n).clamp_min(0).expand(B, H, G, n, D))
    return {"queries": torch.where(order < n, from_old, from_new), "held": total}


def forget_newest(memory: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """What `remember_newest` remembers, without the newest `n` queries of every row: so many fewer are
    held until new ones have come. What comes after a `crop` is the same as if the forgotten tokens had
    never been, since a cache is not compressed before it is as long as it was already.
    """
    if not memory:
        return memory
    return {
        "queries": memory["queries"].roll(n, -2),
        "held": (memory["held"] - n).clamp_min(0),
    }


def attention_from(entries: Entries, memory: dict[str, Tensor]) -> Tensor:
    """Mean attention weight that the remembered queries pay to each entry, `[B, H, G, S]` fp32.

    An exact softmax over all entries; the r-th newest query sees none of the r - 1 newest entries
    (the newest entries belong to the newest queries, since they are never evicted before those
    are forgotten). Worked out head by head and in blocks of queries.
    """
    queries, held, valid = memory["queries"], memory["held"], entries.valid
    B, H, G, n, _ = queries.shape
    S = valid.shape[-1]
    newer, mass = from_newest(valid), entries.meta.get("mass")
    rank = torch.arange(n, 0, -1, device=valid.device)
    there = rank <= held[:, None]
    step = max(1, _BLOCK_ELEMENTS // max(1, B * S))
    received = queries.new_zeros(B, H, G, S, dtype=torch.float32)
    for h in range(H):
        keys = entries.keys[:, h].float().transpose(1, 2)
        for i in range(0, n, step):
            part = slice(i, i + step)
            seen = valid[:, h, None] & (newer[:, h, None] >= rank[part, None])
            seen = seen & there[:, part, None]
            for g in range(G):
                logits = queries[:, h, g, part].float() @ keys * entries.scale
                if entries.softcap is not None:
                    logits = entries.softcap * torch.tanh(logits / entries.softcap)
                if mass is not None:
                    logits = logits + mass[:, h, None]
                weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
                received[:, h, g] += weights.nan_to_num(0.0).sum(-2)  # NaN: it saw nothing
    return received / held.clamp_min(1)[:, None, None, None]
