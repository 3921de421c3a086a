"""Lazy pruning for StreamingLLM: `eval_streaming_llm.py` and `run_decode_perplexity.py`.

As published, the baseline is full recomputation of the window for every token. Each row also has a full
cache, measured in turns with it on the same tokens; it stands under `full_cache`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvloom.evaluation.experiment import Outcome
from kvloom.evaluation.published import shared
from kvloom.evaluation.results import Row, from_line, to_line
from kvloom.evaluation.statistics import summary

SCHEMA, VERSION = "kvloom.published.streaming", 1
MB = 2**20
NOTE = (
    "speedup: time per decoded token, baseline / streaming. ppl_increase_percent: against the baseline, each taken "
    "against a full cache on its own tokens. runtime_sec: prefill and the tokens that were timed. "
    "peak_memory_mb: of the device, null where it does not tell; cache_peak_mb: of the cache alone."
)
BASELINE, STREAMING = "baseline", "streaming"


@dataclass(frozen=True)
class Measures:
    """The published fields of one side; means over the samples.

    Attributes:
        perplexity: of all tokens, as published; decode_perplexity: of those fed one by one; the first is
            None for the baseline, which scores no prefill. tpot_ms: mean; tpot_median_ms: median.
    """

    perplexity: float | None
    decode_perplexity: float | None
    runtime_sec: float
    prefill_sec: float
    first_token_latency_sec: float
    decode_time_sec: float
    decode_tokens: float
    tpot_ms: float
    tpot_median_ms: float
    peak_memory_mb: float | None
    cache_peak_mb: float


@dataclass(frozen=True)
class Metrics:
    """The published comparison; None where only one side was run."""

    speedup: float | None
    tpot_ms: float
    ppl_increase_percent: float | None
    peak_memory_mb: float | None


@dataclass(frozen=True)
class FullCache:
    """A full cache on the same tokens, measured in turns with the streaming side (else the baseline)."""

    decode_perplexity: float | None
    tpot_ms: float
    ppl_increase_percent: float | None


@dataclass(frozen=True)
class Repeats:
    """A metric over the samples; the last three are None for a single one."""

    mean: float
    std: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Result:
    """The published JSON, its types checked when it is read (`read`)."""

    metrics: Metrics
    streaming: Measures | None
    baseline: Measures | None
    full_cache: FullCache
    config: dict[str, str]
    env: dict[str, str]
    samples: int
    repeats: dict[str, Repeats]
    data: str
    rows: list[str]
    note: str


def eval_streaming_llm(argv: Sequence[str] | None = None) -> bool:
    """Baseline and streaming at one setting; True if cells failed."""
    parser = _parser("eval_streaming_llm", "StreamingLLM with lazy pruning, slack and max-drop.")
    parser.add_argument("--mode", choices=("both", BASELINE, STREAMING), default="both")
    _lazy(parser)
    given = parser.parse_args(argv)
    _fill(given, Path("results/streaming_llm/wikitext_result.json"))
    wanted = (BASELINE, STREAMING) if given.mode == "both" else (given.mode,)
    return _run(given, {k: r for k, r in _recipes(given).items() if k in wanted})


def run_decode_perplexity(argv: Sequence[str] | None = None) -> bool:
    """One method in the decode loop; True if cells failed. Raises ValueError for kvpress."""
    parser = _parser("run_decode_perplexity", "Perplexity token by token, of one method.")
    parser.add_argument("--method", choices=(BASELINE, "ours", "mit", "kvpress"), required=True)
    _lazy(parser)
    given = parser.parse_args(argv)
    if given.method == "kvpress":
        raise ValueError(
            "kvpress stands beside kvloom in `make peers`: kept entries, bytes and times"
        )
    _fill(given, Path("results/decode_comparison.json"))
    if given.method == "mit":
        given.compress_every, given.cache_slack, given.max_drop = 1, 0, 0
    kind = BASELINE if given.method == BASELINE else STREAMING
    return _run(given, {kind: _recipes(given)[kind]})


def _parser(name: str, about: str) -> argparse.ArgumentParser:
    parser = shared.parser(name, about)
    parser.add_argument("--model-name", help="default: MODEL_NAME, else EleutherAI/pythia-2.8b")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"))
    parser.add_argument(
        "--dataset-name", help="wikitext, pg19, or any text of kvloom; default wikitext"
    )
    parser.add_argument("--dataset-config")
    parser.add_argument("--split")
    parser.add_argument("--max-samples", type=int, help="documents; default: MAX_SAMPLES, else 1")
    parser.add_argument(
        "--max-eval-tokens", type=int, help="default: {PG19,WIKITEXT}_MAX_TOKENS, else 4096"
    )
    parser.add_argument("--n-sink", type=int, default=4)
    parser.add_argument("--window-size", type=int, help="default 1024")
    parser.add_argument("--baseline-positions", type=int, default=0,
                        help="score so many windows of the baseline, not all (not published)")  # fmt: skip
    parser.add_argument("--output", type=Path)
    return parser


def _lazy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compress-every", type=int, default=1, help="R; 0: never")
    parser.add_argument("--cache-slack", type=int, default=0)
    parser.add_argument("--max-drop", type=int, default=0, help="0: no limit")


def _fill(given: argparse.Namespace, output: Path) -> None:
    named = given.dataset_name or ("stdlib" if given.quick else "wikitext")
    limit = {"pg19": "PG19_MAX_TOKENS", "wikitext": "WIKITEXT_MAX_TOKENS"}.get(
        named, "MAX_EVAL_TOKENS"
    )
    published = {
        "model_name": shared.variable("MODEL_NAME", "EleutherAI/pythia-2.8b"), "dtype": "float16",
        "dataset_name": named, "max_samples": shared.variable("MAX_SAMPLES", 1),
        "max_eval_tokens": shared.variable(limit, 4096), "window_size": 1024, "output": output,
    }  # fmt: skip
    quick = {
        "model_name": shared.variable("MODEL_NAME", "testbed"), "dtype": "float32",
        "max_eval_tokens": shared.variable(limit, 500), "window_size": 124,
    }  # fmt: skip
    shared.chosen(given, published, quick)
    if given.n_sink + given.window_size + 2 > given.max_eval_tokens:
        raise ValueError(
            f"--n-sink {given.n_sink} and --window-size {given.window_size} hold all of "
            f"--max-eval-tokens {given.max_eval_tokens}: evaluate more tokens, or make the window smaller"
        )


def _recipes(given: argparse.Namespace) -> dict[str, str]:
    cap = given.n_sink + given.window_size
    positions = given.baseline_positions or given.max_eval_tokens - 1 - cap
    lazy = (
        f"lazy(every={given.compress_every}, slack={given.cache_slack}, max_drop={given.max_drop})"
    )
    streaming = f"streaming_llm(sinks={given.n_sink}, recent={given.window_size}) | {lazy}"
    return {
        BASELINE: f"{BASELINE}: recompute(window={cap}, positions={positions})",
        STREAMING: f"{STREAMING}: {streaming if given.compress_every else 'none'}",
    }


def _run(given: argparse.Namespace, recipes: dict[str, str]) -> bool:
    text = shared.dataset(given.dataset_name, given.dataset_config, given.split)
    defaults = {
        "model": given.model_name, "dtype": given.dtype, "tokens": given.max_eval_tokens,
        "prefill": given.n_sink + given.window_size, "prefill_runs": 1,
        "text": [text if i == 0 else f"{text}#{i}" for i in range(given.max_samples)],
    }  # fmt: skip
    output: Path = given.output
    grid = {"name": "decode", "recipes": list(recipes.values())}
    experiment, _ = shared.written(output.with_suffix(".toml"), output.stem, defaults, [grid])
    # the full cache has no cell of its own: each row has it
    experiment.outcomes = [o for o in experiment.outcomes if o.spec.name]
    shared.measure(experiment, [], output.parent / shared.ROWS)
    sides = {k: [o for o in experiment.outcomes if o.spec.name == k] for k in recipes}
    failed = [o for o in experiment.outcomes if o.failed]
    if any(o.row for o in experiment.outcomes):
        save(output, result(sides, vars(given)))
    return bool(failed)


def result(sides: dict[str, list[Outcome]], config: dict[str, Any]) -> Result:
    """The published JSON of both sides' rows. Raises ValueError if neither has one."""
    rows = {k: [o.row for o in held if isinstance(o.row, Row)] for k, held in sides.items()}
    rows = {k: held for k, held in rows.items() if held}
    if not rows:
        raise ValueError("no row of either side")
    found = {k: _measures(held) for k, held in rows.items()}
    main = STREAMING if STREAMING in rows else BASELINE
    speedup = increase = None
    if len(rows) == 2:
        speedup = found[BASELINE].tpot_ms / found[STREAMING].tpot_ms
        increase = _increase(rows)
    e = rows[main][0].environment
    full = FullCache(
        shared.mean(r.quality.dense_decode_perplexity for r in rows[main]),
        _known(1e3 * r.timing.dense_tpot for r in rows[main]), _percent(_change(rows[main])),
    )  # fmt: skip
    metrics = Metrics(speedup, found[main].tpot_ms, increase, found[main].peak_memory_mb)
    return Result(
        metrics, found.get(STREAMING), found.get(BASELINE), full,
        {k: str(v) for k, v in config.items()},
        {k: str(v) for k, v in dataclasses.asdict(e).items()},
        len(rows[main]), _repeats(rows[main]),
        "synthetic" if any(o.spec.synthetic for held in sides.values() for o in held) else "real",
        [r.key for held in rows.values() for r in held], NOTE,
    )  # fmt: skip


