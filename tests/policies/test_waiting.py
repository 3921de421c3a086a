"""Which recipes read from the device to merge, shown without one: what is computed from the model's weights
counts as the device's, and every read of it is noted.

Positions and masks are made by the host out of nothing, and are not followed.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from kvloom import CompressedCache
from kvloom.hf.context import Context
from kvloom.policies.merge import _clusters
from tests.models import build, tokens

ATEN = torch.ops.aten
# these give numbers, or a shape that depends on numbers
READING = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.equal, ATEN.masked_select, ATEN.is_nonzero}
METHODS = ("cpu", "tolist", "numpy")  # on a CPU these do not reach a dispatcher


class Following(TorchDispatchMode):
    """Follows what derives from some tensors; `reads` are the operations that looked at their numbers."""

    def __init__(self, sources):
        super().__init__()
        # storages are held, so that none is freed and its address used again
        self.device = {self._key(x): x.untyped_storage() for x in sources}
        self.reads = []

    @staticmethod
    def _key(x):
        return x.untyped_storage()._cdata

    def follows(self, x):
        return self._key(x) in self.device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        theirs = any(map(self.follows, given))
        masks = [x for x in given[1:] if x.dtype == torch.bool and self.follows(x)]
        indexed = func.overloadpacket in (ATEN.index, ATEN.index_put, ATEN.index_put_) and masks
        if theirs and (func.overloadpacket in READING or indexed):
            self.reads.append(str(func))
        out = func(*args, **(kwargs or {}))
        if theirs:
            made = [x for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)]
            self.device.update((self._key(x), x.untyped_storage()) for x in made)
        return out


def reads(recipe, budget, monkeypatch, steps=12):
    """What was read in the last of some decoding steps, after a prompt of which most was merged."""
    monkeypatch.setattr(_clusters, "reading_is_free", lambda device: False)
    # on an accelerator it sets a flag there; the host looks at it when something waits anyway
    monkeypatch.setattr(Context, "check_finite", lambda self, keys, values: None)
    model = build("llama")
    cache = CompressedCache(model, recipe, budget)
    with torch.no_grad():
        model(tokens(150), past_key_values=cache)
        for i in range(steps):
            model(tokens(1, seed=i), past_key_values=cache)
        before = cache.stats()
        layers = [layer.store for layer in cache.layers]
        held = [x for s in layers for x in _tensors(s)]
        with Following([*model.parameters(), *held]) as following:
            for name in METHODS:
                whole = getattr(torch.Tensor, name)

                def noted(x, *given, name=name, whole=whole):
                    if following.follows(x):
                        following.reads.append(name)
                    return whole(x, *given)

                monkeypatch.setattr(torch.Tensor, name, noted)
            model(tokens(1, seed=steps), past_key_values=cache)
    after = cache.stats()
    assert after.compressions > before.compressions and after.merged > before.merged
    return following.reads


def _tensors(store):
    """Numbers that a layer holds on the device; counts are the host's."""
    blocks = [b for b in (store.sinks, store.tail, store.centroids) if b is not None]
    found = [x for b in blocks for x in (b.keys, b.values, *b.meta.values())]
    return [*found, *store.merger_memory.values()]


@pytest.mark.parametrize(
    "switches",
    ["", ", positions='slot', mass_bias=False", ", min_merge_similarity=0.9, update='ema'",
     ", adaptive_threshold=True, metric='euclidean'", ", max_injected_centroids=3, rope='post'"],
)  # fmt: skip
def test_merging_behind_a_window_reads_nothing(switches, monkeypatch):
    """Every token evicts one, which joins a centroid or has two others merge."""
    recipe = f"mp_kvm(window_size=32, max_centroids=6{switches})"
    assert reads(recipe, None, monkeypatch) == []


@pytest.mark.parametrize(
    "recipe",
    ["h2o | mp_kvm(max_centroids=6)", "h2o | mass_fold",
     "streaming_llm(positions='original') | mp_kvm(max_centroids=6, sample_stride=2)"],
)  # fmt: skip
def test_other_merging_reads(recipe, monkeypatch):
    """And the test above can see it."""
    assert reads(recipe, "60tok", monkeypatch)
