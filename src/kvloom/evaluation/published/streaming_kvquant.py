"""Streaming KVQuant: `run_compression_experiment.py`, `ablation_study.py`, `hyperparameter_tuning.py`.

Contexts come in chunks of `--chunk_size`, and answers are generated through the quantized cache.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvloom.evaluation import experiment_file, search, tune
from kvloom.evaluation.experiment import Experiment, Outcome
from kvloom.evaluation.published import shared
from kvloom.evaluation.task_results import TaskRow
from kvloom.evaluation.tasks.longbench import KINDS
from kvloom.hf.compressed_model import CompressionConfig

MODEL = "meta-llama/Llama-2-7b-hf"
HUB = "THUDM/LongBench"
IDS = {"2wikimultihopqa": "2wikimqa", "multinews": "multi_news"}  # published names
QUICK_TASK = "key_value(pairs=24, examples={samples}, seed=1)"
TABLE = ("decode_perplexity", "change", "kl", "top1", "ratio", "saving", "bits")


def run_compression_experiment(argv: Sequence[str] | None = None) -> bool:
    """Tasks through one configuration; True if cells failed."""
    given = _compression_parser().parse_args(argv)
    quick = given.quick and given.dataset is None and not given.tasks
    shared.chosen(
        given, {"model_name": MODEL, "max_samples": 100, "dataset": "longbench"},
        {"model_name": "testbed", "max_samples": 2, "dataset": "key_value" if quick else "longbench"},
    )  # fmt: skip
    config = _config(given)
    tasks = _tasks(given)
    defaults = {
        "model": given.model_name, "device": given.device, "synthetic": given.dataset == "key_value",
        "dtype": "float32" if given.quick else "float16", "prefill_chunk": config.chunk_size,
    }  # fmt: skip
    grids = [
        {
            "name": name,
            "kind": "task",
            "task": task,
            "recipes": [f"{given.exp_name}: {config.recipe()}"],
        }
        for name, task in tasks.items()
    ]
    out: Path = given.output_dir
    found, _ = shared.written(out / f"{given.exp_name}.toml", given.exp_name, defaults, grids)
    shared.measure(found, [], out / shared.ROWS)
    content = {
        "config": config.to_dict(),
        "results_per_task": {name: _task(found, name) for name in tasks},
        "args": vars(given),
        "note": "score: the task's own metric, 0 to 1; full_cache: the same model without compression",
    }
    shared.save(out / f"{given.exp_name}_results.json", content)
    return any(o.failed for o in found.outcomes)


def _compression_parser() -> argparse.ArgumentParser:
    parser = shared.parser("run_compression_experiment", "Tasks through a streaming KVQuant cache.")
    parser.add_argument("--model_name", help=f"default {MODEL}")
    parser.add_argument("--device", default="auto", help="default: an accelerator if there is one")
    parser.add_argument("--dataset", choices=("longbench", "key_value"), help="default longbench")
    parser.add_argument("--tasks", nargs="+", help="of LongBench; default: all 16")
    parser.add_argument("--max_samples", type=int, help="per task; default 100")
    config = CompressionConfig()
    for name in ("chunk_size", "attention_sink_size", "key_bits_normal", "value_bits_normal",
                 "key_bits_sink_outlier", "value_bits_sink_outlier"):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=getattr(config, name))
    for name in ("ema_decay", "outlier_threshold_relative"):
        parser.add_argument(f"--{name}", type=float, default=getattr(config, name))
    parser.add_argument(
        "--outlier_detection_enabled", nargs="?", type=_boolean, const=True, default=True
    )
    parser.add_argument(
        "--disable-outlier-detection", dest="outlier_detection_enabled", action="store_false"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("results"))
    parser.add_argument("--exp_name", default="compression_exp")
    return parser


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r}: true or false")
    return text.lower() in ("true", "1")


def _config(given: argparse.Namespace) -> CompressionConfig:
    known = CompressionConfig().to_dict()
    return CompressionConfig.from_dict({k: v for k, v in vars(given).items() if k in known})


def _tasks(given: argparse.Namespace) -> dict[str, str]:
    """Published task name -> task; LongBench's data lie where LONGBENCH says, else on the hub."""
    if given.dataset == "key_value":
        if given.tasks:
            raise ValueError("--tasks are LongBench's: leave them out with --dataset key_value")
        return {"key_value": QUICK_TASK.format(samples=given.max_samples)}
    path = os.environ.get("LONGBENCH") or HUB
    prompts = os.environ.get("LONGBENCH_PROMPTS")
    wording = f", prompts={prompts!r}" if prompts else ""
    found = {}
    for name in given.tasks or KINDS:
        task = IDS.get(name, name)
        length = 512 if given.quick else 3500
        found[name] = (
            f"longbench(task={task!r}, path={path!r}, length={length}, examples={given.max_samples}{wording})"
        )
    return found