def _measures(rows: list[Row]) -> Measures:
    """Means over the samples."""
    peaks = [r.bytes.device_peak for r in rows]
    return Measures(
        perplexity=shared.mean(r.quality.perplexity for r in rows),
        decode_perplexity=shared.mean(r.quality.decode_perplexity for r in rows),
        runtime_sec=_known(r.timing.ttft + r.timing.decode for r in rows),
        prefill_sec=_known(r.timing.ttft for r in rows),
        first_token_latency_sec=_known(r.timing.ttft for r in rows),
        decode_time_sec=_known(r.timing.decode for r in rows),
        decode_tokens=_known(float(r.timing.steps) for r in rows),
        tpot_ms=_known(_tpot(r) for r in rows),
        tpot_median_ms=_known(1e3 * r.timing.tpot for r in rows),
        peak_memory_mb=shared.mean(None if p is None else p / MB for p in peaks),
        cache_peak_mb=_known(r.bytes.peak / MB for r in rows),
    )


def _known(values: Any) -> float:
    found = shared.mean(values)
    assert found is not None
    return found


def _tpot(row: Row) -> float:
    """Milliseconds per decoded token, mean."""
    return 1e3 * row.timing.decode / row.timing.steps


def _change(rows: list[Row]) -> float | None:
    return shared.mean(r.quality.change for r in rows)


