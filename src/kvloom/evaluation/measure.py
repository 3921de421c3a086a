"""Quality, bytes and time of one document through one cache, in lockstep with a full cache.

Tokens t_0 .. t_{N-1}: the first P go in at once (or in chunks) and predict t_1 .. t_P; then each token
is fed alone, and t_{N-1}, which nothing follows, never is. So every token is fed at most once and
every token but the first is scored once:

    NLL_i = -log softmax(logits after t_0 .. t_{i-1})[t_i]      perplexity = exp(mean NLL)
    KL_i  = sum_v p_dense(v) (log p_dense(v) - log p(v))

Beside it a full cache reads the same tokens, block by block, so that only one block's logits are ever
held. Of each block it reads the first tokens at once; the others one by one, in turns with the cache
that is measured, which gives times of both at the same lengths and under the same load.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvloom.core.budget import Budget
from kvloom.core.recipe import Recipe
from kvloom.evaluation.decoders import (
    CacheDecoder,
    Decoder,
    Final,
    WindowDecoder,
    decoder_for,
    device_peak,
    feed_prompt,
    final,
    forget_device_peak,
)
from kvloom.evaluation.matching import Probe
from kvloom.evaluation.recompute import Recompute
from kvloom.evaluation.results import Bytes, Counts, Protocol, Quality, Series, Timing
from kvloom.evaluation.subjects import Subject

BLOCK = 64  # tokens
TURNS = 4  # tokens fed to the measured cache for each that is fed alone to the full one
BINS = 200  # of a series
TIMED_WINDOWS = 100  # tokens that `recompute` is timed on when it is not scored
_WARM_STEPS = 4

Advance = Callable[[int], None]


@dataclass
class Scores:
    """Per scored token, in order: loss, dense loss, KL in nats, same first choice."""

    nll: list[float] = field(default_factory=list)
    dense_nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)

    def add(self, dense: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Score logits `[n, V]` and the dense ones for the same tokens `targets [n]`."""
        p, q = (torch.log_softmax(x.float(), dim=-1) for x in (dense, logits))
        at = targets.to(p.device)[:, None]
        self.nll += (-q.gather(1, at)[:, 0]).tolist()
        self.dense_nll += (-p.gather(1, at)[:, 0]).tolist()
        kl = (p.exp() * (p - q)).masked_fill(p == -math.inf, 0.0)  # tokens that are ruled out
        self.kl += kl.sum(-1).tolist()
        self.same += (p.argmax(-1) == q.argmax(-1)).tolist()


@dataclass
class Measured:
    """What one document tells about one cache."""

    bytes: Bytes
    quality: Quality
    timing: Timing
    counts: Counts
    series: Series


@dataclass
class _Steps:
    """What is noted at each token that is fed alone."""

    seen: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    other_nbytes: list[int] = field(default_factory=list)
    entries: list[float] = field(default_factory=list)
    dense_seen: list[int] = field(default_factory=list)
    dense_seconds: list[list[float]] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def note(self, seen: int, decoder: Decoder) -> None:
        self.seen.append(seen)
        self.seconds.append(decoder.seconds)
        self.nbytes.append(decoder.nbytes())
        self.other_nbytes.append(decoder.other_nbytes())
        self.entries.append(decoder.entries())

    def close(self, seen: int, dense_times: list[float], fed: int) -> None:
        """A block ends in which `fed` tokens were noted."""
        self.dense_seen.append(seen)
        self.dense_seconds.append(dense_times)
        if fed:
            own = statistics.median(self.seconds[-fed:])
            self.ratios.append(own / statistics.median(dense_times))


def check(subject: Subject, budget: Budget | None, protocol: Protocol) -> None:
    """Raise ValueError if a document of this protocol cannot measure the subject."""
    N, P = protocol.tokens, protocol.prefill
    if P < 1 or N < P + 2:
        raise ValueError(
            f"{N} tokens with a prefill of {P}: the prefill needs at least 1 token, and the document "
            "at least 2 more"
        )
    window = _window(subject, budget)
    if window is not None and window >= N:
        at = f" @ {budget}" if budget else ""
        raise ValueError(
            f"a text of {N} tokens is shorter than the window of '{subject}{at}' ({window} tokens), so "
            "nothing would ever leave it; use a longer text or a smaller window"
        )


def _window(subject: Subject, budget: Budget | None) -> int | None:
    """Tokens that a subject sees or keeps at most, where it is known in advance."""
    if isinstance(subject, Recompute):
        return subject.window
    if budget is not None and budget.kind == "tokens":
        return int(budget.amount)
    return subject.scorer.capacity if subject.scorer else None


