"""The published settings by name: their parameters, their sizes, and that they run."""

from __future__ import annotations

import pytest
import torch

from kvloom import CompressedCache, Lazy, Recipe
from kvloom.core import registry
from kvloom.policies.evict.knorm import Knorm
from kvloom.policies.evict.streaming_llm import StreamingLLM
from kvloom.policies.merge.mp_kvm import MPKVM
from tests.models import build, tokens

# name -> S, W, R, slack, max_drop
STREAMING = {
    "mit_streaming_llm": (4, 2044, 1, 0, 0),
    "eager": (32, 2016, 1, 16, 32),
    "eager_auto_cap": (32, 2000, 1, 16, 32),
    "lazy_best": (32, 2016, 64, 16, 32),
    "lazy_best_auto_cap": (32, 2000, 64, 16, 32),
    "softlite": (32, 2016, 32, 16, 32),
    "softlite_auto_cap": (32, 2000, 32, 16, 32),
    "lazy_r32": (32, 2016, 32, 0, 0),
    "lazy_r32_slack": (32, 2016, 32, 16, 0),
    "lazy_r32_max_drop": (32, 2016, 32, 0, 32),
}
# name -> r, P
KNORM = {
    "knormpress": (0.9, 512),
    "knormpress_90": (0.9, 512),
    "knormpress_80": (0.8, 512),
    "knormpress_70": (0.7, 512),
    "knormpress_extreme_90": (0.9, 32),
    "knormpress_extreme_80": (0.8, 32),
    "knormpress_extreme_70": (0.7, 32),
}

# name -> what differs from `mp_kvm_published`
MP_KVM = {
    "mp_kvm_published": {},
    "mp_kvm_aggregator": {"max_centroids": 512, "flush_threshold": 256, "flush_interval": 100},
    "mp_kvm_ema": {"update": "ema", "ema": 0.99},
}


@pytest.mark.parametrize("name", MP_KVM)
def test_mp_kvm_presets_are_the_published_settings(name):
    published = {
        "window_size": 4096, "sinks": 0, "max_centroids": 1024, "similarity_threshold": 0.8,
        "per_head_clustering": False, "positions": "positionless", "max_injected_centroids": 256,
    }  # fmt: skip
    recipe = Recipe.parse(name)
    assert recipe == Recipe(merger=MPKVM(**{**published, **MP_KVM[name]}))
    assert recipe.scorer == StreamingLLM(0, 4096, "original")
    model = build("llama")
    cache = CompressedCache(model, name)
    model(tokens(4200), past_key_values=cache)
    store = cache.compressed[0].store
    assert (store.stored == 4096).all() and bool((store.centroids.count > 0).all())
    assert store.plan.centroids == store.centroids.keys.shape[2]


@pytest.mark.parametrize("name", STREAMING)
def test_streaming_presets_are_the_published_settings(name):
    S, W, R, slack, drop = STREAMING[name]
    recipe = Recipe.parse(name)
    assert recipe == Recipe(StreamingLLM(S, W), schedule=Lazy(R, slack, drop))
    assert recipe.scorer.in_cache
    if name.endswith("auto_cap"):
        assert S + W + slack == 2048
    elif name != "mit_streaming_llm":
        assert S + W == 2048  # and so the slack is beyond the cap


@pytest.mark.parametrize("name", KNORM)
def test_knormpress_presets_are_the_published_settings(name):
    r, P = KNORM[name]
    want = Knorm(mode="recurrent", keep_ratio=r, prune_after=P, skip_layers=(0,))
    assert Recipe.parse(name) == Recipe(want)


def test_every_evicting_preset_is_listed_above_and_all_round_trip():
    evicting = {name for name in registry.presets() if Recipe.parse(name).evicts}
    assert evicting == {*STREAMING, *KNORM, "knormpress_fixed", *MP_KVM}
    for name in registry.presets():
        assert Recipe.parse(str(Recipe.parse(name))) == Recipe.parse(name)


def test_a_preset_chains_like_a_policy():
    assert Recipe.parse("softlite | int4") == Recipe.parse(
        f"{registry.presets()['softlite']} | int4"
    )
    assert Recipe.parse("int4 | knormpress_70").scorer.keep_ratio == 0.7
    with pytest.raises(ValueError, match="a recipe has one scorer"):
        Recipe.parse("softlite | h2o")
    with pytest.raises(ValueError, match="unknown method 'softlight'; did you mean 'softlite'"):
        Recipe.parse("softlight | int4")


def test_extreme_pruning_holds_32_entries_and_layer_0_holds_all():
    """The same footprint for all three ratios, as the log of their perplexities suggests."""
    model = build("llama")
    for name in ("knormpress_extreme_90", "knormpress_extreme_80", "knormpress_extreme_70"):
        cache = CompressedCache(model, name)
        for i in range(150):
            model(tokens(1, seed=i), past_key_values=cache)
        held = torch.stack([layer.store.stored[0] for layer in cache.compressed])
        assert (held[0] == 150).all()
        assert (held[1:] < 32).all() and (held[1:] >= 0.7 * 31).all()


def test_a_fixed_size_needs_a_budget():
    with pytest.raises(ValueError, match="knorm evicts down to a budget and none was given"):
        CompressedCache(build("llama"), "knormpress_fixed")
    assert CompressedCache(build("llama"), "knormpress_fixed", "512tok").floor() > 0
