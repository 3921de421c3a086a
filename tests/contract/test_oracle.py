"""Every evicting policy and every format equals the mask-only oracle, in every family and mode.

CI runs a pairwise covering array; `-m full` runs the product. In-cache positions have a reference
of their own (tests/hf/test_in_cache.py), since a mask cannot express them.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from transformers import DynamicCache

from kvloom import CompressedCache
from tests.contract.covering import pairwise
from tests.contract.modes import MODES
from tests.contract.recipes import CAPACITY, formats, scorers
from tests.models import FAMILIES, build
from tests.oracle.shadow import NAME, ShadowCache

POLICIES = ["none", *(s for s in scorers() if s != "streaming_llm")]
POLICIES += ["streaming_llm(positions='original') | lazy(every=16, slack=4)"]
FACTORS = {
    "family": list(FAMILIES),
    "mode": list(MODES),
    "policy": POLICIES,
    "format": formats(),
}
COVERING = pairwise(FACTORS)
REST = sorted(set(product(*FACTORS.values())) - set(COVERING))


@pytest.mark.parametrize(("family", "mode", "policy", "fmt"), COVERING)
def test_equals_mask_only_oracle(family, mode, policy, fmt):
    _check(family, mode, policy, fmt)


@pytest.mark.full
@pytest.mark.parametrize(("family", "mode", "policy", "fmt"), REST)
def test_equals_mask_only_oracle_full(family, mode, policy, fmt):
    _check(family, mode, policy, fmt)


def _check(family, mode, policy, fmt):
    recipe = fmt if policy == "none" else f"{policy} | {fmt}"
    evicts = policy != "none"
    ours = build(family)
    theirs = build(family, attention=NAME)
    budget = f"{CAPACITY}tok" if evicts else None
    got = MODES[mode](ours, lambda: CompressedCache(ours, recipe, budget=budget))
    want = MODES[mode](theirs, lambda: ShadowCache(theirs, recipe, CAPACITY))
    exact = fmt.startswith("dense")
    if exact:
        _same(got, want)
    else:
        plain = build(family)
        dense = MODES[mode](plain, lambda: DynamicCache(config=plain.config))
        (_beams_close if mode in ("beams", "sequences") else _close)(got, want, dense)


def _same(got, want):
    for (ids, logits), (ids_want, logits_want) in zip(got, want, strict=True):
        assert torch.equal(ids, ids_want)
        assert (logits - logits_want).abs().max() < 1e-3 * logits_want.abs().max()


def _close(got, want, dense):
    """Packed codes may round the other way on fp32 noise: 5 % of what the recipe itself changes."""
    for (_, logits), (_, logits_want), (_, logits_dense) in zip(got, want, dense, strict=True):
        n = _agreeing(logits, logits_want)
        assert n >= 3, "the tokens differ almost at once"
        effect = (logits_want[:n] - logits_dense[:n]).abs().max()
        assert effect > 0, "the recipe changes nothing"
        assert (logits[:n] - logits_want[:n]).abs().max() < 0.05 * effect


def _beams_close(got, want, dense):
    """As `_close`, but beams of nearly equal score may change places, and then part for good."""
    (_, logits), (_, logits_want), (_, logits_dense) = got[0], want[0], dense[0]
    effect = (logits_want - logits_dense).abs().max()
    nearest = (logits[:, None] - logits_want[:, :, None]).abs().amax(-1).amin(-1)  # [step, row]
    close = (nearest < 0.05 * effect).all(-1).tolist()
    assert effect > 0 and all(close[:3]), "the beams differ almost at once"


def _agreeing(a, b):
    """Steps up to and including the first whose greedy tokens differ."""
    same = (a.argmax(-1) == b.argmax(-1)).all(-1).tolist()
    return (same.index(False) + 1) if False in same else len(same)
