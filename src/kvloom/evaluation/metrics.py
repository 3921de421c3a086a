"""The figures that a row holds, by name: what tables, claims, searches and figures speak of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvloom.core.budget import DENSE_BYTES
from kvloom.evaluation.results import Row
from kvloom.evaluation.task_results import TaskRow

AnyRow = Row | TaskRow


@dataclass(frozen=True)
class Metric:
    """One figure of a row.

    Attributes:
        label: for tables and axes, with its unit. form: of `str.format`. better: `"lower"`, `"higher"`, or
            `""` where neither is. of: reads it from a row; None: this row does not have it.
    """

    name: str
    label: str
    form: str
    better: str
    of: Callable[[Any], float | None]

    def show(self, value: float | None) -> str:
        """The number as it stands in a table."""
        if value is None:
            return "n/a"
        text = self.form.format(value)
        return text.removeprefix("-") if not text.strip("-0.%x") else text  # no "-0.0000"


def _quality(name: str) -> Callable[[Any], float | None]:
    return lambda row: getattr(row.quality, name) if isinstance(row, Row) else None


def _timing(name: str, factor: float = 1.0) -> Callable[[Any], float | None]:
    return lambda row: getattr(row.timing, name) * factor if isinstance(row, Row) else None


def _bytes(name: str) -> Callable[[Any], float | None]:
    return lambda row: getattr(row.bytes, name, None)


def _score(row: Any) -> float | None:
    """Share of the tasks that were solved."""
    if isinstance(row, TaskRow):
        return row.score
    return row.quality.needles_right / row.quality.needles if row.quality.needles else None


def _tpot_mean(row: Any) -> float | None:
    """Milliseconds per token, those in which something was pruned or sealed included."""
    return row.timing.decode / row.timing.steps * 1e3 if isinstance(row, Row) else None


def _speedup(row: Any) -> float | None:
    """Tokens per second against a full cache that was measured in turns: means, so that a token in which
    much was pruned counts; the full cache's is over the medians of its blocks, it has no such tokens.
    """
    mean = _tpot_mean(row)
    if mean is None or not row.series.dense_seconds:
        return None
    dense = sum(row.series.dense_seconds) / len(row.series.dense_seconds)
    return dense * 1e3 / mean


def _throughput_change(row: Any) -> float | None:
    speedup = _speedup(row)
    return None if speedup is None else speedup - 1


def _ttft_change(row: Any) -> float | None:
    return row.timing.ttft_ratio - 1 if isinstance(row, Row) else None


def _saving(row: Any) -> float | None:
    ratio = row.bytes.ratio
    return 1 - 1 / ratio if ratio else None


def _retained(row: Any) -> float | None:
    ratio = row.bytes.ratio
    return 1 / ratio if ratio else None


def _share(row: Any) -> float | None:
    """Of a full cache in the model's own dtype, over the same tokens."""
    dtype = getattr(torch, row.model.dtype)
    wide = row.bytes.dense_mean * dtype.itemsize / DENSE_BYTES
    return row.bytes.compressed_mean / wide if wide else None


def _bits(row: Any) -> float | None:
    if not isinstance(row, Row):
        return None
    return (row.bytes.avg_key_bits + row.bytes.avg_value_bits) / 2


# What rows of tasks have.
OF_TASKS = ("score", "ratio", "share", "retained", "saving", "nbytes", "peak", "compressions", "evicted", "merged")  # fmt: skip

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("perplexity", "perplexity", "{:.3f}", "lower", _quality("perplexity")),
        Metric("decode_perplexity", "perplexity, decoded", "{:.3f}", "lower", _quality("decode_perplexity")),
        Metric("dense_decode_perplexity", "perplexity, full cache", "{:.3f}", "lower", _quality("dense_decode_perplexity")),
        Metric("change", "perplexity against dense", "{:+.2%}", "lower", _quality("change")),
        Metric("kl", "KL to dense, nats", "{:.4f}", "lower", _quality("kl")),
        Metric("top1", "same first choice", "{:.1%}", "higher", _quality("top1")),
        Metric("score", "task score", "{:.1%}", "higher", _score),
        Metric("ratio", "compression, of 16-bit", "{:.2f}x", "higher", _bytes("ratio")),
        Metric("share", "bytes, of a full cache", "{:.1%}", "lower", _share),
        Metric("retained", "bytes, of 16-bit", "{:.1%}", "lower", _retained),
        Metric("saving", "bytes saved", "{:.1%}", "higher", _saving),
        Metric("nbytes", "mean bytes", "{:,.0f}", "lower", _bytes("mean")),
        Metric("peak", "peak bytes", "{:,.0f}", "lower", _bytes("peak")),
        Metric("bits", "bits per element", "{:.2f}", "lower", _bits),
        Metric("ttft", "TTFT, ms", "{:.1f}", "lower", _timing("ttft", 1e3)),
        Metric("ttft_change", "TTFT against dense", "{:+.1%}", "lower", _ttft_change),
        Metric("tpot", "TPOT, ms (median)", "{:.2f}", "lower", _timing("tpot", 1e3)),
        Metric("tpot_mean", "TPOT, ms (mean)", "{:.2f}", "lower", _tpot_mean),
        Metric("tpot_worst", "worst token, ms", "{:.2f}", "lower", _timing("tpot_worst", 1e3)),
        Metric("throughput", "tokens per second", "{:.1f}", "higher", _timing("throughput")),
        Metric("speedup", "speed against dense", "{:.2f}x", "higher", _speedup),
        Metric("throughput_change", "throughput against dense", "{:+.1%}", "higher", _throughput_change),
        Metric("compressions", "compressions", "{:,.0f}", "", lambda row: float(row.counts.compressions)),
        Metric("evicted", "entries evicted", "{:,.0f}", "", lambda row: float(row.counts.evicted)),
        Metric("merged", "entries merged", "{:,.0f}", "", lambda row: float(row.counts.merged)),
    )
}  # fmt: skip


def value(row: AnyRow, name: str) -> float | None:
    """A figure of a row by name; None where the row does not have it. Raises ValueError if unknown."""
    if name not in METRICS:
        raise ValueError(f"metric {name!r}: one of {', '.join(METRICS)}")
    return METRICS[name].of(row)