def measure(
    model: Any, ids: Tensor, subject: Subject, budget: Budget | None, protocol: Protocol,
    advance: Advance,
) -> Measured:  # fmt: skip
    """Measure a subject on the document `ids [N]`; `advance` is told of tokens as they are read."""
    ttft, most = _time_prefill(model, ids, subject, budget, protocol)
    dense, decoder = decoder_for(model, Recipe(), None), decoder_for(model, subject, budget)
    whole, decoded, steps = Scores(), Scores(), _Steps()
    prefill_peak = _score_prefill(dense, decoder, ids, protocol, whole)
    advance(protocol.prefill)
    wanted = _wanted(subject, protocol)
    for start in range(protocol.prefill, len(ids) - 1, BLOCK):
        stop = min(start + BLOCK, len(ids) - 1)
        block = _block(dense, decoder, ids, start, stop, wanted, steps)
        if block.fed and _is_scored(subject):
            at = torch.tensor(block.fed)
            decoded.add(block.dense[at - start], torch.stack(block.logits), ids[at + 1])
        advance(stop - start)
    end, full = final(decoder), final(dense)
    return Measured(
        bytes=_bytes(end, full, budget, steps, prefill_peak, most),
        quality=_quality(whole, decoded),
        timing=_timing(steps, *ttft),
        counts=end.counts,
        series=_series(steps),
    )


def probe(
    model: Any, ids: Tensor, subject: Subject, budget: Budget, target: Budget, protocol: Protocol
) -> Probe:
    """What a subject holds under `budget` over the tokens fed one by one, against what `target` means."""
    decoder, steps = decoder_for(model, subject, budget), _Steps()
    feed_prompt(decoder, ids[: protocol.prefill], protocol.prefill_chunk)
    for i in range(protocol.prefill, len(ids) - 1):
        decoder.feed(ids[i : i + 1])
        steps.note(i + 1, decoder)
    end = final(decoder)
    dense_mean = end.dense / (len(ids) - 1) * statistics.fmean(steps.seen)
    mean, other = statistics.fmean(steps.nbytes), statistics.fmean(steps.other_nbytes)
    return probed(target, mean, other, dense_mean, end.floor, end.counts.evicted)


def probed(
    target: Budget, mean: float, other: float, dense_mean: float, floor: int, evicted: int
) -> Probe:
    """Bytes held as shares of those that `target` means: of the compressed layers, or of all."""
    means = allowed(target, dense_mean)
    assert means is not None
    left_out = other if target.kind == "share" else 0.0
    return Probe((mean - left_out) / means, floor / means, evicted)


# -- feeding -------------------------------------------------------------------------------------


def _time_prefill(
    model: Any, ids: Tensor, subject: Subject, budget: Budget | None, protocol: Protocol
) -> tuple[tuple[list[float], list[float]], int | None]:
    """Seconds of the subject's prefills and of the full cache's, after a warm-up of each; and the
    device's peak during the subject's.
    """
    peak = None
    sides: list[tuple[Subject, Budget | None]] = [(subject, budget), (Recipe(), None)]
    times: list[list[float]] = [[], []]
    for run in range(1 + protocol.prefill_runs):
        for side in (0, 1) if run % 2 else (1, 0):
            decoder = decoder_for(model, *sides[side])  # the one before is gone
            forget_device_peak(model.device)
            feed_prompt(decoder, ids[: protocol.prefill], protocol.prefill_chunk)
            peak = device_peak(model.device) if side == 0 else peak
            if run:
                times[side].append(decoder.seconds)
                continue
            for token in ids[protocol.prefill :][:_WARM_STEPS].split(1):
                decoder.feed(token)
    return (times[0], times[1]), peak


def _score_prefill(
    dense: Decoder, decoder: Decoder, ids: Tensor, protocol: Protocol, scores: Scores
) -> int:
    """Feed and score the first part; the most bytes held meanwhile.

    A recomputed window is not scored here.
    """
    prompt, start, most = ids[: protocol.prefill], 0, 0
    if isinstance(decoder, WindowDecoder):
        feed_prompt(dense, prompt, protocol.prefill_chunk)
        decoder.skip(prompt)
        return most
    assert isinstance(decoder, CacheDecoder)
    for chunk in prompt.split(protocol.prefill_chunk or len(prompt)):
        n = len(chunk)
        a, (b, held) = dense.feed(chunk, keep=n), decoder.feed_watched(chunk, keep=n)
        most = max(most, held)
        targets = ids[start + 1 : start + n + 1]
        for part in zip(a.split(BLOCK), b.split(BLOCK), targets.split(BLOCK), strict=True):
            scores.add(*part)
        start += n
    return most


def _wanted(subject: Subject, protocol: Protocol) -> set[int] | None:
    """Indices of the tokens to feed: None for all, a sample for the baseline's slow windows.

    Only where the window is full: its steady state.
    """
    if not isinstance(subject, Recompute):
        return None
    first, last = max(protocol.prefill, subject.window - 1), protocol.tokens - 2
    if subject.positions:
        return set(torch.linspace(first, last, subject.positions).round().int().tolist())
    return set(range(max(first, last + 1 - TIMED_WINDOWS), last + 1))


def _is_scored(subject: Subject) -> bool:
    return not isinstance(subject, Recompute) or subject.positions > 0


@dataclass
class _Block:
    """What a block of tokens gave: logits of the full cache `[n, V]`; of the other `[V]` each, and
    the indices of the tokens fed for them.
    """

    dense: Tensor
    logits: list[Tensor]
    fed: list[int]


