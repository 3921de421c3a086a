"""Ada-KV from the paper, in loops: one list of all heads' scores, and a floor for each head."""

from __future__ import annotations

import math
import random

import pytest
import torch

from kvloom import CompressedCache
from kvloom.policies.allocate.ada import Ada
from tests.models import build, tokens
from tests.policies.brute import check_keeps
from tests.policies.replay import run
from tests.policies.test_snapkv import snap


def split(scores, total, alpha):
    """Counts per head: the floors first, then the best of what is left, whoever has it."""
    H = len(scores)
    floor = int(alpha * total / H)
    counts, rest = [], []
    for h, head in enumerate(scores):
        ranked = sorted(range(len(head)), key=lambda j: (head[j], j), reverse=True)
        counts.append(min(floor, len(head)))
        most = total - (H - 1) * floor
        rest += [(head[j], -h, -i) for i, j in enumerate(ranked) if floor <= i < most]
    for _, h, _ in sorted(rest, reverse=True)[: total - sum(counts)]:
        counts[-h] += 1
    return counts


@pytest.mark.parametrize("alpha", [0.2, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_splits_as_the_paper_does(alpha, seed):
    draw = random.Random(seed)
    rows, total = [], []
    for _ in range(3):
        rows.append(
            [
                [draw.random() ** draw.randint(1, 5) for _ in range(draw.randint(5, 40))]
                for _ in range(4)
            ]
        )
        total.append(draw.randint(8, sum(map(len, rows[-1]))))
    scores, valid = torch.full((3, 4, 60), -math.inf), torch.zeros(3, 4, 60, dtype=torch.bool)
    for b, heads in enumerate(rows):
        for h, head in enumerate(heads):  # with holes: where an entry lies does not matter
            at = sorted(draw.sample(range(60), len(head)))
            scores[b, h, at], valid[b, h, at] = torch.tensor(head), True
    rows = [[scores[b, h][valid[b, h]].tolist() for h in range(4)] for b in range(3)]
    got = Ada(alpha).split(scores, valid, torch.tensor(total))
    assert got.tolist() == [split(row, n, alpha) for row, n in zip(rows, total, strict=True)]


@pytest.mark.parametrize("alpha", [0.2, 0.0, 1.0])
def test_no_head_gets_more_than_promised(alpha):
    """Even if the others cannot use their floors."""
    capacity = torch.tensor([[30, 30, 30], [10, 20, 30]])
    total = capacity.sum(1)
    scores, valid = torch.rand(2, 3, 200), torch.ones(2, 3, 200, dtype=torch.bool)
    valid[:, 1:, 2:] = False
    got = Ada(alpha).split(scores.masked_fill(~valid, -math.inf), valid, total)
    assert (got[:, :1] <= Ada(alpha).largest(capacity)).all()
    assert (got[:, 1:] <= 2).all() and (alpha == 0 or bool((got[:, 1:] == 2).all()))


def test_equal_scores_share_evenly_at_most():
    scores, valid = torch.zeros(1, 2, 10), torch.ones(1, 2, 10, dtype=torch.bool)
    assert Ada(1.0).split(scores, valid, torch.tensor([10])).tolist() == [[5, 5]]
    assert Ada(0.0).split(scores, valid, torch.tensor([7])).sum() == 7


@pytest.mark.parametrize("lengths", [None, [110, 31, 80]])
@pytest.mark.parametrize(
    "recipe", ["snapkv(window=8) | ada", "snapkv(window=8) | ada(alpha=0.6) | int4"]
)
def test_heads_keep_what_they_win(recipe, lengths):
    alpha = 0.6 if "0.6" in recipe else 0.2

    def choose(scores, counts):
        total = min(2 * 70, sum(counts))
        if total == sum(counts):
            return [list(range(n)) for n in counts]
        ranked = [[*s[: len(s) - 8], *[math.inf] * min(8, len(s))] for s in scores]
        return [
            sorted(range(len(s)), key=lambda j, s=s: (s[j], j), reverse=True)[:n]
            for s, n in zip(ranked, split(ranked, total, alpha), strict=True)
        ]

    layers = check_keeps(recipe, snap(8, 5, "avg"), 70, lengths=lengths, choose=choose)
    sizes = [[len(head.positions) for head in heads] for rows in layers for heads in rows]
    assert any(a != b for a, b in sizes)
    assert all(min(size) >= int(alpha * 70) for size in sizes if sum(size) == 140)


# A head that shrinks below a page keeps the page until it is compacted; the bound of pooled heads
# does not count that page, so budgets of about a page per head are exceeded.
@pytest.mark.parametrize("fmt", ["dense", "dense(unpaged=0)", "int4"])
@pytest.mark.parametrize("lazy", ["lazy", "lazy(every=16, slack=24)"])
@pytest.mark.parametrize("budget", ["150tok", "60%", 1.2])
def test_bytes_of_unequal_heads_stay_below_the_ceiling(budget, lazy, fmt):
    _check_bytes(f"snapkv(window=8) | {lazy} | ada(alpha=0.1) | {fmt}", budget)


@pytest.mark.parametrize("budget", ["25%", "40%"])
def test_bytes_of_unequal_heads_in_small_budgets(budget):
    _check_bytes("snapkv(window=8) | ada(alpha=0.1)", budget)


def _check_bytes(recipe, budget):
    model = build("llama", dtype=torch.bfloat16)
    if isinstance(budget, float):  # of the floor of 80 entries per head
        budget = int(budget * CompressedCache(model, recipe, "80tok").floor())
    cache = CompressedCache(model, recipe, budget, track_positions=True)
    sizes = []
    for _ in run(model, cache, tokens(800), [0, 700, *range(701, 801)]):
        assert cache.nbytes <= cache.ceiling()
        if isinstance(budget, int):
            assert cache.nbytes <= budget
        sizes += [len(head) for head in cache.positions(1)[0]]
    assert any(a != b for a, b in zip(sizes[::2], sizes[1::2], strict=True))


@pytest.mark.parametrize("bad", [-0.1, 1.5, "x", None])
def test_bad_parameters_are_restated(bad):
    with pytest.raises(ValueError, match=r"ada\(alpha=.*: alpha must be within 0..1"):
        Ada(alpha=bad)
