"""A watcher sees every forward of its layer once, and changes nothing."""

from __future__ import annotations

import pytest
import torch

from kvloom import CompressedCache
from kvloom.hf.observed import ObservedCache
from tests.models import build, tokens

RECIPE = "streaming_llm(sinks=2, positions='original') | mean_centroid"


@pytest.mark.parametrize("chunk", [1, 7, 60])
def test_every_forward_is_shown_once_and_logits_are_the_same(chunk):
    model, ids = build("llama"), tokens(60)
    seen, lengths = [], []

    def watch(store, forward):
        seen.append(forward.positions[0])
        lengths.append(int(store.seen))

    caches = (
        ObservedCache(model, RECIPE, "24tok", 1, watch),
        CompressedCache(model, RECIPE, "24tok"),
    )
    with torch.inference_mode():
        logits = [
            torch.cat(
                [model(part, past_key_values=cache).logits for part in ids.split(chunk, 1)], 1
            )
            for cache in caches
        ]
    assert torch.equal(*logits)
    assert torch.equal(torch.cat(seen), torch.arange(60))
    assert lengths == list(range(0, 60, chunk))  # before the commit


@pytest.mark.parametrize(("name", "layer", "words"), [
    ("llama", 3, "layer 3 is out of range: the model has layers 0 to 2"),
    ("llama", -1, "layer -1 is out of range"),
    ("gemma3", 0, r"layer 0 is .*, which is not compressed; choose one of \[1\]"),
])  # fmt: skip
def test_only_a_compressed_layer_can_be_watched(name, layer, words):
    with pytest.raises(ValueError, match=words):
        ObservedCache(build(name), RECIPE, "24tok", layer, lambda store, forward: None)
