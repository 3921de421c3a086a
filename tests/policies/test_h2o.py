"""H2O from the paper, in loops: accumulated columns of explicit softmax attention."""

from __future__ import annotations

import math

import pytest
import torch

from kvloom import CompressedCache
from kvloom.core.entries import Entries
from kvloom.policies.evict.h2o import H2O
from tests.models import build, left_padded, tokens
from tests.policies.replay import Recorder, columns_of, forward_edges, run


class Head:
    """One KV head of one row: the entries it keeps, oldest first."""

    def __init__(self, capacity: int, recent: float, sinks: int):
        self.capacity, self.sinks = capacity, sinks
        self.window = max(1, int((capacity - sinks) * recent))
        self.positions: list[int] = []
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.received: list[float] = []
        self.seen = 0

    def forward(self, query, keys, values):
        """`query [G, Q, D]`, `keys [Q, D]`; returns `[G, Q, D]` and then evicts."""
        past = len(self.positions)
        for key, value in zip(keys, values, strict=True):
            self.positions.append(self.seen)
            self.keys.append(key)
            self.values.append(value)
            self.received.append(0.0)
            self.seen += 1
        out = torch.zeros_like(query)
        for g in range(query.shape[0]):
            for q in range(query.shape[1]):
                visible = past + q + 1
                logits = [
                    float(query[g, q] @ k) / math.sqrt(k.numel()) for k in self.keys[:visible]
                ]
                top = max(logits)
                weights = [math.exp(x - top) for x in logits]
                total = sum(weights)
                for j, w in enumerate(weights):
                    self.received[j] += w / total
                    out[g, q] += w / total * self.values[j]
        self.evict()
        return out

    def evict(self):
        n = len(self.positions)
        if n <= self.capacity:
            return
        first_window = n - self.window
        heavy = sorted(
            range(self.sinks, first_window), key=lambda j: (self.received[j], j), reverse=True
        )
        room = self.capacity - self.sinks - self.window
        keep = [*range(self.sinks), *sorted(heavy[:room]), *range(first_window, n)]
        for name in ("positions", "keys", "values", "received"):
            held = getattr(self, name)
            setattr(self, name, [held[j] for j in keep])


@pytest.mark.parametrize(
    ("recent", "sinks", "lengths"),
    [(0.5, 0, None), (0.0, 0, None), (0.3, 2, None), (1.0, 0, None), (0.5, 0, [66, 31, 50])],
)
def test_keeps_what_the_paper_keeps(recent, sinks, lengths):
    capacity = 20
    model = build("llama")
    recorder = Recorder(model)
    recipe = f"h2o(recent={recent}, sinks={sinks})"
    cache = CompressedCache(model, recipe, f"{capacity}tok", track_positions=True)
    ids, mask = (tokens(66), None) if lengths is None else left_padded(lengths)
    heads = [
        [[Head(capacity, recent, sinks) for _ in range(2)] for _ in range(len(ids))]
        for _ in recorder.layers
    ]
    for step, (start, stop) in enumerate(run(model, cache, ids, forward_edges(66, 45, 6), mask)):
        for layer, forwards in enumerate(recorder.layers):
            seen = forwards[step]
            got = seen.out.view(len(ids), stop - start, -1)
            for row in range(len(ids)):
                columns = columns_of(mask, start, stop, row)
                outs = [
                    head.forward(
                        seen.query[row, h][:, columns],
                        seen.keys[row, h, columns],
                        seen.values[row, h, columns],
                    )
                    for h, head in enumerate(heads[layer][row])
                ]
                want = torch.cat(outs).permute(1, 0, 2).flatten(1).float()
                want = model.model.layers[layer].self_attn.o_proj(want)
                error = (got[row, columns] - want).abs().max() if columns else 0.0
                assert error <= 1e-4 * seen.out.abs().max()  # fp32 through a projection
                kept = cache.positions(layer)[row]
                assert kept == [head.positions for head in heads[layer][row]]
    kept = [head.positions for layer in heads for row in layer for head in row]
    assert all(len(p) == capacity for p in kept)
    if recent < 1:  # it is no sliding window: heavy hitters of long ago are there
        assert any(p[0] < p[-1] - capacity for p in kept)


def test_a_query_group_is_summed():
    """Two query heads per KV head: each column counts the attention of both."""
    model = build("llama")
    cache = CompressedCache(model, "h2o", "90tok", track_positions=True)
    model(tokens(30), past_key_values=cache)
    for layer in cache.compressed:
        received = layer.store.tail.meta["received"][:, :, :30]
        total = 2.0 * 30  # every query head of every token hands out one
        rounding = 30 * torch.finfo(torch.float32).eps  # one per column
        assert (received.sum(-1) - total).abs().max() <= rounding * total


def entries(received, valid=None):
    received = torch.tensor(received).view(1, 1, -1)
    valid = torch.ones_like(received, dtype=torch.bool) if valid is None else valid
    return Entries(valid, {"received": received}, lambda: None, lambda: None)


def test_score_is_what_was_received():
    assert H2O().score(entries([3.0, 1.0, 2.0])).flatten().tolist() == [3.0, 1.0, 2.0]


def test_observing_adds_up():
    state = H2O().arrive(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))
    assert state["received"].tolist() == [[[0, 0, 0]]]
    for _ in range(3):
        state = H2O().observe(state, {"attention_mass": torch.tensor([[[1.0, 0.5, 0.0]]])})
    assert state["received"].tolist() == [[[3.0, 1.5, 0.0]]]


@pytest.mark.parametrize(("recent", "window"), [(0.0, 1), (0.1, 2), (0.5, 10), (1.0, 20)])
def test_the_window_is_a_share_of_the_capacity(recent, window):
    assert H2O(recent).protected(torch.tensor([[20]])).tolist() == [[window]]
