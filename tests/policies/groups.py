"""Random groups for survivor mergers, and what holds for all of them, in groups and in real caches.

An oracle is a function `(cell, dtype) -> (keys, values)` that does to one KV head of one row, in
loops, what the paper says; in fp32 it tells how exact a plain computation is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kvloom import CompressedCache
from kvloom.core.merge import Group, Merged
from kvloom.core.view import entries_of
from tests.models import build, left_padded

EPS = torch.finfo(torch.float32).eps
Oracle = Callable[["Cell", torch.dtype], tuple[Tensor, Tensor]]


@dataclass
class Cell:
    """One KV head of one row: indices of who is lost, kept, and so on, and the fields of `Group`."""

    group: Group
    row: int
    head: int
    lost: list[int]
    kept: list[int]
    scored: list[int]
    open: list[int]
    there: list[int]
    keys: Tensor
    values: Tensor
    scores: list[float]
    state: dict[str, Tensor]

    @cached_property
    def unit(self) -> Tensor:
        keys = self.keys.double()
        return keys / keys.norm(dim=-1, keepdim=True)

    def nearest(self, j: int) -> tuple[int, float]:
        """The kept entry most like entry j, the oldest of equals, and its cosine, in fp64."""
        return self.most_like(j, self.kept)

    def most_like(self, j: int, among: list[int]) -> tuple[int, float]:
        cosines = (self.unit[among] @ self.unit[j]).tolist()
        best = max(range(len(cosines)), key=lambda n: (cosines[n], -n))
        return among[best], cosines[best]

    @cached_property
    def matched(self) -> list[int]:
        """Losers whose most similar survivor may be changed."""
        return [j for j in self.lost if self.kept and self.nearest(j)[0] in self.open]


def cells(group: Group) -> list[Cell]:
    found = []
    for b in range(group.keys.shape[0]):
        for h in range(group.keys.shape[1]):
            marks = (group.lost, group.kept, group.kept & group.scored, group.open)
            marks += (group.lost | group.kept,)
            lists = [mark[b, h].nonzero().flatten().tolist() for mark in marks]
            state = {name: x[b, h] for name, x in group.state.items()}
            scores = group.scores[b, h].tolist()
            arrays = group.keys[b, h], group.values[b, h]
            found.append(Cell(group, b, h, *lists, *arrays, scores, state))
    return found


def random_group(
    seed: int, *, state: tuple[str, ...] = (), memory: dict[str, Tensor] | None = None,
    B: int = 3, H: int = 2, S: int = 24, D: int = 8, G: int = 2, queries: int = 0, **changes: Any,
) -> Group:  # fmt: skip
    """Ragged heads with dead slots between, closed survivors, a head that loses nothing and one in
    which nothing is open; the newest are not scored, though they have a score.
    """
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    valid = rand(B, H, S) < 0.9
    lost = valid & (rand(B, H, S) < 0.4)
    lost[0, 0] &= B * H == 1
    kept = valid & ~lost
    open_ = kept & (rand(B, H, S) < 0.7)
    open_[0, -1] &= B * H == 1
    keys, values = randn(B, H, S, D), randn(B, H, S, D + 2)
    positions = rand(B, H, S).mul(9).ceil().cumsum(-1).int()
    held = {name: rand(B, H, S).mul(4).floor() for name in state}
    for x in (keys, values, *held.values()):
        x[~valid] = 1e4  # stale, but finite
    memory = dict(memory or {})
    if queries:
        memory["queries"] = randn(B, H, G, queries, D)
        memory["held"] = torch.tensor([queries, -(-queries // 2), 1])[:B]
    scores = rand(B, H, S).masked_fill(~valid, -1.0)
    scored = (torch.arange(S) < S - S // 8).expand(B, H, S).clone()
    group = Group(
        keys, values, lost, kept, open_, held, scores, scored, positions, memory, D**-0.5, None, 1
    )
    return replace(group, **changes)


def rows_of(group: Group, index: list[int]) -> Group:
    """The group with its rows taken in another order."""

    def take(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: take(part) for name, part in x.items()}
        return x[index] if isinstance(x, Tensor) else x

    return Group(**{f.name: take(getattr(group, f.name)) for f in fields(group)})


def assert_close(got: Tensor, exact: Tensor, naive: Tensor) -> None:
    """At most twice the error of a plain fp32 computation, or a few roundings."""
    error = (naive.double() - exact.double()).abs().max()
    slack = 8 * EPS * exact.abs().max()
    assert (got.double() - exact).abs().max() <= 2 * error + slack


def check_against(group: Group, made: Merged, oracle: Oracle) -> None:
    """Equal to the oracle, and nothing but open survivors differs."""
    keys = group.keys if made.keys is None else made.keys
    values = group.values if made.values is None else made.values
    assert keys.dtype == values.dtype == torch.float32
    for before, after in ((group.keys, keys), (group.values, values)):
        assert torch.equal(before[~group.open], after[~group.open])
    for name, x in made.state.items():
        assert torch.equal(x[~group.open], group.state[name][~group.open])
    assert made.folded is not None and not (made.folded & ~group.lost).any()
    for cell in cells(group):
        exact, naive = oracle(cell, torch.float64), oracle(cell, torch.float32)
        there, at = cell.there, (cell.row, cell.head)
        if there:
            assert_close(keys[at][there], exact[0][there], naive[0][there])
            assert_close(values[at][there], exact[1][there], naive[1][there])


def check_rows(merger: Any, group: Group) -> None:
    """Rows in another order, and rows alone, come out the same."""
    whole = merger.merge(group)
    n = len(group.keys)
    for index in ([*range(n)][::-1], *([row] for row in range(n))):
        part = merger.merge(rows_of(group, index))
        assert torch.equal(part.folded, whole.folded[index])
        pairs = [(part.keys, whole.keys), (part.values, whole.values)]
        pairs += [(part.state[name], x) for name, x in whole.state.items()]
        pairs += [(part.memory[name], x) for name, x in whole.memory.items()]
        for got, want in pairs:
            if want is not None:  # the kernels of a matrix product may depend on its size
                assert torch.allclose(got, want[index], rtol=1e-5, atol=1e-5)


def check_in_caches(
    monkeypatch: Any, cls: Any, recipe: str, oracle: Oracle, budget: str = "90tok"
) -> CompressedCache:
    """Run a padded batch in chunks and tokens: every merge is checked, and what it made is stored."""
    made_here: dict[int, tuple[Group, Merged]] = {}
    original = cls.merge

    def merge(self: Any, group: Group) -> Merged:
        made = original(self, group)
        check_against(group, made, oracle)
        made_here[group.layer] = group, made
        return made

    monkeypatch.setattr(cls, "merge", merge)
    model = build("llama")
    cache = CompressedCache(model, recipe, budget)
    ids, mask = left_padded([150, 121])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    merges = 0
    for start, stop in pairwise([0, 100, 144, 145, 146, 147, 148, 149, 150]):
        made_here.clear()
        model(
            ids[:, start:stop], past_key_values=cache, attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
        )  # fmt: skip
        for layer, (group, made) in made_here.items():
            _check_stored(cache.compressed[layer].store, group, made)
        merges += len(made_here)
    assert merges > 3
    return cache


def _check_stored(store: Any, group: Group, made: Merged) -> None:
    """What attention reads from now on, up to what was packed on this occasion."""
    entries = entries_of(store)
    exact = store.plan.format.name == "dense"
    for name, before, after in (
        ("keys", group.keys, made.keys),
        ("values", group.values, made.values),
    ):
        held = getattr(entries, name)
        for b in range(held.shape[0]):
            for h in range(held.shape[1]):
                want = (before if after is None else after)[b, h][group.kept[b, h]]
                got = held[b, h][entries.valid[b, h]].float()
                n = len(got) if exact else int(store.tail.count[b, h])
                assert len(got) == len(want)
                assert torch.equal(got[len(got) - n :], want[len(want) - n :])