def _block(
    dense: Decoder, decoder: Decoder, ids: Tensor, start: int, stop: int, wanted: set[int] | None,
    steps: _Steps,
) -> _Block:  # fmt: skip
    """Feed tokens `start .. stop-1` to both sides, the measured one always singly."""
    alone = stop - math.ceil((stop - start) / TURNS)  # from here, the full cache's turns
    parts = [dense.feed(ids[start:alone], keep=alone - start)] if alone > start else []
    logits, fed, dense_times = [], [], []
    for i in range(start, stop):
        if (i - start) % TURNS == 0:
            parts.append(dense.feed(ids[alone : alone + 1]))
            dense_times.append(dense.seconds)
            alone += 1
        token = ids[i : i + 1]
        if wanted is None or i in wanted:
            logits.append(decoder.feed(token)[-1])
            fed.append(i)
            steps.note(i + 1, decoder)
        elif isinstance(decoder, WindowDecoder):
            decoder.skip(token)
    steps.close(stop, dense_times, len(fed))
    return _Block(torch.cat(parts), logits, fed)


# -- figures -------------------------------------------------------------------------------------


def perplexity(losses: list[float]) -> float | None:
    """`exp` of the mean loss, inf if it overflows; None without losses."""
    if not losses:
        return None
    mean = math.fsum(losses) / len(losses)
    return math.inf if mean > 700 else math.exp(mean)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _quality(whole: Scores, decoded: Scores) -> Quality:
    """`whole` holds the prefill's scores only, as a baseline without a prefill has none."""
    n = len(decoded.nll)
    every, dense = (whole.nll + decoded.nll), (whole.dense_nll + decoded.dense_nll)
    return Quality(
        perplexity=perplexity(every) if whole.nll else None,
        decode_perplexity=perplexity(decoded.nll),
        dense_perplexity=perplexity(dense) if whole.nll else None,
        dense_decode_perplexity=perplexity(decoded.dense_nll),
        kl=math.fsum(decoded.kl) / n if n else None,
        kl_p99=percentile(decoded.kl, 0.99) if n else None,
        top1=sum(decoded.same) / n if n else None,
        scored=len(every),
        decode_scored=n,
        needles_right=0,
        needles=0,
    )


def _timing(steps: _Steps, ttft: list[float], dense_ttft: list[float]) -> Timing:
    total = math.fsum(steps.seconds)
    dense = [t for block in steps.dense_seconds for t in block]
    return Timing(
        ttft=statistics.median(ttft),
        tpot=statistics.median(steps.seconds),
        tpot_p95=percentile(steps.seconds, 0.95),
        tpot_worst=max(steps.seconds),
        decode=total,
        steps=len(steps.seconds),
        throughput=len(steps.seconds) / total,
        dense_ttft=statistics.median(dense_ttft),
        dense_tpot=statistics.median(dense),
        dense_steps=len(dense),
        ttft_ratio=statistics.median(a / b for a, b in zip(ttft, dense_ttft, strict=True)),
        tpot_ratio=statistics.median(steps.ratios),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def _bytes(
    end: Final, full: Final, budget: Budget | None, steps: _Steps, prefill_peak: int,
    device_peak: int | None,
) -> Bytes:  # fmt: skip
    """`end` is of the measured cache, `full` of the dense one."""
    seen = max(1, steps.dense_seen[-1])
    dense_mean = full.dense / seen * statistics.fmean(steps.seen)
    return Bytes(
        final=end.nbytes,
        by_part=end.by_part,
        mean=statistics.fmean(steps.nbytes),
        peak=max(steps.nbytes),
        prefill_peak=prefill_peak,
        other_mean=statistics.fmean(steps.other_nbytes),
        dense=full.dense,
        dense_mean=dense_mean,
        dtype_dense=full.dtype_dense,
        allowed=allowed(budget, dense_mean),
        floor=end.floor,
        slack=end.slack,
        device_peak=device_peak,
        avg_key_bits=end.key_bits,
        avg_value_bits=end.value_bits,
    )


def allowed(budget: Budget | None, dense_mean: float) -> float | None:
    """Bytes that a budget allows, where a dense cache has `dense_mean`; None where it is not in bytes."""
    if budget is None or budget.kind == "tokens":
        return None
    return budget.amount * dense_mean if budget.kind == "share" else float(budget.amount)


def _series(steps: _Steps) -> Series:
    n = len(steps.seen)
    width = math.ceil(n / BINS)
    bins = [slice(a, min(a + width, n)) for a in range(0, n, width)]
    return Series(
        seen=[steps.seen[b.stop - 1] for b in bins],
        entries=[round(steps.entries[b.stop - 1], 2) for b in bins],
        nbytes=[max(steps.nbytes[b]) for b in bins],
        seconds=[float(f"{statistics.median(steps.seconds[b]):.4g}") for b in bins],
        dense_seen=steps.dense_seen,
        dense_seconds=[float(f"{statistics.median(t):.4g}") for t in steps.dense_seconds],
    )
