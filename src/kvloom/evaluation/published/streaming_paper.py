"""Lazy pruning for StreamingLLM: `run_paper_quick_check.sh`, `run_paper_experiments.sh`, and their reports.

The cells are those of `experiments/streaming.toml` at the published scale; what was measured is skipped,
unless a setting, a text or kvloom itself has changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from kvloom.evaluation import experiment_file
from kvloom.evaluation.cells import Fallback
from kvloom.evaluation.experiment import Experiment, Outcome, Spec
from kvloom.evaluation.metrics import METRICS
from kvloom.evaluation.published import shared, streaming
from kvloom.evaluation.report.data import called

FOLDER = Path("results/paper_experiments")
CHECK = {  # grid and recipe -> published file of the quick check
    ("table 1", "MIT"): "mit_streaming",
    ("table 1", "best"): "ours_best_r64",
    ("table 1", "softlite"): "ours_softlite_r32",
    ("table 2", "slack 0, any drop"): "ablation_baseline",
}
BASELINE = "recompute"
METRIC_NAMES = ("tpot_mean", "change", "speedup")


def run_paper_quick_check(argv: Sequence[str] | None = None) -> bool:
    """Four settings and the baseline, three documents each; True if cells failed."""
    given = _parser("run_paper_quick_check.sh", Path("results/paper_quick_check")).parse_args(argv)
    wanted = {*CHECK, ("table 1", BASELINE)}
    return _run(given, 3, lambda o: (o.spec.grid, o.spec.name) in wanted)


def run_paper_experiments(argv: Sequence[str] | None = None) -> bool:
    """Tables 1 and 2 and all sweeps, ten documents each; True if cells failed."""
    given = _parser("run_paper_experiments.sh", FOLDER).parse_args(argv)
    return _run(given, 10, lambda o: True)


def _parser(name: str, folder: Path) -> argparse.ArgumentParser:
    parser = shared.parser(name, "The tables of lazy pruning; what was measured is skipped.")
    parser.add_argument("-f", "--force", action="store_true", help="measure all anew")
    parser.add_argument(
        "-n", "--dry-run", action="store_true", help="only say which cells there are"
    )
    parser.add_argument("--output-dir", type=Path, default=folder)
    return parser


def _run(given: argparse.Namespace, samples: int, wanted: Callable[[Outcome], bool]) -> bool:
    experiment, fallbacks = _experiment(given.quick, samples)
    experiment.outcomes = [o for o in experiment.outcomes if wanted(o)]
    if given.dry_run:
        for o in experiment.outcomes:
            print(f"{o.spec.grid}: {o.spec.label} on {o.spec.text}, {o.spec.model}")
        return False
    shared.measure(experiment, fallbacks, given.output_dir / shared.ROWS, given.force)
    write(experiment, given.output_dir)
    return any(o.failed for o in experiment.outcomes)


def _experiment(quick: bool, samples: int) -> tuple[Experiment, list[Fallback]]:
    """As in the file, with MODEL_NAME, PG19_MAX_TOKENS, WIKITEXT_MAX_TOKENS and MAX_SAMPLES."""
    model = shared.variable("MODEL_NAME")
    scale = "quick" if quick else "paper"
    found, fallbacks = experiment_file.read(shared.source("streaming"), scale, model)
    count = shared.variable("MAX_SAMPLES", 1 if quick else samples)
    found.outcomes = [Outcome(s) for o in _first_texts(found) for s in _documents(o.spec, count)]
    shared.changed(found, _limited)
    return found, ([] if model else fallbacks)


def _first_texts(experiment: Experiment) -> list[Outcome]:
    return [
        o for o in experiment.outcomes if "#" not in (o.spec.text or "") or _is_wikitext(o.spec)
    ]


def _is_wikitext(spec: Spec) -> bool:
    return spec.grid == "wikitext"


def _documents(spec: Spec, count: int) -> list[Spec]:
    """The cell on so many books; the second text is one."""
    if _is_wikitext(spec):
        return [spec]
    texts = [f"{spec.text}#{i}" if i else spec.text for i in range(count)]
    return [dataclasses.replace(spec, text=text) for text in texts]


def _limited(spec: Spec) -> Spec:
    name = "WIKITEXT_MAX_TOKENS" if _is_wikitext(spec) else "PG19_MAX_TOKENS"
    return shared.with_options(spec, tokens=shared.variable(name, spec.options["tokens"]))


def write(experiment: Experiment, folder: Path) -> None:
    """A published JSON per setting, each beside table 1's recomputation; the baseline has its own."""
    base = [o for o in experiment.grid("table 1") if o.spec.name == BASELINE]
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for o in experiment.outcomes:
        if o.spec.recipe != "none" and o.row is not None:
            groups.setdefault((o.spec.grid, called(o.spec)), []).append(o)
    for (grid, name), held in groups.items():
        other = "wikitext" if grid == "wikitext" else "pg19"
        if name == BASELINE:
            stem, sides = f"{other}_baseline", {streaming.BASELINE: held}
        else:
            stem = CHECK.get((grid, name), _slug(f"{grid} {name}"))
            sides = {streaming.STREAMING: held}
            if grid != "wikitext":
                sides[streaming.BASELINE] = base
        spec = held[0].spec
        config = {"grid": grid, "name": name, "recipe": spec.recipe, "model": spec.model, "dtype": spec.dtype,
                  "text": spec.text, **spec.options}  # fmt: skip
        streaming.save(folder / f"{stem}.json", streaming.result(sides, config))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def compare_results(argv: Sequence[str] | None = None) -> bool:
    """Claimed and measured, from rows, on standard output. Raises ValueError without rows."""
    found = _record("compare_results", argv)[0]
    for line in _lines(found):
        print("  ".join(f"{field:<26}" for field in line).rstrip())
    return False


def generate_summary(argv: Sequence[str] | None = None) -> bool:
    """The same as `SUMMARY.md`. Raises ValueError without rows."""
    found, folder = _record("generate_summary", argv)
    head, *lines = _lines(found)
    text = [f"# {found.title}", "", _row(head), _row(["---"] * len(head)), *map(_row, lines)]
    path = folder / "SUMMARY.md"
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return False


def _record(name: str, argv: Sequence[str] | None) -> tuple[Experiment, Path]:
    parser = shared.parser(name, "Claimed and measured, from finished rows.")
    parser.add_argument("--results-dir", type=Path, default=FOLDER)
    folder: Path = parser.parse_args(argv).results_dir
    return shared.load(folder / shared.ROWS), folder


def _row(fields: Sequence[str]) -> str:
    return f"| {' | '.join(fields)} |"


def _lines(experiment: Experiment) -> list[list[str]]:
    """A line per grid and setting: each metric, measured and, where there is one, claimed."""
    labels = [
        f"{METRICS[n].label} ({which})" for n in METRIC_NAMES for which in ("measured", "claimed")
    ]
    lines = [["grid", "setting", *labels]]
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for o in experiment.outcomes:
        groups.setdefault((o.spec.grid, called(o.spec)), []).append(o)
    for (grid, name), held in groups.items():
        fields = [grid, name]
        for metric in METRIC_NAMES:
            claims = [c for o in held for c in experiment.claims_of(o) if c.metric == metric]
            fields.append(METRICS[metric].show(shared.mean(shared.of(o, metric) for o in held)))
            fields.append(METRICS[metric].show(claims[0].value) if claims else "")
        lines.append(fields)
    return lines
