"""Real bytes: chunked prefill stays below the ceiling plus a chunk, freed memory is free, beams share."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvloom import CompressedCache
from kvloom.core.policy import Scorer
from kvloom.core.recipe import Recipe
from kvloom.core.schedule import Lazy
from kvloom.core.store import LayerStore
from kvloom.core.view import entries_of
from tests.contract.modes import beams, sequences
from tests.models import build, generate, left_padded, tokens


@pytest.fixture(scope="module")
def long_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=65536,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bytes_of(store: LayerStore) -> int:
    """Of every storage, once."""
    storages = (t.untyped_storage() for t in store.tensors())
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize(
    "recipe",
    [
        "h2o | int4",
        pytest.param("streaming_llm", marks=pytest.mark.full),
        pytest.param("h2o | mean_centroid | int4_channel", marks=pytest.mark.full),
    ],
)
def test_chunked_prefill_of_32k_tokens(recipe, long_model, monkeypatch):
    """Measured from storages before and after every commit of every layer."""
    chunk, peaks, commit = 512, [], LayerStore.commit

    def watched(store, forward, drop=0):
        held = bytes_of(store)
        new = sum(t.untyped_storage().nbytes() for t in (forward.block.keys, forward.block.values))
        peaks.append((held, new, store))
        commit(store, forward, drop)

    monkeypatch.setattr(LayerStore, "commit", watched)
    cache = CompressedCache(long_model, recipe, "1024tok")
    ids = tokens(32 * 1024)
    for start in range(0, ids.shape[1], chunk):
        long_model(ids[:, start : start + chunk], past_key_values=cache, logits_to_keep=1)
        assert cache.nbytes <= cache.ceiling()
    width = 2 * 16 * 4
    assert max(new for _, new, _ in peaks) <= chunk * width
    assert max(held for held, _, store in peaks) <= max(store.ceiling() for *_, store in peaks[-2:])
    assert cache.get_seq_length() == 32 * 1024


@pytest.mark.parametrize("recipe", ["h2o | int4", "snapkv | int4", "streaming_llm | int4"])
def test_a_layer_is_below_its_ceiling_as_soon_as_it_is_compressed(recipe, long_model, monkeypatch):
    """Not only when the forward has ended in all layers: what they hold until then adds up."""
    commit, held = LayerStore.commit, []

    def watched(store, forward, drop=0):
        commit(store, forward, drop)
        held.append(bytes_of(store))
        assert held[-1] <= store.ceiling()

    monkeypatch.setattr(LayerStore, "commit", watched)
    cache, ids = CompressedCache(long_model, recipe, "500tok"), tokens(1000)
    long_model(ids[:, :900], past_key_values=cache)
    for i in range(900, 970):
        long_model(ids[:, i : i + 1], past_key_values=cache)
    assert len(held) == 71 * len(cache.layers)
    assert cache.stats().evicted


@pytest.mark.parametrize("fmt", ["dense", "dense(unpaged=0)", "int4", "int4_channel"])
def test_freed_memory_is_free(fmt):
    """Evict 90 %: what is left is the ideal plus the slack that the design names."""
    model = build("llama")
    full = CompressedCache(model, fmt)
    small = CompressedCache(model, f"streaming_llm(sinks=0, recent=200) | lazy(every=1800) | {fmt}")
    ids = tokens(2000)
    for cache in (full, small):
        model(ids[:, :1999], past_key_values=cache)  # 1999 = 200 + 1799: nothing is evicted yet
    before = small.nbytes
    assert before >= 0.96 * full.nbytes  # `full` has a page open for what comes next
    model(ids[:, 1999:], past_key_values=small)
    stats, plan = small.stats(), small.layers[0].store.plan
    # tiles of 32 go as a whole where scales are shared
    assert stats.stored_max == 200 if fmt != "int4_channel" else 168 < stats.stored_max <= 200
    cells = 3 * 2
    tail = int(small.layers[0].store.tail.count.max())
    pages = -(-(stats.stored_max - tail) // 64)
    ideal = cells * ((stats.stored_max - tail) * plan.cost.page / 64 + tail * plan.cost.exact_slot)
    named = cells * (
        plan.cost.page  # the page that the window's edge cuts
        + 16 * plan.cost.exact_slot  # the tail's granule
        + (pages + 1) * plan.cost.page_meta + plan.cost.overhead
    )  # fmt: skip
    assert ideal <= small.nbytes <= ideal + named
    assert small.nbytes < 0.2 * before


def test_beams_share_pages():
    """After a reorder rows refer to the same pages: storages are counted once, nothing is copied."""
    model = build("llama")
    cache = CompressedCache(model, "int4")
    generate(model, cache, tokens(300), n=40, num_beams=4)
    one = CompressedCache(model, "int4")
    generate(model, one, tokens(300), n=40)
    pages = [c.stats().by_part["pages"] for c in (cache, one)]
    assert pages[0] < 2.6 * pages[1]  # four rows, far from four times the bytes
    assert cache.stats().rows == 4


@pytest.mark.parametrize("mode", [beams, sequences])
def test_reorder_carries_everything(mode):
    """Beams over a recipe with every kind of state equal beams over the same recipe without sharing."""
    model = build("llama")
    recipe = "h2o(sinks=2) | mean_centroid | int4"
    shared = mode(model, lambda: CompressedCache(model, recipe, "90tok"))

    class Copying(CompressedCache):
        def reorder_cache(self, beam_idx):
            import copy

            for layer in self.layers:
                rows = []
                for i in beam_idx.tolist():
                    row = copy.deepcopy(layer.store)
                    row.rows(torch.tensor([i]))
                    rows.append(row)
                layer.reorder_cache(beam_idx)
                for j, row in enumerate(rows):  # same content, told apart by row
                    mine = entries_of(layer.store)
                    alone = entries_of(row)
                    assert torch.equal(mine.valid[j, :, : alone.valid.shape[2]], alone.valid[0])
                    got = mine.keys[j][mine.valid[j]]
                    assert torch.equal(got, alone.keys[0][alone.valid[0]])
                    assert torch.equal(
                        mine.state("received")[j][mine.valid[j]],
                        alone.state("received")[0][alone.valid[0]],
                    )

    checked = mode(model, lambda: Copying(model, recipe, "90tok"))
    assert torch.equal(shared[0][0], checked[0][0])


def test_slack_and_parts_add_up():
    model = build("llama")
    cache = CompressedCache(model, "h2o(sinks=2) | mean_centroid | int4", "90tok")
    model(tokens(300), past_key_values=cache)
    stats = cache.stats()
    assert stats.nbytes == sum(stats.by_part.values())
    assert 0 < stats.slack < stats.nbytes
    assert stats.compression_ratio == pytest.approx(stats.dense_nbytes / stats.nbytes)
    assert stats.dense_nbytes == 300 * 3 * 2 * 32 * 2
    assert all(
        f" {part} " in cache.__str__() for part in ("pages", "tail", "sinks", "centroids", "total")
    )
    assert 4 < stats.avg_key_bits < 32


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_a_budget_in_bytes_counts_sliding_layers(family):
    """The whole cache stays within the bytes asked for, windows included, at every step."""
    model = build(family)
    floor = CompressedCache(model, "h2o", "90tok").floor()
    for amount in (2 * floor, 2 * floor + 30_000):
        cache = CompressedCache(model, "h2o", amount)
        ids, mask = left_padded([200, 150])
        at = (mask.cumsum(-1) - 1).clamp_min(0)
        edges = [0, 100, 190, *range(191, 201)]
        for a, b in pairwise(edges):
            model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=at[:, a:b],
                  past_key_values=cache)  # fmt: skip
            assert cache.nbytes <= amount
    assert cache.stats().by_part["other layers"] > 0
    with pytest.raises(ValueError, match="below the floor"):
        CompressedCache(model, "h2o", floor - 1)


@pytest.mark.parametrize("fmt", ["dense(unpaged=0)", "int4"])
def test_a_share_is_kept_in_a_batch_of_unequal_rows(fmt):
    """A share of what a dense cache holds for the batch; it holds padding too, and so the room that
    short rows reserve for the longest one is within it."""
    model, share = build("llama"), 0.3
    ids, mask = left_padded([900, 40, 40, 300])
    at = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = CompressedCache(model, f"h2o | {fmt}", f"{share:.0%}")
    edges = [0, 500, 880, *range(881, 901)]
    for a, b in pairwise(edges):
        model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=at[:, a:b],
              past_key_values=cache)  # fmt: skip
        dense = ids.shape[0] * b * cache.layers[0].store.plan.cost.dense_slot * 3 * 2
        if b >= 500:  # below, a share is less than the floor
            assert cache.nbytes <= share * dense, (b, cache.nbytes / dense)


@dataclass(frozen=True)
class EveryOther(Scorer):
    """One tile of every page, so that compaction puts tiles of different pages together."""

    needs: ClassVar[frozenset[str]] = frozenset({"positions"})

    def score(self, entries):
        return (entries.positions // 32 % 2).float() - entries.positions / 1e5


def test_the_ceiling_counts_the_scales_of_scattered_tiles(long_model):
    """Tiles that stay bring the scale sets of their pages along."""
    fmt = Recipe.parse("int2(keys='channel', values='channel')").format
    recipe = Recipe.of(EveryOther(), Lazy(every=8), fmt)
    cache = CompressedCache(long_model, recipe, "5900tok")
    for chunk in tokens(12000).split(400, 1):
        long_model(chunk, past_key_values=cache)
        assert cache.nbytes <= cache.ceiling()
    pool = cache.layers[0].store.pool
    sets = sum(slab.n_sets["scales"] for slab in pool.slabs)
    assert sets > 1.3 * int(pool.pages.sum())


@pytest.mark.parametrize(
    "recipe", ["h2o", "streaming_llm | lazy(every=8)", "snapkv(window=8) | ada"]
)
@pytest.mark.parametrize("budget", ["30tok", "64KiB", "300KiB", "12%", "30%"])
def test_a_small_budget_is_used_up_without_pages(recipe, budget):
    """Below 512 entries a dense cache is one piece, of which at most a granule of 16 slots stays free."""
    model, ids = build("llama"), tokens(700)
    cache = CompressedCache(model, recipe, budget)
    for at in [slice(0, 600), *(slice(i, i + 1) for i in range(600, 640))]:
        model(ids[:, at], past_key_values=cache)
        assert cache.nbytes <= cache.ceiling()
    stats, plan = cache.stats(), cache.layers[0].store.plan
    assert stats.by_part["pages"] == 0
    limit = {"64KiB": 64 << 10, "300KiB": 300 << 10, "12%": 0.12, "30%": 0.3}.get(budget)
    if limit is not None:
        limit *= 640 * 3 * 2 * plan.cost.dense_slot if limit < 1 else 1
        spare = (
            3 * 2 * (16 + 8) * plan.cost.exact_slot
        )  # a granule, and what the schedule lets wait
        assert limit - spare < cache.nbytes <= limit
    else:
        assert 28 <= stats.stored_max <= 60


@pytest.mark.parametrize("recipe", ["h2o", "snapkv(window=8) | ada"])
def test_a_share_that_outgrows_one_piece_goes_on_in_pages(recipe):
    model, ids = build("llama"), tokens(3000)
    cache = CompressedCache(model, recipe, "60%")
    pages = []
    for at in [*ids.split(300, 1), *tokens(70, seed=2).split(1, 1)]:
        model(at, past_key_values=cache)
        assert cache.nbytes <= cache.ceiling()
        pages.append(cache.stats().by_part["pages"])
    assert pages[0] == 0 < pages[-1]


@pytest.mark.parametrize("recipe", ["recent", "recent | ada"])
def test_rows_that_come_to_share_a_budget_leave_their_pages(recipe):
    """As many rows again: none needs pages any more, and half-empty ones would not be within the budget."""
    model, budget = build("llama"), 700 << 10
    cache = CompressedCache(model, recipe, budget, track_positions=True)
    model(tokens(1100), past_key_values=cache)
    assert cache.stats().by_part["pages"] > 0
    cache.batch_repeat_interleave(3)
    for i in range(3):
        model(tokens(1, rows=3, seed=i), past_key_values=cache)
        assert cache.nbytes <= cache.ceiling() <= budget
    assert cache.stats().by_part["pages"] == 0
    for row in cache.positions(1):
        for kept in row:
            assert kept == list(range(1103 - len(kept), 1103)) and len(kept) > 200


@pytest.mark.parametrize("fmt", ["int4", "int4_channel", "kvquant", "dense(unpaged=0)"])
def test_rows_too_short_for_a_page_leave_the_ones_they_have(fmt):
    """The floor for ten rows, all of which have the pages of the one that had it for itself."""
    model, recipe = build("llama"), f"h2o | {fmt}"
    budget = 10 * CompressedCache(model, recipe, "50%").floor()
    cache = CompressedCache(model, recipe, budget)
    model(tokens(400), past_key_values=cache)
    paged = cache.stats().by_part["pages"]
    assert paged > 0
    cache.batch_repeat_interleave(10)
    for i in range(70):
        model(tokens(1, rows=10, seed=i), past_key_values=cache)
        assert cache.nbytes <= cache.ceiling() <= budget
    assert cache.stats().by_part["pages"] == 0


@pytest.mark.parametrize(
    "schedule",
    [
        "every=32, rule='paper'",
        "every=8, slack=4, rule='paper', max_drop=16",
        "every=8, rule='final'",
    ],
)
def test_rows_that_multiply_do_not_wait_for_the_schedule(schedule):
    """Their budget is a tenth from one token to the next: whoever holds more than its peak is compressed."""
    model, recipe = build("llama"), f"h2o | lazy({schedule}) | int4"
    budget = 20 * CompressedCache(model, recipe, "50%").floor()
    cache = CompressedCache(model, recipe, budget)
    model(tokens(400), past_key_values=cache)
    assert cache.stats().by_part["pages"] > 0
    cache.batch_repeat_interleave(10)
    for i in range(40):
        model(tokens(1, rows=10, seed=i), past_key_values=cache)
        assert cache.nbytes <= cache.ceiling() <= budget


@pytest.mark.parametrize(
    "recipe", ["h2o | pyramid", "h2o | pyramid | int4", "h2o | weighted(heads=(1.0, 0.01))"]
)
@pytest.mark.parametrize("times", [1.0, 1.3, 2.5])
def test_unequal_layers_and_heads_stay_within_a_budget_near_the_floor(recipe, times):
    """Who cannot afford the least on its share gets it, and the others pay."""
    model = build("llama")
    budget = int(times * CompressedCache(model, recipe, "1MiB").floor(2))
    cache = CompressedCache(model, recipe, budget)
    for at in [tokens(300, rows=2), *tokens(40, rows=2, seed=1).split(1, 1)]:
        model(at, past_key_values=cache)
        assert cache.nbytes <= cache.ceiling() <= budget


def _keys_by_position(store, row, head):
    held = entries_of(store)
    at = zip(
        held.positions[row, head].tolist(), held.keys[row, head], held.valid[row, head], strict=True
    )
    return {position: key for position, key, valid in at if valid}


@pytest.mark.parametrize("fmt", ["int2", "kivi", "streaming_kvquant"])
def test_heads_that_keep_their_pages_are_not_encoded_again(fmt):
    """A budget at which, for three rows, one head needs no pages any more and another still does."""
    model, recipe = build("llama"), f"h2o | weighted(heads=(1.0, 0.25)) | {fmt}"

    def pages_of(rows):
        """Which of the two heads have pages: capacity enough to have filled one or two."""
        plan = cache.layers[0].store.plan
        capacity = plan.capacity(torch.zeros(rows, dtype=torch.int64))[0]
        return (capacity - plan.sinks - plan.format.residual > (96 if rows == 1 else 63)).tolist()

    for kib in range(240, 2400, 20):
        cache = CompressedCache(model, recipe, f"{kib}KiB", track_positions=True)
        model(tokens(4), past_key_values=cache)
        if pages_of(1) == [True, True] and pages_of(3) == [True, False]:
            break
    model(tokens(696), past_key_values=cache)
    cache.batch_repeat_interleave(3)
    store = cache.layers[0].store
    before, pages = _keys_by_position(store, 1, 0), store.pool.pages.clone()
    model(tokens(1, rows=3), past_key_values=cache)
    after = _keys_by_position(store, 1, 0)
    assert (
        (pages > 0).all()
        and (store.pool.pages[:, 0] > 0).all()
        and not store.pool.pages[:, 1].any()
    )
    shared = before.keys() & after.keys()
    assert len(shared) > 100 and all(torch.equal(before[p], after[p]) for p in shared)
    assert cache.nbytes <= cache.ceiling()


def test_unequal_tails_stay_packed_after_crop_and_reorder():
    model = build("llama")
    cache = CompressedCache(model, "h2o | lazy(every=16) | weighted(heads=(1.0, 0.2))", "300tok")
    model(tokens(500, rows=2), past_key_values=cache)
    model(tokens(3, rows=2), past_key_values=cache)
    assert cache.stats().slack == 0  # a short head does not hold the room of a long one
    cache.crop(-2)
    assert cache.nbytes <= cache.ceiling()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.nbytes <= cache.ceiling()


def test_no_row_keeps_the_room_of_a_longer_one_that_is_gone():
    model = build("llama")
    cache = CompressedCache(model, "recent | weighted(heads=(1.0, 0.2))", "300tok")
    ids, mask = left_padded([500, 7])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.nbytes <= cache.ceiling()