def _task(experiment: Experiment, name: str) -> dict[str, Any]:
    """What the published file has of a task: its metric by name, and counts."""
    held = experiment.grid(name)
    full, own = held[0], held[-1]  # the same where nothing is quantized
    row = own.row
    if not isinstance(row, TaskRow):
        return {"error": own.failed, **shared.facts(own)}
    return {
        row.task.metric: row.score, "score": row.score, "num_samples": len(row.answers),
        "full_cache": shared.of(full, "score"), "compression_ratio": row.bytes.ratio,
        "prompts": row.task.prompts, **shared.facts(own),
    }  # fmt: skip


def ablation_study(argv: Sequence[str] | None = None) -> bool:
    """FP16, INT4, +Sink, +Outlier, Full, Full with EMA .95; True if cells failed."""
    parser = shared.parser("ablation_study", "What each protection of streaming KVQuant is worth.")
    parser.add_argument("--model_name", help=f"default {MODEL}")
    parser.add_argument("--text", help="default: WikiText-2, bundled with --quick (not published)")
    parser.add_argument("--max_tokens", type=int, help="of the text (not published)")
    parser.add_argument("--output_dir", type=Path, default=Path("ablation_results"))
    given = parser.parse_args(argv)
    scale = "quick" if given.quick else "paper"
    found, _ = experiment_file.read(shared.source("streaming_kvquant"), scale, given.model_name)
    found.outcomes = found.grid("ablation")
    if given.text:
        shared.changed(found, lambda spec: dataclasses.replace(spec, text=given.text))
    if given.max_tokens:
        n = given.max_tokens
        shared.changed(found, lambda spec: shared.with_options(spec, tokens=n, prefill=n - n // 6))
    shared.measure(found, [], given.output_dir / shared.ROWS)
    lines = [_ablation_line(o) for o in found.outcomes]
    given.output_dir.mkdir(parents=True, exist_ok=True)
    path = given.output_dir / "ablation_analysis.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(lines[0]))
        table.writeheader()
        table.writerows(lines)
    print(f"wrote {path}")
    shared.save(
        given.output_dir / "ablation_results.json", {line["config_name"]: line for line in lines}
    )
    return any(o.failed for o in found.outcomes)


def _ablation_line(outcome: Outcome) -> dict[str, Any]:
    name = outcome.spec.name or "FP16"
    found = {n: shared.of(outcome, n) for n in TABLE}
    return {"config_name": name, **found, **shared.facts(outcome), "failed": outcome.failed}


def hyperparameter_tuning(argv: Sequence[str] | None = None) -> bool:
    """The published search space and objective; True if nothing could be measured."""
    parser = shared.parser(
        "hyperparameter_tuning", "Chunk, EMA, sinks and threshold by score x log(ratio + 1)."
    )
    parser.add_argument("--n_trials", type=int, default=40)
    parser.add_argument("--model_name", help="default: the bundled model")
    parser.add_argument("--output_dir", type=Path, default=Path("tuning_results"))
    given = parser.parse_args(argv)
    what = search.read(shared.source("tune/streaming_kvquant"), given.quick, given.model_name)
    trials = tune.run(what, given.output_dir, given.n_trials, told=lambda t: print(tune.shown(t)))
    winner = tune.best(trials)
    content = {
        "objective": f"{what.metric} x log(compression ratio + 1)",
        "best_score": None if winner is None or winner.objective is None else -winner.objective,
        "best_recipe": None if winner is None else winner.recipe,
        "n_trials": len(trials),
        "on": what.cell.task or what.cell.text,
        "data": "synthetic" if what.cell.synthetic else "real",
        "evaluation_history": [_trial(t) for t in trials],
        "study": str(given.output_dir / tune.STUDY),
    }
    shared.save(given.output_dir / "tuning_results.json", content)
    return winner is None


def _trial(trial: tune.Trial) -> dict[str, Any]:
    row = trial.row
    return {
        "trial": trial.number, "recipe": trial.recipe,
        "objective_score": None if trial.objective is None else -trial.objective,
        "score": row.score if isinstance(row, TaskRow) else None,
        "compression_ratio": None if row is None else row.bytes.ratio,
        "row": None if row is None else row.key, "failed": trial.failed,
    }  # fmt: skip
