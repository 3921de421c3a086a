"""MP-KVM's published files and figures, from rows.

A file's `recall` is the share of questions answered through the compressed cache. The published one is the
share of key vectors whose best centroid is similar enough, at one threshold for MP-KVM and another for its
baselines; `note` says so beside the number.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kvloom.evaluation import manifold, spectrum
from kvloom.evaluation.analysis_cells import folder_of
from kvloom.evaluation.experiment import Experiment, Figure, Outcome
from kvloom.evaluation.published import shared
from kvloom.evaluation.report.data import parameter
from kvloom.evaluation.results import Row
from kvloom.evaluation.statistics import summary

NOTE = (
    "recall: share of questions answered through the compressed cache; as published it is of key vectors near a "
    "centroid. memory_usage: mean bytes of the cache. compression_ratio: 16-bit dense bytes / bytes held."
)
METHODS = {
    "none": "No Compression", "random": "Random Eviction", "h2o": "H2O", "streaming_llm": "StreamingLLM",
    "mp_kvm": "MP-KVM", "knorm": "KnormPress",
}  # fmt: skip
FILES = {
    "No Compression": "no_compression", "Random Eviction": "random_eviction", "H2O": "h2o",
    "StreamingLLM": "streamingllm", "MP-KVM": "mp-kvm", "KnormPress": "knorm",
}  # fmt: skip
SUMMARY = {
    "phase_1_baseline": "baselines",
    "phase_2_visualization": "partition",
    "phase_3_core": "sweep",
    "phase_4_ablation": "threshold x centroids",
    "phase_5_performance": "profiling",
}
AGGREGATOR = "python benchmarks/aggregator.py"  # its rows: benchmarks/results/aggregator.csv


def write(experiment: Experiment, out: Path, real: bool) -> None:
    """Every published file whose cells were measured, then the figures, then the summary."""
    for grid, name in (("baselines", "baseline"), ("baselines, synthetic", "synthetic")):
        entries = [_baseline(o) for o in _measured(experiment, grid)]
        if entries:
            shared.save(out / name / "enhanced_baseline_results.json", entries)
    _sweep(experiment, out / "compression_sweep")
    _ablation(experiment, out / "ablation")
    _analyses(experiment, out)
    profile = [_profile(o) for o in _measured(experiment, "profiling")]
    if profile:
        content = {"results": profile, "aggregator": {"command": AGGREGATOR}}
        shared.save(out / "performance" / "benchmark_results.json", content)
    _needles(experiment, out / "needles")
    drawn = figures(experiment, out)
    _summary(experiment, out, real, drawn)


def method(outcome: Outcome) -> str:
    """The published name of a recipe."""
    found = re.match(r"\w+", outcome.spec.recipe)
    return METHODS.get(found[0] if found else "", outcome.spec.recipe)


def _measured(experiment: Experiment, grid: str) -> list[Outcome]:
    return [o for o in experiment.grid(grid) if o.row is not None or o.failed]


def _seconds(outcome: Outcome) -> float | None:
    """Prefill and decoding of a document; of a task, everything."""
    row = outcome.row
    if isinstance(row, Row):
        return row.timing.ttft + row.timing.decode
    return None if row is None else row.took


def _baseline(outcome: Outcome) -> dict[str, Any]:
    return {
        "method": method(outcome),
        "recall": shared.of(outcome, "score"),
        "memory_usage": shared.of(outcome, "nbytes"),
        "compression_ratio": shared.of(outcome, "ratio"),
        "runtime_seconds": _seconds(outcome),
        "perplexity": shared.of(outcome, "decode_perplexity"),
        "kl": shared.of(outcome, "kl"),
        **shared.facts(outcome),
        "note": NOTE,
    }


def _sweep(experiment: Experiment, folder: Path) -> None:
    """A file per method, and all of them in one."""
    groups: dict[tuple[str, str | None], list[Outcome]] = {}
    for o in _measured(experiment, "sweep"):
        groups.setdefault((method(o), o.spec.budget), []).append(o)
    entries = [_point(name, held) for (name, _), held in groups.items()]
    for name in dict.fromkeys(e["method"] for e in entries):
        own = [e for e in entries if e["method"] == name]
        shared.save(folder / f"{FILES.get(name, 'other')}_results.json", own)
    if entries:
        shared.save(folder / "compression_sweep_results.json", entries)


def _point(name: str, held: list[Outcome]) -> dict[str, Any]:
    """A method at a budget, means over repeats."""
    first = held[0]
    recalls = [v for o in held if (v := shared.of(o, "score")) is not None]
    recall = summary(recalls) if recalls else None
    share = first.spec.budget
    rows = [o.row for o in held if isinstance(o.row, Row)]
    return {
        "method": name,
        "compression_ratio_target": float(share.rstrip("%")) / 100
        if share and "%" in share
        else 1.0,
        "compression_ratio_actual": shared.mean(shared.of(o, "retained") for o in held),
        "num_centroids": None,
        "centroid_bytes": shared.mean(float(r.bytes.by_part["centroids"]) for r in rows),
        "entries_per_head": shared.mean(r.series.entries[-1] for r in rows),
        "total_tokens": first.spec.options["tokens"],
        "recall_mean": recall.mean if recall else None,
        "recall_std": recall.deviation if recall else None,
        "perplexity": shared.mean(shared.of(o, "decode_perplexity") for o in held),
        "perplexity_no_compression": shared.mean(
            shared.of(o, "dense_decode_perplexity") for o in held
        ),
        "n_runs": len(held),
        **shared.facts(first),
        "note": f"{NOTE} Targets and actual shares are of a 16-bit dense cache (a full one in float32 is 2); a row counts the bytes of centroids, not centroids.",
    }


def _ablation(experiment: Experiment, folder: Path) -> None:
    found = [o for o in _measured(experiment, "threshold x centroids") if o.spec.recipe != "none"]
    if found:
        names = ("similarity_threshold", "max_centroids")
        entries = [{n: parameter(o.spec, n) for n in names} | _quality(o) for o in found]
        shared.save(folder / "ablation_results.json", {"results": entries, "note": NOTE})
    parts = [o for o in _measured(experiment, "components") if o.spec.recipe != "none"]
    if parts:
        entries = [{"configuration": o.spec.label} | _quality(o) for o in parts]
        shared.save(folder / "ablation_study_results.json", {"results": entries, "note": NOTE})


def _quality(outcome: Outcome) -> dict[str, Any]:
    change = shared.of(outcome, "change")
    return {
        "recall": shared.of(outcome, "score"),
        "ppl_no_compression": shared.of(outcome, "dense_decode_perplexity"),
        "ppl_with_compression": shared.of(outcome, "decode_perplexity"),
        "ppl_ratio": None if change is None else 1 + change,
        **shared.facts(outcome),
    }


def _analyses(experiment: Experiment, out: Path) -> None:
    """What the two analyses found, their tensors as lists."""
    rows = out / shared.ROWS
    for o in _analysed(experiment, "partition"):
        row, _ = manifold.load(folder_of(rows, "manifold", str(o.key)))
        content = {
            "total_tokens": row.setting.text.tokens, "topic_names": [t.name for t in row.topics],
            "topic_boundaries": [t.position for t in row.transitions], "dim": row.setting.model.head_dim,
            "centroids": len(row.setting.masses), "purity": row.purity, **shared.facts(o),
        }  # fmt: skip
        folder = "synthetic" if o.spec.synthetic else "manifold"
        shared.save(out / folder / "manifold_topic_data.json", content)
    for o in _analysed(experiment, "attention"):
        found, tensors = spectrum.load(folder_of(rows, "attention", str(o.key)))
        mass = tensors["mass"]
        content = {
            "attention_distributions": {
                "no_bias_weights": tensors["weight_without"].tolist(),
                "with_bias_weights": tensors["weight_with"].tolist(),
            },
            "centroid_sizes": mass.tolist(), "energy_biases": mass.log().tolist(),
            "bins": [vars(b) for b in found.bins], "energy": vars(found.energy), **shared.facts(o),
            "note": "per centroid and forward: mean share of a query's attention, without and with log(size)",
        }  # fmt: skip
        shared.save(out / "attention_analysis" / "attention_spectrum_data.json", content)


def _analysed(experiment: Experiment, grid: str) -> list[Outcome]:
    return [o for o in experiment.grid(grid) if o.key]


def _profile(outcome: Outcome) -> dict[str, Any]:
    names = ("ttft", "tpot", "tpot_worst", "throughput", "speedup", "nbytes", "peak")
    found = {n: shared.of(outcome, n) for n in names}
    return {"method": method(outcome), **found, **shared.facts(outcome)}


def _needles(experiment: Experiment, folder: Path) -> None:
    """A file per length of the context."""
    lengths: dict[str, list[Outcome]] = {}
    for o in _measured(experiment, "needles"):
        length = re.search(r"length=(\d+)", o.spec.task or "")
        lengths.setdefault(length[1] if length else "0", []).append(o)
    for size, held in lengths.items():
        entries = [
            {
                "method": method(o),
                "recall": shared.of(o, "score"),
                "depth": _depth(o),
                **shared.facts(o),
            }
            for o in held
        ]
        content = {"config": {"total_tokens": int(size)}, "results": entries, "note": NOTE}
        shared.save(folder / f"{size}_needle_results.json", content)


def _depth(outcome: Outcome) -> float | None:
    found = re.search(r"depth=([\d.]+)", outcome.spec.task or "")
    return float(found[1]) if found else None


def figures(experiment: Experiment, out: Path) -> list[Path]:
    """The six figures (the first one is two), as `kvloom report` draws them."""
    rows, folder = out / shared.ROWS, out / "figures"
    made: list[Path] = []
    for grid, kind, names in (
        (
            "partition",
            "manifold",
            {"1": "manifold_clustering", "1 transitions": "topic_transitions"},
        ),
        ("needles", "needles", {"": "needle_heatmap"}),
        ("sweep", "retention", {"": "performance_curve"}),
        ("threshold x centroids", "heat", {"": "ablation_study"}),
        ("components", "ablation", {"": "ablation_components"}),
        ("attention", "energy", {"1": "attention_energy_spectrum"}),
        ("profiling", "efficiency", {"": "efficiency_profile"}),
    ):
        if not any(o.key for o in experiment.grid(grid)):
            continue
        asked = next(f for f in experiment.figures if (f.kind, f.grid) == (kind, grid))
        label = " (synthetic)" if any(o.spec.synthetic for o in experiment.grid(grid)) else ""
        figure = Figure(kind, asked.title + label, grid, asked.options)
        made += shared.draw(experiment, rows, figure, folder, names)
    return made


def _summary(experiment: Experiment, out: Path, real: bool, drawn: list[Path]) -> None:
    phases = {name: len(_measured(experiment, grid)) for name, grid in SUMMARY.items()}
    phases["phase_2_visualization"] = len(_analysed(experiment, "partition"))
    failed = [{"cell": o.spec.label, "why": o.failed} for o in experiment.outcomes if o.failed]
    kept = [o for o in experiment.grid("sweep") if o.spec.budget and o.row is not None]
    content = {
        "data": "real" if real else "synthetic",
        "scale": experiment.scale,
        "experiment_phases": phases,
        "key_metrics": {
            f"{method(o)} @ {o.spec.budget}": {n: shared.of(o, n) for n in ("score", "change", "kl", "retained")}
            for o in kept
        },
        "paper_ready_figures": [p.name for p in drawn],
        "failed": failed,
        "rows": str(out / shared.ROWS),
    }  # fmt: skip
    shared.save(out / "experiment_summary.json", content)
