"""KnormPress: `baseline_test.py`, `optimized_test.py`, `visualize_results.py`.

TTFT is stamped after the pruning and a device synchronisation, in turns with a full cache, which is the
baseline (keep 1.0); as published the baseline's is a tenth of its total time. Prune events are counted.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvloom.evaluation.experiment import Experiment, Figure, Outcome
from kvloom.evaluation.published import shared
from kvloom.evaluation.report.data import parameter
from kvloom.evaluation.results import Row

FOLDER = Path("results/published/knormpress")
MB = 2**20
TABLE = "knormpress_samples.csv"
FIGURES = {
    "comprehensive": "knormpress_comprehensive", "summary": "knormpress_summary",
    "tradeoff": "knormpress_tradeoff", "table": "knormpress_table",
}  # fmt: skip
METRICS = {  # published column -> metric
    "ttft_ms": "ttft", "tpot_ms": "tpot", "throughput_tok_s": "throughput",
    "ppl": "decode_perplexity", "ttft_change": "ttft_change", "throughput_change": "throughput_change",
    "ppl_change": "change", "compression_percent": "saving", "prune_events": "compressions",
}  # fmt: skip
_PERCENT = ("ttft_change", "throughput_change", "ppl_change", "compression_percent")


def baseline_test(argv: Sequence[str] | None = None) -> bool:
    """The full cache alone; True if cells failed."""
    given = _parser("baseline_test", "Baseline: the full cache.").parse_args(argv)
    return _run(given, [], "baseline")


def optimized_test(argv: Sequence[str] | None = None) -> bool:
    """Full cache and pruned caches; True if cells failed."""
    parser = _parser("optimized_test", "KnormPress at several keep ratios, beside the full cache.")
    parser.add_argument(
        "--keep_ratios", nargs="+", default=["1.0,0.9,0.8,0.7"], help="0.9,0.8 or 0.9 0.8"
    )
    parser.add_argument(
        "--prune_after", type=int, default=512, help="tokens; 256 short, 1024 long texts"
    )
    parser.add_argument("--skip_layers", default="0", help="'0' or '0,1'; '' for none")
    given = parser.parse_args(argv)
    ratios = _numbers(" ".join(given.keep_ratios), "--keep_ratios")
    layers = tuple(int(x) for x in _numbers(given.skip_layers, "--skip_layers"))
    recipes = [
        f"keep {r:g}: knorm(mode='recurrent', keep_ratio={r!r}, prune_after={given.prune_after}, skip_layers={layers})"
        for r in ratios
        if r != 1.0
    ]
    return _run(given, recipes, "optimised")


def visualize_results(argv: Sequence[str] | None = None) -> bool:
    """The four charts, from rows. Raises ValueError without rows."""
    parser = shared.parser("visualize_results", "The four charts of KnormPress from finished rows.")
    parser.add_argument("--output_dir", type=Path, default=FOLDER)
    given = parser.parse_args(argv)
    rows = given.output_dir / shared.ROWS
    found = shared.load(rows)
    shared.draw(found, rows, Figure("knorm", "KnormPress"), given.output_dir, FIGURES)
    return False


def _numbers(text: str, flag: str) -> list[float]:
    try:
        return [float(x) for x in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"{flag} {text!r}: numbers, apart by commas or spaces") from None


def _parser(name: str, about: str) -> argparse.ArgumentParser:
    parser = shared.parser(name, about)
    parser.add_argument("--num_wikitext_samples", type=int, default=3)
    parser.add_argument("--num_pg19_samples", type=int, default=2)
    parser.add_argument("--model_name", help="not published; default EleutherAI/pythia-70m-deduped")
    parser.add_argument("--max_tokens", type=int, help="of a sample (not published); default 1024")
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="not published")
    return parser


def _run(given: argparse.Namespace, recipes: list[str], title: str) -> bool:
    """Samples of WikiText are stretches of one text, of PG-19 they are books."""
    shared.chosen(
        given, {"model_name": "EleutherAI/pythia-70m-deduped", "max_tokens": 1024},
        {"model_name": "testbed", "max_tokens": 640},
    )  # fmt: skip
    first, second = ("stdlib", "stdlib_train") if given.quick else ("wikitext", "pg19")
    defaults = {
        "model": given.model_name, "dtype": "float32", "tokens": given.max_tokens,
        "prefill": given.max_tokens - given.max_tokens // 8, "prefill_runs": 3,
    }  # fmt: skip
    books, name = given.num_pg19_samples, shared.dataset(second)
    grids: list[dict[str, Any]] = []
    if given.num_wikitext_samples:
        own = {"text": shared.dataset(first), "repeats": given.num_wikitext_samples}
        grids.append({"name": "wikitext", **own, "recipes": recipes})
    if books:
        texts = [f"{name}#{i}" if i else name for i in range(books)]
        grids.append({"name": "pg19", "text": texts, "recipes": recipes})
    out: Path = given.output_dir
    found, _ = shared.written(out / f"{title}.toml", f"KnormPress: {title}", defaults, grids)
    shared.measure(found, [], out / shared.ROWS)
    write(found, out)
    return any(o.failed for o in found.outcomes)


def write(experiment: Experiment, folder: Path) -> None:
    """Table per sample, and means per dataset and keep ratio."""
    lines = [_line(o, i) for i, o in _samples(experiment)]
    if not lines:
        return
    with (folder / TABLE).open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(lines[0]))
        table.writeheader()
        table.writerows(lines)
    print(f"wrote {folder / TABLE}")
    means = []
    for dataset, keep in dict.fromkeys((line["dataset"], line["keep_ratio"]) for line in lines):
        own = [x for x in lines if (x["dataset"], x["keep_ratio"]) == (dataset, keep)]
        names = (*METRICS, "memory_mb", "cache_mb")
        means.append(
            {"dataset": dataset, "keep_ratio": keep, "samples": len(own),
             **{n: shared.mean(x[n] for x in own) for n in names}}
        )  # fmt: skip
    content = {"per_sample": lines, "means": means, "note": (
        "ttft_ms: measured, after the pruning. memory_mb: of the device, null where it does not tell; cache_mb: mean "
        "bytes of the cache. Changes: against a full cache in the same run. prune_events: over all layers."
    )}  # fmt: skip
    shared.save(folder / "knormpress_results.json", content)


def _samples(experiment: Experiment) -> list[tuple[int, Outcome]]:
    """Measured cells with the number of their sample within its dataset."""
    found = []
    for grid in dict.fromkeys(o.spec.grid for o in experiment.outcomes):
        held = [o for o in experiment.grid(grid) if isinstance(o.row, Row)]
        places = list(dict.fromkeys((o.spec.text, o.spec.repeat) for o in held))
        found += [(places.index((o.spec.text, o.spec.repeat)) + 1, o) for o in held]
    return found


def _line(outcome: Outcome, sample: int) -> dict[str, Any]:
    keep = 1.0 if outcome.spec.recipe == "none" else parameter(outcome.spec, "keep_ratio")
    row = outcome.row
    assert isinstance(row, Row)
    found = {name: shared.of(outcome, metric) for name, metric in METRICS.items()}
    percent = {n: None if (v := found[n]) is None else 100 * v for n in _PERCENT}
    peak = row.bytes.device_peak
    return {
        "dataset": outcome.spec.grid, "keep_ratio": keep, "sample": sample, **found, **percent,
        "memory_mb": None if peak is None else peak / MB, "cache_mb": row.bytes.mean / MB,
        **shared.facts(outcome),
    }  # fmt: skip
