"""Moving the start of a window equals scoring, ranking and marking its entries one by one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from kvloom import CompressedCache
from kvloom.core.block import GRANULE
from kvloom.core.schedule import Lazy
from kvloom.formats.dense import Dense
from kvloom.formats.int4 import Int4
from kvloom.policies.evict.streaming_llm import StreamingLLM
from tests.contract.modes import MODES
from tests.models import build, tokens


@dataclass(frozen=True)
class Scored(StreamingLLM):
    """The same method, but its scores are looked at."""

    @property
    def oldest_first(self) -> bool:
        return False


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize(
    "rest", [Lazy(), Lazy(every=16, slack=4), Dense(unpaged=0), Int4(), Dense(rope="pre")], ids=str
)
def test_same_logits_and_entries(mode, rest):
    model = build("llama")
    made: list[list[CompressedCache]] = []

    def run(scorer):
        made.append([])

        def make():
            made[-1].append(CompressedCache(model, scorer | rest, track_positions=True))
            return made[-1][-1]

        return MODES[mode](model, make)

    fast, slow = run(StreamingLLM(recent=80)), run(Scored(recent=80))
    for (ids, logits), (ids_slow, logits_slow) in zip(fast, slow, strict=True):
        assert torch.equal(ids, ids_slow)
        assert (logits - logits_slow).abs().max() <= 1e-4 * logits_slow.abs().max()
    assert made[0][-1].positions() == made[1][-1].positions()
    assert made[0][-1].nbytes <= made[0][-1].ceiling()
    assert made[0][-1].stats().evicted == made[1][-1].stats().evicted > 0


# a tail of 80 entries and one more has 96 slots, one of 79 and one more has 80
@pytest.mark.parametrize(("recent", "storages"), [(80, 2), (79, 32)])
def test_the_tail_is_copied_when_its_room_is_used_up(recent, storages):
    model, ids = build("llama"), tokens(300)
    cache = CompressedCache(model, f"streaming_llm(sinks=0, recent={recent})")
    model(ids[:, :200], past_key_values=cache)
    store, held = cache.layers[0].store, []
    for i in range(200, 232):
        model(ids[:, i : i + 1], past_key_values=cache)
        held.append(store.tail.keys)  # alive, so that no storage is at the address of another
        assert store.tail.size == recent
        assert store.tail.allocated == GRANULE * -(-(recent + 1) // GRANULE)
    assert len({x.untyped_storage().data_ptr() for x in held}) == storages


def test_crop_after_the_start_moved():
    """Forgetting the newest tokens where the oldest are gone already."""
    model, ids = build("llama"), tokens(300)
    cache = CompressedCache(model, "streaming_llm(recent=150) | lazy(every=32) | dense(unpaged=0)")
    model(ids[:, :120], past_key_values=cache)
    model(ids[:, 120:200], past_key_values=cache)  # compressed here, and not again for 31 tokens
    assert int(cache.layers[0].store.pool.slabs[0].skip.max()) > 0
    want = model(ids[:, 200:210], past_key_values=cache).logits
    model(ids[:, 210:230], past_key_values=cache)
    cache.crop(200)
    got = model(ids[:, 200:210], past_key_values=cache).logits
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
