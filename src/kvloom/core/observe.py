"""What policies see of a forward: its queries, and the attention that entries received."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvloom.core.attend import attention_mass
from kvloom.core.block import Block
from kvloom.core.format import PAGE
from kvloom.core.forward import Forward
from kvloom.core.plan import QUERIES, LayerPlan
from kvloom.core.policy import Policy, Queries

if TYPE_CHECKING:
    from kvloom.core.store import LayerStore


def observe(store: LayerStore, forward: Forward, new: Block | None) -> None:
    """Let the scorer see this forward's queries and attention, and update all slot state."""
    plan = store.plan
    scorer, merger = plan.recipe.scorer, plan.merger
    if scorer is None:
        return
    if plan.remembers:
        store.memory = scorer.remember(store.memory, _queries(plan, forward, scorer))
    if merger is not None and merger.needs & QUERIES:
        queries = _queries(plan, forward, merger)
        store.merger_memory = merger.remember(store.merger_memory, queries)
    if not plan.observes:
        return
    assert forward.lse is not None
    received = attention_mass(store, forward.call, new, forward.lse)
    start = 0
    holders: list[tuple[dict[str, Tensor], int]] = [
        (slab.meta, slab.pages * PAGE) for slab in store.pool.slabs
    ]
    holders += [(store.tail.meta, store.tail.longest)]
    holders += [] if new is None else [(new.meta, new.longest)]
    for meta, n in holders:
        column = {"attention_mass": received[:, :, start : start + n]}
        state = {name: meta[name][:, :, :n] for name in scorer.state_names}
        for name, x in scorer.observe(state, column).items():
            meta[name][:, :, :n] = x
        start += n


def _queries(plan: LayerPlan, forward: Forward, policy: Policy) -> Queries:
    states, positions = forward.call.query, forward.positions
    if "pre_rope_queries" in policy.needs:
        assert plan.rope is not None
        states = plan.rope.unrotate(states, positions[:, None, None])
    valid = forward.columns
    if valid is None:
        valid = torch.ones_like(positions, dtype=torch.bool)
    return Queries(states, positions, valid.to(states.device))
