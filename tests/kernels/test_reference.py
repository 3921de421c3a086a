"""The reference against softmax attention over the concatenation, in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.kernels import reference
from tests.kernels.oracle import Case, assert_as_good_as_naive, cases, error, exact

FP32 = torch.finfo(torch.float32).eps


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_one_tier_is_softmax_attention(case):
    out, lse = reference.partial_attention(case.query, case.keys, case.values, **case.options)
    assert out.dtype == lse.dtype == torch.float32
    assert_as_good_as_naive((out, lse), case, torch.float32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(least=1), st.data())
def test_tiers_combine_to_attention_over_their_concatenation(case, data):
    n = case.keys.shape[2]
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=3)))
    edges = [0, *cuts, n]  # equal cuts make empty tiers
    parts = [case.part(a, b) for a, b in pairwise(edges)]
    partials = [reference.partial_attention(p.query, p.keys, p.values, **p.options) for p in parts]
    assert_as_good_as_naive(reference.combine(partials), case, torch.float32)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases(), st.integers(0, 1000))
def test_a_sink_logit_enters_the_normaliser_once(case, seed):
    H, G = case.query.shape[1:3]
    sinks = torch.randn(H, G, generator=torch.Generator().manual_seed(seed)) * 3
    middle = case.keys.shape[2] // 2
    parts = [case.part(0, middle), case.part(middle, case.keys.shape[2])]
    partials = [reference.partial_attention(p.query, p.keys, p.values, **p.options) for p in parts]
    assert_as_good_as_naive(reference.combine(partials, sinks), case, torch.float32, sinks)


def _case(S=5, E=4, **options):
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, 2, 2, 3, 4, generator=generator)
    keys = torch.randn(1, 2, S, 4, generator=generator)
    return Case(query, keys, torch.randn(1, 2, S, E, generator=generator), 0.5, **options)


def _run(case):
    return reference.partial_attention(case.query, case.keys, case.values, **case.options)


def test_an_empty_tier_is_zero_with_lse_minus_infinity():
    out, lse = _run(_case(S=0, E=7))
    assert out.shape == (1, 2, 2, 3, 7)
    assert not out.any()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("how", ["mask", "bias"])
def test_a_query_that_sees_nothing_gets_zero_even_with_huge_dead_entries(how):
    case = _case()
    case.keys[:, :, :] = 1e18
    case.values[:, :, :] = 1e18
    if how == "mask":
        case.mask = torch.zeros(1, 1, 3, 5, dtype=torch.bool)
    else:
        case.bias = torch.full((1, 2, 5), -math.inf)
    out, lse = _run(case)
    assert not out.any()
    assert (lse == -math.inf).all()


def test_combining_nothing_but_blind_queries_gives_zero():
    case = _case(mask=torch.zeros(1, 1, 3, 5, dtype=torch.bool))
    out, lse = reference.combine([_run(case), _run(_case(S=0))])
    assert not out.any()
    assert (lse == -math.inf).all()


def test_a_tier_that_sees_nothing_changes_nothing():
    case = _case()
    blind = _run(_case(mask=torch.zeros(1, 1, 3, 5, dtype=torch.bool)))
    out, lse = reference.combine([blind, _run(case), blind])
    alone_out, alone_lse = _run(case)
    assert torch.equal(out, alone_out)
    assert torch.equal(lse, alone_lse)


def test_log_mass_counts_an_entry_as_many_equal_ones():
    case = _case(S=2)
    many = Case(
        case.query,
        case.keys.repeat_interleave(torch.tensor([1, 6]), 2),
        case.values.repeat_interleave(torch.tensor([1, 6]), 2),
        case.scale,
    )
    case.bias = torch.tensor([1.0, 6.0]).log().expand(1, 2, 2)
    assert_as_good_as_naive(_run(case), case, torch.float32)
    out, lse, _ = exact(many)
    merged_out, merged_lse, _ = exact(case)
    assert error(merged_out, out) <= 8 * FP32  # log(6) itself is rounded to fp32
    assert error(merged_lse, lse) <= 8 * FP32


def test_softcap_comes_before_bias():
    """With a cap of 1 no logit exceeds 1, but a mass of e^20 still dominates."""
    case = _case(softcap=1.0)
    case.bias = torch.zeros(1, 2, 5)
    case.bias[..., 3] = 20.0
    out, lse = _run(case)
    assert (lse > 19).all()
    # each of the 4 others weighs at most e^(1 - (20 - 1))
    spread = 2 * float(case.values.abs().max())
    heavy = case.values[:, :, None, 3:4].expand_as(out)
    assert error(out, heavy) <= (4 * math.exp(2 - 20) + 20 * FP32) * spread


def test_mass_of_several_tiers_is_the_softmax_over_all_of_them():
    case = _case(S=9)
    _, lse, weights = exact(case)
    received = [
        reference.attention_mass(p.query, p.keys, lse.float(), **p.options)
        for p in (case.part(0, 4), case.part(4, 9))
    ]
    naive = torch.softmax(reference.scores(case.query, case.keys, scale=0.5), -1).sum((2, 3))
    want = weights.sum((2, 3))
    floor = FP32 * float(want.max())
    assert error(torch.cat(received, 2), want) <= 2 * error(naive, want) + floor
