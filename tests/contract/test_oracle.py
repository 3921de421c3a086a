"""Every evicting policy and every format equals the mask-only oracle, in every family and mode.

CI runs a pairwise covering array over families, modes, scorers, formats, mergers, allocators,
schedules and budgets; `-m full` runs the product of families, modes, scorers and kinds of formats,
every other one with the rest drawn at random (by a generator that the case itself seeds). In-cache
positions have a reference of their own (tests/hf/test_in_cache.py), since a mask cannot express
them.
"""

from __future__ import annotations

from itertools import product
from random import Random

import pytest
import torch
from transformers import DynamicCache

from kvloom import CompressedCache
from tests.contract import recipes
from tests.contract.covering import covering
from tests.contract.modes import LONG, MODES, ROWS
from tests.contract.recipes import NONE, allowed, budget_for, in_cache
from tests.models import FAMILIES, build
from tests.oracle.shadow import NAME, ShadowCache

FACTORS = {
    "family": list(FAMILIES),
    "mode": list(MODES),
    **recipes.FACTORS,
    "scorer": [s for s in recipes.FACTORS["scorer"] if not in_cache(s)],
    "budget": recipes.BUDGETS,
}
EACH = covering(FACTORS, 1, allowed)
COVERING = [case for case in covering(FACTORS, 2, allowed) if case not in EACH]
RANDOM = ("merger", "allocator", "schedule", "budget")
# The product runs over the ways in which formats differ for a cache, and over every scorer once; pairs
# run over all formats and over the scorers' variants.
KINDS = ["dense(unpaged=0)", "dense(rope='pre')", "int4", "int4(keys='channel')"]
SCORERS = [s for s in FACTORS["scorer"] if s not in recipes.BESIDE]


def rest() -> list[tuple[str, ...]]:
    cases = []
    plain = {"merger": NONE, "allocator": NONE, "schedule": "lazy", "budget": "entries"}
    assert set(KINDS) <= set(FACTORS["format"])
    factors = {**FACTORS, "format": KINDS, "scorer": SCORERS}
    for values in product(*(v for name, v in factors.items() if name not in RANDOM)):
        base = dict(zip((name for name in FACTORS if name not in RANDOM), values, strict=True))
        draw = Random("/".join(values))
        drawn = {**base, **{name: draw.choice(FACTORS[name]) for name in RANDOM}}
        case = drawn if draw.random() < 0.5 and allowed(drawn) else {**base, **plain}
        cases += [case] if allowed(case) else []
    tried = {*EACH, *COVERING}
    unique = dict.fromkeys(tuple(case[name] for name in FACTORS) for case in cases)
    return [case for case in unique if case not in tried]


def ids(case):
    return "-".join(value for value in case if value not in (NONE, "lazy")).replace(" ", "")


@pytest.mark.oldest
@pytest.mark.parametrize("case", EACH, ids=ids)
def test_equals_mask_only_oracle_each(case):
    _check(dict(zip(FACTORS, case, strict=True)))


@pytest.mark.parametrize("case", COVERING, ids=ids)
def test_equals_mask_only_oracle(case):
    _check(dict(zip(FACTORS, case, strict=True)))


@pytest.mark.full
@pytest.mark.parametrize("case", rest(), ids=ids)
def test_equals_mask_only_oracle_full(case):
    _check(dict(zip(FACTORS, case, strict=True)))


def _check(case):
    family, mode, recipe = case["family"], case["mode"], recipes.text(case)
    ours, theirs = build(family), build(family, attention=NAME)
    budget = budget_for(ours, recipe, case["budget"], ROWS[mode], LONG)
    caches = []

    def make():
        caches.append(CompressedCache(ours, recipe, budget))
        return caches[-1]

    got = MODES[mode](ours, make)
    shadows = []

    def make_shadow():
        shadows.append(ShadowCache(theirs, recipe, budget))
        return shadows[-1]

    want = MODES[mode](theirs, make_shadow)
    if case["scorer"] != NONE:
        assert all(cache.stats().evicted > 0 for cache in caches), "nothing was put to the test"
    close_calls = any(s.close_calls for s in shadows)
    if case["format"].startswith("dense") and not close_calls:
        _same(got, want)
        return
    plain = build(family)
    dense = MODES[mode](plain, lambda: DynamicCache(config=plain.config))
    close = _beams_close if mode in ("beams", "sequences") else _close
    try:
        close(got, want, dense)
    except AssertionError:
        if not close_calls:
            raise
        _start_close(got, want)  # rounding chose another entry, and the runs part


def _same(got, want):
    for (ids, logits), (ids_want, logits_want) in zip(got, want, strict=True):
        assert torch.equal(ids, ids_want)
        assert (logits - logits_want).abs().max() < 1e-3 * logits_want.abs().max()


def _close(got, want, dense):
    """Packed codes may round the other way on fp32 noise: 5 % of what the recipe itself changes, or
    0.2 % of the largest logit where that is little (8 bits).
    """
    for (_, logits), (_, logits_want), (_, logits_dense) in zip(got, want, dense, strict=True):
        n = _agreeing(logits, logits_want)
        assert n >= 3, "the tokens differ almost at once"
        effect = (logits_want[:n] - logits_dense[:n]).abs().max()
        assert effect > 0, "the recipe changes nothing"
        allowed = max(0.05 * effect, 2e-3 * logits_want.abs().max())
        assert (logits[:n] - logits_want[:n]).abs().max() < allowed


def _beams_close(got, want, dense):
    """As `_close`, but beams of nearly equal score may change places, and then part for good."""
    (_, logits), (_, logits_want), (_, logits_dense) = got[0], want[0], dense[0]
    effect = (logits_want - logits_dense).abs().max()
    nearest = (logits[:, None] - logits_want[:, :, None]).abs().amax(-1).amin(-1)  # [step, row]
    close = (nearest < max(0.05 * effect, 2e-3 * logits_want.abs().max())).all(-1).tolist()
    assert effect > 0 and all(close[:3]), "the beams differ almost at once"


def _start_close(got, want):
    """The prefill is attended to before anything is evicted from it."""
    (_, logits), (_, logits_want) = got[0], want[0]
    assert (logits[0] - logits_want[0]).abs().max() < 1e-3 * logits_want[0].abs().max()


def _agreeing(a, b):
    """Steps up to and including the first whose greedy tokens differ."""
    same = (a.argmax(-1) == b.argmax(-1)).all(-1).tolist()
    return (same.index(False) + 1) if False in same else len(same)
