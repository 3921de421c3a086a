from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom.core.budget import Budget
from kvloom.core.recipe import Recipe
from kvloom.evaluation import measure as module
from kvloom.evaluation.decoders import CacheDecoder, WindowDecoder, decoder_for, feed_prompt
from kvloom.evaluation.measure import Measured, measure, percentile, perplexity
from kvloom.evaluation.recompute import Recompute
from kvloom.evaluation.results import Protocol
from kvloom.evaluation.subjects import parse
from kvloom.hf import load
from tests.models import build, tokens

N, P = 180, 70


def run(
    recipe: str, budget: str | None = None, model: Any = None, seen: list[int] | None = None,
    **protocol: int,
) -> Measured:  # fmt: skip
    fields = {"tokens": N, "prefill": P, "prefill_runs": 1, **protocol}
    model = model or build("llama")
    return measure(
        model, tokens(fields["tokens"])[0], parse(recipe),
        None if budget is None else Budget.parse(budget), Protocol(**fields),
        (lambda n: None) if seen is None else seen.append,
    )  # fmt: skip


def one_pass(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each token but the first, and log-probabilities, by one plain forward in fp64."""
    logits = model(ids[None], use_cache=False).logits[0, :-1].double()
    logp = torch.log_softmax(logits, -1)
    return -logp.gather(1, ids[1:, None])[:, 0], logp


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("chunk", [0, 32])
def test_a_full_cache_equals_one_plain_pass(family: str, chunk: int) -> None:
    model = build(family, attention="eager")  # older SDPA ignored soft caps
    loss, _ = one_pass(model, tokens(N)[0])
    q = run("none", model=model, prefill_chunk=chunk).quality
    assert q.perplexity == pytest.approx(float(loss.mean().exp()), rel=1e-4)
    assert q.decode_perplexity == pytest.approx(float(loss[P:].mean().exp()), rel=1e-4)
    assert (q.scored, q.decode_scored) == (N - 1, N - 1 - P)
    assert q.dense_perplexity == pytest.approx(q.perplexity, rel=1e-4)
    assert q.dense_decode_perplexity == pytest.approx(q.decode_perplexity, rel=1e-4)
    assert q.kl is not None and abs(q.kl) < 1e-5 and q.top1 == 1.0


def test_an_evicting_cache_equals_a_loop_by_hand() -> None:
    from kvloom import CompressedCache

    model, ids = build("llama"), tokens(N)[0]
    cache = CompressedCache(model, "h2o", "40tok")
    logits = [model(ids[None, :P], past_key_values=cache).logits[0]]
    logits += [
        model(ids[None, i : i + 1], past_key_values=cache).logits[0] for i in range(P, N - 1)
    ]
    logp = torch.log_softmax(torch.cat(logits).double(), -1)
    loss = -logp.gather(1, ids[1:, None])[:, 0]
    dense_loss, dense = one_pass(model, ids)
    kl = (dense.exp() * (dense - logp)).sum(-1)[P:]
    same = (dense.argmax(-1) == logp.argmax(-1))[P:].double().mean()

    found = run("h2o", "40tok")
    q = found.quality
    assert q.perplexity == pytest.approx(float(loss.mean().exp()), rel=1e-4)
    assert q.decode_perplexity == pytest.approx(float(loss[P:].mean().exp()), rel=1e-4)
    assert q.dense_decode_perplexity == pytest.approx(float(dense_loss[P:].mean().exp()), rel=1e-4)
    assert q.kl == pytest.approx(float(kl.mean()), rel=1e-3) and q.kl > 0.01
    assert q.top1 == pytest.approx(float(same)) and q.top1 < 1
    assert q.kl_p99 == pytest.approx(
        float(kl.sort().values[math.ceil(0.99 * len(kl)) - 1]), rel=1e-3
    )
    assert found.counts.evicted == cache.stats().evicted > 0
    assert found.bytes.final == cache.nbytes == sum(found.bytes.by_part.values())


def test_no_token_is_fed_twice_and_the_last_never(monkeypatch: pytest.MonkeyPatch) -> None:
    fed: dict[int, list[int]] = {}
    feed = CacheDecoder.feed

    def watched(self: CacheDecoder, ids: Tensor, keep: int = 1) -> Tensor:
        fed.setdefault(id(self), []).extend(ids.tolist())
        alive.append(self)
        return feed(self, ids, keep)

    alive: list[CacheDecoder] = []  # or ids would be used again
    monkeypatch.setattr(CacheDecoder, "feed", watched)
    run("h2o", "40tok", prefill_chunk=32)
    whole = tokens(N)[0].tolist()
    lengths = sorted(len(x) for x in fed.values())
    assert all(whole[: len(x)] == x for x in fed.values())
    assert lengths[-2:] == [N - 1, N - 1], "the cache and the full cache, each once over the text"
    assert all(n <= P + 4 for n in lengths[:-2]), "the others only time the prefill"


def test_bytes_and_series_are_those_of_the_cache() -> None:
    model, ids = build("llama"), tokens(N)[0]
    from kvloom import CompressedCache

    cache, held, kept = CompressedCache(model, "streaming_llm", "50%"), [], []
    model(ids[None, :P], past_key_values=cache)
    for i in range(P, N - 1):
        model(ids[None, i : i + 1], past_key_values=cache)
        held.append(cache.nbytes)
        kept.append(cache.stats().stored_mean)
    found = run("streaming_llm", "50%")
    b, s = found.bytes, found.series
    assert (b.mean, b.peak, b.final) == (sum(held) / len(held), max(held), held[-1])
    assert (s.seen, s.nbytes, s.entries) == (list(range(P + 1, N)), held, kept)
    dense = cache.stats().dense_nbytes
    assert b.dense == dense and b.dtype_dense == 2 * dense  # fp32
    assert b.dense_mean == pytest.approx(dense / (N - 1) * sum(range(P + 1, N)) / len(held))
    assert b.allowed == pytest.approx(b.dense_mean / 2)
    assert b.floor == cache.floor() and b.device_peak is None


@pytest.mark.parametrize("chunk", [0, 32])
def test_the_peak_of_a_prefill_is_seen_inside_of_it(chunk: int) -> None:
    from kvloom import CompressedCache

    model, ids = build("llama"), tokens(N)[0]
    cache, most = CompressedCache(model, "streaming_llm", "40tok"), 0

    def look(*_: Any) -> None:  # after a layer got its tokens, before it compresses
        nonlocal most
        most = max(most, cache.nbytes)

    for layer in cache.layers:
        update = layer.update
        layer.update = lambda *a, update=update, **k: (update(*a, **k), look())[0]
    for part in ids[:P].split(chunk or P):
        model(part[None], past_key_values=cache)
        look()
    found = run("streaming_llm", "40tok", prefill_chunk=chunk).bytes
    assert found.prefill_peak == most > found.peak


def test_the_devices_peak_is_the_subjects_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[CacheDecoder]] = []
    forgotten: list[int] = []

    def remember(*args: Any) -> CacheDecoder:
        made.append(weakref.ref(decoder := decoder_for(*args)))
        return decoder

    def alive(device: torch.device) -> int:
        return sum(ref() is not None for ref in made)

    monkeypatch.setattr(module, "decoder_for", remember)
    monkeypatch.setattr(
        module, "forget_device_peak", lambda device: forgotten.append(alive(device))
    )
    monkeypatch.setattr(module, "device_peak", alive)
    assert run("h2o", "40tok", prefill_runs=2).bytes.device_peak == 1
    assert forgotten == [1] * 6, "the full cache of the turn before is gone"


def test_layers_that_are_not_compressed_do_not_count_in_a_ratio() -> None:
    from kvloom import CompressedCache

    model, ids = build("gemma3"), tokens(N)[0]
    cache, ratios, others = CompressedCache(model, "int4"), [], []
    model(ids[None, :P], past_key_values=cache)
    for i in range(P, N - 1):
        model(ids[None, i : i + 1], past_key_values=cache)
        stats = cache.stats()
        others.append(stats.by_part["other layers"])
        ratios.append((stats.dense_nbytes, stats.nbytes - others[-1]))
    dense, held = (sum(x) for x in zip(*ratios, strict=True))
    b = run("int4", model=model).bytes
    assert b.other_mean == sum(others) / len(others) > 0
    assert b.ratio == pytest.approx(dense / held)
    assert b.dtype_ratio == pytest.approx(cache.stats().dtype_ratio)


def test_allowed_bytes_follow_the_budget() -> None:
    short = {"tokens": 40, "prefill": 30}
    assert run("h2o", "30tok", **short).bytes.allowed is None
    assert run("h2o", "200KiB", **short).bytes.allowed == 200 * 1024
    assert run("int4", **short).bytes.allowed is None


def test_long_series_are_binned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BINS", 10)
    found = run("streaming_llm", "50%")
    s = found.series
    assert len(s.seen) == len(s.entries) == len(s.nbytes) == len(s.seconds) == 10
    assert s.seen[-1] == N - 1 and max(s.nbytes) == found.bytes.peak
    assert s.dense_seen == [P + 64, N - 1] and len(s.dense_seconds) == 2


def test_times_are_of_single_tokens() -> None:
    t = run("int4").timing
    assert t.steps == N - 1 - P and t.dense_steps == math.ceil(64 / 4) + math.ceil(45 / 4)
    assert 0 < t.tpot <= t.tpot_p95 <= t.tpot_worst <= t.decode
    assert t.throughput == pytest.approx(t.steps / t.decode)
    assert min(t.ttft, t.dense_ttft, t.dense_tpot, t.ttft_ratio, t.tpot_ratio) > 0


def test_progress_adds_up_to_the_tokens_read() -> None:
    seen: list[int] = []
    run("none", seen=seen)
    assert sum(seen) == N - 1


# -- recomputation over a window -----------------------------------------------------------------


def test_recompute_sees_a_window_at_positions_from_zero() -> None:
    model, ids, window = build("llama"), tokens(N)[0], 50
    at = list(range(P, N - 1))
    losses, kls = [], []
    _, dense = one_pass(model, ids)
    for i in at:
        logits = model(ids[None, i + 1 - window : i + 1], use_cache=False).logits[0, -1]
        logp = torch.log_softmax(logits.double(), -1)
        losses.append(-float(logp[ids[i + 1]]))
        kls.append(float((dense[i].exp() * (dense[i] - logp)).sum()))
    found = run(f"recompute(window={window}, positions={len(at)})")
    q = found.quality
    assert q.decode_perplexity == pytest.approx(perplexity(losses), rel=1e-4)
    assert q.kl == pytest.approx(sum(kls) / len(kls), rel=1e-3)
    assert (q.perplexity, q.decode_scored, found.bytes.mean) == (None, len(at), 0)
    assert set(found.series.entries) == {float(window)}


def test_recompute_prefills_its_window_once(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = []
    forward = load.forward
    monkeypatch.setattr(
        load,
        "forward",
        lambda m, ids, *rest: forwards.append(ids.shape[1]) or forward(m, ids, *rest),
    )
    decoder = WindowDecoder(build("llama"), 50)
    feed_prompt(decoder, tokens(N)[0], chunk=16)
    assert forwards == [50]


def test_recompute_takes_evenly_spaced_steady_positions() -> None:
    found = run("recompute(window=90, positions=5)")
    assert found.series.seen == [round(89 + k * (N - 2 - 89) / 4) + 1 for k in range(5)]
    assert found.quality.decode_scored == found.timing.steps == 5


def test_recompute_may_be_timed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMED_WINDOWS", 7)
    found = run("recompute(window=50, positions=0)")
    assert found.series.seen == list(range(N - 7, N))
    q = found.quality
    assert (q.decode_perplexity, q.kl, q.top1, q.change, q.decode_scored) == (None,) * 4 + (0,)


def test_a_window_keeps_the_newest_tokens() -> None:
    decoder = WindowDecoder(None, 3)
    decoder.skip(torch.tensor([1, 2]))
    decoder.skip(torch.tensor([3, 4]))
    assert decoder.history.tolist() == [2, 3, 4] and decoder.entries() == 3


# -- wrong input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "protocol", "words"),
    [
        ("none", {"tokens": 10, "prefill": 9}, ("10 tokens", "prefill of 9")),
        ("none", {"tokens": 10, "prefill": 0}, ("at least 1",)),
        ("recompute(window=180)", {}, ("180 tokens", "shorter than the window", "recompute")),
        ("streaming_llm(sinks=4, recent=200)", {}, ("shorter than the window", "204 tokens")),
    ],
)
def test_a_text_must_be_long_enough(
    recipe: str, protocol: dict[str, int], words: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError) as error:
        module.check(parse(recipe), None, Protocol(**{"tokens": N, "prefill": P, **protocol}))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "text",
    [
        "recompute", "recompute()", "recompute(5)", "recompute(window=", "recompute(win=5)",
        "recompute(window=0)", "recompute(window='5')", "recompute(window=5, positions=-1)",
        "recompute(window=x)", "recompute(window=5) | int4", "recompute(**{'window': 5})",
    ],
)  # fmt: skip
def test_a_wrong_baseline_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="recompute"):
        parse(text)


def test_recipes_and_the_baseline_parse() -> None:
    assert parse("recompute(window=5)") == Recompute(5, 500)
    assert parse(str(Recompute(7, 0))) == Recompute(7, 0)
    assert parse("h2o | int4") == Recipe.parse("h2o | int4")


def test_tokens_that_are_ruled_out_do_not_spoil_the_divergence() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf]])
    scores = module.Scores()
    scores.add(logits, logits, torch.tensor([1]))
    assert scores.kl == [0.0] and scores.same == [True]
    p, q = torch.tensor([[0.25, 0.75]]), torch.tensor([[0.5, 0.5]])
    scores.add(p.log(), q.log(), torch.tensor([0]))
    assert scores.kl[1] == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert (scores.nll[1], scores.dense_nll[1]) == pytest.approx((math.log(2), math.log(4)))


def test_perplexity_and_percentile() -> None:
    assert perplexity([]) is None and perplexity([1e4]) == math.inf
    assert math.isnan(perplexity([math.nan]) or 0)
    assert perplexity([math.log(2), math.log(8)]) == pytest.approx(4)
    values = [float(x) for x in range(1, 101)]
    assert [percentile(values, s) for s in (0.01, 0.95, 0.99, 1)] == [1, 95, 99, 100]
    assert percentile([3.0], 0.95) == 3
