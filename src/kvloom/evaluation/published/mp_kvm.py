"""MP-KVM's pipeline: `run_complete_experiment.py`, `run_phase_by_phase.py`, `generate_paper_figures.py`.

The cells are those of `experiments/mp_kvm.toml`. Without `--use-real-model` every text is generated
(`synthetic`), and every file says so; the model is one in both cases, the bundled one by default, since a
recall of made-up vectors says nothing about answers.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from kvloom.evaluation import experiment_file
from kvloom.evaluation.cells import Fallback
from kvloom.evaluation.experiment import NAME, Experiment, Outcome, Spec
from kvloom.evaluation.published import mp_kvm_files, shared

TESTBED = "testbed"
PUBLISHED_MODEL = "meta-llama/Llama-3.1-8B-Instruct"
SYNTHETIC = "synthetic"
PHASES = {
    "1": ("baselines", "baselines, synthetic"),
    "2": ("partition",),
    "3": ("sweep",),
    "4": ("threshold x centroids", "components"),
    "5": ("attention", "profiling"),
    "attention": ("attention",),
    "needles": ("needles",),
}
LEAST = 192  # tokens: a window of 64, and centroids that later tokens see
PAIR = 8  # tokens of a key and its value, about
_SIZES = ("tokens", "prefill", "needle_tokens", "length")


def run_complete_experiment(argv: Sequence[str] | None = None) -> bool:
    """All phases, or one; True if cells failed."""
    given = _parser("run_complete_experiment").parse_args(argv)
    return _run(given, _grids(given.phase, given.skip_performance))


def run_phase_by_phase(argv: Sequence[str] | None = None) -> bool:
    """Phase after phase, the files of each written before the next begins; True if cells failed."""
    given = _parser("run_phase_by_phase").parse_args(argv)
    phases = [given.phase] if given.phase else [p for p in PHASES if p != "attention"]
    return any([_run(given, _grids(p, given.skip_performance)) for p in phases])


def generate_paper_figures(argv: Sequence[str] | None = None) -> bool:
    """The figures again, from rows; nothing is measured. Raises ValueError without rows."""
    parser = shared.parser(
        "generate_paper_figures", "The six figures of MP-KVM from finished rows."
    )
    _output(parser)
    out = _folder(parser.parse_args(argv))
    mp_kvm_files.figures(shared.load(out / shared.ROWS), out)
    return False


def _parser(name: str) -> argparse.ArgumentParser:
    parser = shared.parser(name, "The five phases of MP-KVM, and needles by length and depth.")
    parser.add_argument(
        "--use-real-model", action="store_true", help="real texts, not generated ones"
    )
    parser.add_argument(
        "--model-path", help=f"with --use-real-model {PUBLISHED_MODEL}, else {TESTBED}"
    )
    parser.add_argument("--phase", choices=tuple(PHASES), help="only this one")
    parser.add_argument("--skip-performance", action="store_true", help="no profiling in phase 5")
    parser.add_argument(
        "--max-tokens",
        type=int,
        help="for a try: no text or context longer than this, few needles (not published)",
    )
    _output(parser)
    return parser


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-dir", type=Path, help="default: results/published/mp_kvm[-quick]")


def _folder(given: argparse.Namespace) -> Path:
    found: Path | None = given.output_dir
    return found or Path("results/published") / ("mp_kvm-quick" if given.quick else "mp_kvm")


def _grids(phase: str | None, skip_performance: bool) -> set[str]:
    wanted = {g for p, grids in PHASES.items() if phase in (None, p) for g in grids}
    return wanted - {"profiling"} if skip_performance else wanted


def _run(given: argparse.Namespace, wanted: set[str]) -> bool:
    whole, fallbacks = _experiment(given)
    out = _folder(given)
    rows = out / shared.ROWS
    earlier = _earlier(rows)
    chosen = [o for o in whole.outcomes if o.spec.grid in wanted]
    now = dataclasses.replace(whole, outcomes=chosen)
    failed = False
    if chosen:
        shared.measure(now, fallbacks, rows)
        failed = any(o.failed for o in now.outcomes)
    # the record keeps the other phases' cells
    merged = [o if o.spec.grid in wanted else _found(o, earlier) for o in whole.outcomes]
    whole.outcomes = [o for o in merged if o is not None]
    whole.save(rows)
    mp_kvm_files.write(whole, out, given.use_real_model)
    return failed


def _experiment(given: argparse.Namespace) -> tuple[Experiment, list[Fallback]]:
    """As `experiments/mp_kvm.toml` has it: its quick version, the published sizes for a real model, or its own."""
    real = given.use_real_model
    scale = "quick" if given.quick else "paper" if real else "testbed"
    default = PUBLISHED_MODEL if real and not given.quick else TESTBED
    model = given.model_path or default
    found, fallbacks = experiment_file.read(shared.source("mp_kvm"), scale, model)
    if real:
        found.outcomes = [o for o in found.outcomes if not o.spec.synthetic]
    else:
        shared.changed(found, _generated)
    if given.max_tokens is not None:
        shared.changed(found, lambda spec: _shorter(spec, given.max_tokens))
    return found, fallbacks


def _generated(spec: Spec) -> Spec:
    """A cell on generated text."""
    text = None if spec.text is None else SYNTHETIC
    own = dataclasses.replace(spec, synthetic=True, text=text)
    return shared.with_options(own, filler=SYNTHETIC)


def _shorter(spec: Spec, most: int) -> Spec:
    """A cell of at most so many tokens, a sixteenth of a document read one by one, and one needle."""
    if most < LEAST:
        raise ValueError(f"--max-tokens {most}: at least {LEAST}")
    old = spec.options
    sizes = {k: min(most, old[k]) for k in _SIZES if k in old}
    if "prefill" in sizes:
        sizes["prefill"] = min(old["prefill"], sizes["tokens"] - max(4, sizes["tokens"] // 16))
    sizes |= {
        "passage": min(old.get("passage", 0), most // 4),
        "needles": min(old.get("needles", 0), 1),
    }
    task = spec.task and re.sub(
        r"length=(\d+)", lambda m: f"length={min(most, int(m[1]))}", spec.task
    )
    if task:
        task = re.sub(r"pairs=(\d+)", lambda m: f"pairs={min(most // PAIR, int(m[1]))}", task)
    return shared.with_options(dataclasses.replace(spec, task=task), **sizes)


def _earlier(rows: Path) -> list[Outcome]:
    return shared.load(rows).outcomes if (rows / NAME).exists() else []


def _found(outcome: Outcome, earlier: list[Outcome]) -> Outcome | None:
    return next((o for o in earlier if o.spec == outcome.spec), None)
