"""The fast path and the dispatch: as good as naive attention, in every dtype and block size."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.kernels import mass, ops, reference, torch_cpu
from tests.kernels.oracle import Case, assert_as_good_as_naive, cases, error, exact

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = settings(deadline=None, derandomize=True)


@pytest.fixture(autouse=True)
def _fresh_environment():
    ops.forced_backend.cache_clear()
    yield
    ops.forced_backend.cache_clear()


def force(monkeypatch, name):
    """Demand a backend by the environment, as at the start of a process."""
    if name is None:
        monkeypatch.delenv("KVLOOM_BACKEND")
    else:
        monkeypatch.setenv("KVLOOM_BACKEND", name)
    ops.forced_backend.cache_clear()


def _call(case):
    return ops.partial_attention(case.query, case.keys, case.values, **case.options)


def random_case(B=2, H=2, G=3, Q=5, S=70, D=32, E=None, **options):
    generator = torch.Generator().manual_seed(11)
    query = torch.randn(B, H, G, Q, D, generator=generator)
    keys = torch.randn(B, H, S, D, generator=generator)
    values = torch.randn(B, H, S, E or D, generator=generator)
    return Case(query, keys, values, D**-0.5, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(KERNELS, max_examples=60)
@given(case=cases(softcap=False, same_width=True, least=1))
def test_torch_path_is_as_good_as_naive_attention(dtype, case):
    case = case.to(dtype)
    got = torch_cpu.partial_attention(
        case.query, case.keys, case.values, scale=case.scale, bias=case.bias, mask=case.mask
    )
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    assert_as_good_as_naive(got, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_torch_path_at_realistic_size(dtype, masked):
    case = random_case(S=200, D=64).to(dtype)
    if masked:
        keep = torch.rand(2, 2, 5, 200, generator=torch.Generator().manual_seed(2)) < 0.6
        case.mask = keep
        case.bias = torch.randint(1, 300, (2, 2, 200)).float().log()
    got = torch_cpu.partial_attention(
        case.query, case.keys, case.values, scale=case.scale, bias=case.bias, mask=case.mask
    )
    assert_as_good_as_naive(got, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_path_reads_views(dtype):
    """Tiers are views of larger storages: past the used slots lies garbage."""
    case = random_case(S=48).to(dtype)
    wide = case.part(0, 48)
    wide.keys[:, :, 40:] = math.nan
    wide.values[:, :, 40:] = math.nan
    view = wide.part(0, 40)
    got = torch_cpu.partial_attention(view.query, view.keys, view.values, scale=view.scale)
    assert_as_good_as_naive(got, view, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("Q", [1, 2, 37])
def test_causal_attention_masks_the_future(dtype, Q):
    case = random_case(Q=Q, S=Q).to(dtype)
    got = ops.causal_attention(case.query, case.keys, case.values, scale=case.scale)
    causal = torch.tensor([[s <= q for s in range(Q)] for q in range(Q)])
    case.mask = causal[None, None]
    assert_as_good_as_naive(got, case, dtype)


def test_causal_attention_with_a_mask_of_its_own():
    """Left padding: the mask replaces causality, and padded queries see nothing."""
    case = random_case(Q=6, S=6)
    real = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    case.mask = (causal & real[:, None] & real[:, :, None])[:, None]
    got = ops.causal_attention(case.query, case.keys, case.values, scale=case.scale, mask=case.mask)
    assert_as_good_as_naive(got, case, torch.float32)
    assert (got[1][0, ..., :2] == -math.inf).all()


def test_causal_attention_with_softcap_and_other_widths():
    case = random_case(Q=9, S=9, E=16, softcap=3.0)
    got = ops.causal_attention(
        case.query, case.keys, case.values, scale=case.scale, softcap=case.softcap
    )
    case.mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    assert_as_good_as_naive(got, case, torch.float32)


@settings(KERNELS, max_examples=40)
@given(case=cases())
def test_dispatch_serves_everything(case):
    assert_as_good_as_naive(_call(case), case, torch.float32)


@settings(KERNELS, max_examples=40)
@given(case=cases(least=1), block=st.sampled_from([1, 30, 100]))
def test_query_blocks_change_nothing(case, block):
    with pytest.MonkeyPatch.context() as patch:
        force(patch, "reference")
        patch.setattr(ops, "_BLOCK_ELEMENTS", block)
        assert_as_good_as_naive(_call(case), case, torch.float32)


def test_query_blocks_are_really_used(monkeypatch):
    force(monkeypatch, "reference")
    monkeypatch.setattr(ops, "_BLOCK_ELEMENTS", 2 * 2 * 3 * 70 * 2)  # two queries at once
    served = []
    plain = reference.partial_attention

    def spy(query, *args, **kwargs):
        served.append(query.shape[-2])
        return plain(query, *args, **kwargs)

    monkeypatch.setattr(reference, "partial_attention", spy)
    case = random_case(bias=torch.zeros(2, 2, 70))
    assert_as_good_as_naive(_call(case), case, torch.float32)
    assert served == [2, 2, 1]


@settings(KERNELS, max_examples=60)
@given(
    case=cases(least=1),
    seed=st.integers(0, 99),
    block=st.sampled_from([1, 50, 1 << 24]),
)
def test_attention_mass_is_the_column_sum_of_the_weights(case, seed, block):
    B, Q = case.query.shape[0], case.query.shape[3]
    voters = torch.rand(B, Q, generator=torch.Generator().manual_seed(seed)) < 0.7
    _, lse, weights = exact(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mass, "_ELEMENTS", block)
        every = ops.attention_mass(case.query, case.keys, lse.float(), **case.options)
        voted = ops.attention_mass(
            case.query, case.keys, lse.float(), **case.options, voters=voters
        )
    eps = torch.finfo(torch.float32).eps
    # a rounded logit or normaliser of size x scales its weight by up to eps * x
    logits = reference.scores(case.query, case.keys, scale=case.scale, softcap=case.softcap)
    finite = lse[torch.isfinite(lse)]
    size = 1.0 + float(logits.abs().max()) + (0.0 if case.bias is None else math.log(1000))
    size += float(finite.abs().max()) if finite.numel() else 0.0
    for got, want in (
        (every, weights.sum((2, 3))),
        (voted, (weights * voters[:, None, None, :, None]).sum((2, 3))),
    ):
        assert error(got, want) <= 2 * eps * size * max(1.0, float(want.max()))


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
@pytest.mark.parametrize("backend", ["reference", None])
def test_causal_attention_mass_equals_a_triangular_mask(monkeypatch, block, backend):
    case = random_case(Q=37, S=37)
    triangle = ops.causal_mask(37, torch.device("cpu"))
    _, lse = reference.partial_attention(
        case.query, case.keys, case.values, scale=case.scale, mask=triangle
    )
    want = reference.attention_mass(case.query, case.keys, lse, scale=case.scale, mask=triangle)
    if backend is not None:
        force(monkeypatch, backend)
    monkeypatch.setattr(mass, "_ELEMENTS", block)
    got = ops.attention_mass(case.query, case.keys, lse, scale=case.scale, causal=True)
    torch.testing.assert_close(got, want)


def test_attention_mass_sums_to_the_queries_of_the_group():
    case = random_case()
    _, lse = _call(case)
    received = ops.attention_mass(case.query, case.keys, lse, scale=case.scale)
    assert received.shape == (2, 2, 70)
    expected = torch.full((2, 2), 3.0 * 5.0)
    torch.testing.assert_close(received.sum(-1), expected)


@settings(KERNELS, max_examples=60)
@given(case=cases(least=1), data=st.data())
def test_combine_outputs_equals_combine(case, data):
    n = case.keys.shape[2]
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
    edges = [0, *cuts, n]
    parts = [_call(case.part(a, b)) for a, b in pairwise(edges)]
    want, _ = ops.combine(parts)
    got = ops.combine_outputs(parts)
    reach = max(float(out.abs().max()) for out, _ in parts)
    assert error(got, want) <= 4 * torch.finfo(torch.float32).eps * reach


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_combine_outputs_of_blind_queries_is_zero(parts):
    case = random_case(mask=torch.zeros(1, 1, 5, 70, dtype=torch.bool))
    assert not ops.combine_outputs([_call(case)] * parts).any()


def test_combine_outputs_takes_low_precision_parts():
    case = random_case(S=80).to(torch.bfloat16)
    parts = [_call(case.part(0, 30)), _call(case.part(30, 80))]
    assert parts[0][0].dtype == torch.bfloat16
    out, lse = ops.combine_outputs(parts), ops.combine(parts)[1]
    assert_as_good_as_naive((out, lse), case, torch.bfloat16)


# -- forced backends ---------------------------------------------------------------------------


def test_forced_reference_is_bitwise_the_reference(monkeypatch):
    case = random_case()
    want = reference.partial_attention(case.query, case.keys, case.values, **case.options)
    force(monkeypatch, "reference")
    monkeypatch.setattr(torch_cpu, "partial_attention", None)  # must not be called
    monkeypatch.setattr(torch_cpu, "causal_attention", None)
    got = _call(case)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    square = random_case(Q=4, S=4)
    ops.causal_attention(square.query, square.keys, square.values, scale=1.0)


def test_forced_torch_is_bitwise_the_torch_path(monkeypatch):
    case = random_case()
    want = torch_cpu.partial_attention(case.query, case.keys, case.values, scale=case.scale)
    force(monkeypatch, "torch")
    monkeypatch.setattr(reference, "partial_attention", None)
    got = _call(case)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"softcap": 3.0}, "softcap"),
        ({"E": 16}, r"differ in width \(32 and 16\)"),
        ({"dtype": torch.bfloat16}, "mixed dtypes"),
    ],
)
def test_forced_torch_says_why_it_cannot(monkeypatch, change, reason):
    force(monkeypatch, "torch")
    dtype = change.pop("dtype", None)
    case = random_case(**change)
    if dtype is not None:
        case.keys = case.keys.to(dtype)
    with pytest.raises(RuntimeError, match=f"KVLOOM_BACKEND=torch.*{reason}"):
        _call(case)
    force(monkeypatch, None)
    out, lse = _call(case)  # without force the reference serves it
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


def test_forced_torch_says_why_when_the_op_is_missing(monkeypatch):
    monkeypatch.setattr(torch_cpu, "_FLASH", None)
    case = random_case()
    assert torch.isfinite(_call(case)[0]).all()
    force(monkeypatch, "torch")
    with pytest.raises(RuntimeError, match="no CPU flash attention"):
        _call(case)


def test_an_empty_tier_is_served_under_every_force(monkeypatch):
    for name in ops.BACKENDS:
        force(monkeypatch, name)
        out, lse = _call(random_case(S=0))
        assert not out.any()
        assert (lse == -math.inf).all()


@pytest.mark.parametrize("name", ["nonsense", "", "TORCH"])
def test_unknown_backend_names_the_known_ones(monkeypatch, name):
    force(monkeypatch, name)
    with pytest.raises(ValueError, match=f"KVLOOM_BACKEND='{name}'.*reference, torch"):
        _call(random_case())
    with pytest.raises(ValueError, match="is unknown"):
        ops.forced_backend()