def _percent(change: float | None) -> float | None:
    return None if change is None else 100 * change


def _increase(rows: dict[str, list[Row]]) -> float | None:
    """Of streaming against the baseline: where both score the same tokens, the full cache cancels."""
    ours, base = (_change(rows[k]) for k in (STREAMING, BASELINE))
    return None if ours is None or base is None else 100 * ((1 + ours) / (1 + base) - 1)


def _repeats(rows: list[Row]) -> dict[str, Repeats]:
    """Over the samples, with bootstrap intervals."""
    found = {
        "tpot_ms": [_tpot(r) for r in rows],
        "decode_perplexity": [v for r in rows if (v := r.quality.decode_perplexity) is not None],
    }
    made = {}
    for name, values in found.items():
        if values:
            s = summary(values)
            made[name] = Repeats(s.mean, s.deviation, s.low, s.high)
    return made


def save(path: Path, found: Result) -> Path:
    """Write the JSON, and read it back with its types checked."""
    shared.save(path, json.loads(to_line(found, SCHEMA, VERSION)))
    read(path)
    return path


def read(path: Path) -> Result:
    """A file that `save` wrote. Raises ValueError if a field is missing, unknown or of another type."""
    found: Result = from_line(Result, path.read_text(encoding="utf-8"), SCHEMA, VERSION)
    return found
