"""docs/from-the-papers.md: every published flag is in it, and its commands write the files that it names.

Running all the commands takes minutes: `make test-all` does.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvloom.core import registry
from kvloom.evaluation import published
from kvloom.evaluation.published import shared, streaming

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "from-the-papers.md").read_text(encoding="utf-8")
SCRIPTS = ROOT / "experiments" / "published"
# what the four systems promise, from their papers, READMEs and code
FLAGS = {
    "MP-KVM": "--use-real-model --quick --phase --skip-performance --model-path --help",
    "Streaming KVQuant": "--model_name --dataset --tasks --chunk_size --ema_decay --key_bits_normal --value_bits_normal "
    "--key_bits_sink_outlier --value_bits_sink_outlier --attention_sink_size --outlier_threshold_relative "
    "--outlier_detection_enabled --disable-outlier-detection --max_samples --output_dir --exp_name --n_trials",
    "KnormPress": "--keep_ratios --prune_after --skip_layers --num_wikitext_samples --num_pg19_samples",
    "Lazy pruning for StreamingLLM": "--n-sink --window-size --compress-every --cache-slack --max-drop --mode "
    "--max-eval-tokens --max-samples --output --method",
}
VARIABLES = "PYTHON_BIN MODEL_NAME HF_HOME HF_HUB_OFFLINE TRANSFORMERS_OFFLINE PG19_MAX_TOKENS WIKITEXT_MAX_TOKENS MAX_SAMPLES"
# what makes a command small enough for a test, and where it writes
TINY = {
    "run_complete_experiment": "--max-tokens 192 --output-dir mp",
    "run_phase_by_phase": "--max-tokens 192 --phase 1 --use-real-model --model-path testbed --output-dir real",
    "generate_paper_figures": "--output-dir mp",
    "run_compression_experiment": "--max_samples 1 --output_dir kvquant --exp_name exp --disable-outlier-detection",
    "ablation_study": "--max_tokens 200 --output_dir kvquant/ablation",
    "hyperparameter_tuning": "--n_trials 1 --output_dir kvquant/tuning",
    "baseline_test": "--max_tokens 160 --num_wikitext_samples 1 --num_pg19_samples 0 --output_dir baseline",
    "optimized_test": "--max_tokens 200 --keep_ratios 1.0,0.7 --prune_after 64 --skip_layers 0,1 "
    "--num_wikitext_samples 2 --num_pg19_samples 1 --output_dir knorm",
    "visualize_results": "--output_dir knorm",
    "run_paper_quick_check": "--output-dir lazy/check",
    "run_paper_experiments": "--output-dir lazy/paper",
    "eval_streaming_llm": "--max-eval-tokens 150 --n-sink 4 --window-size 124 --compress-every 8 --cache-slack 4 --max-drop 8 "
    "--baseline-positions 4 --output lazy/eval.json",
    "run_decode_perplexity": "--max-eval-tokens 150 --output lazy/decode.json",
    "compare_results": "--results-dir lazy/check",
    "generate_summary": "--results-dir lazy/check",
}
FOLDERS = {"MP-KVM": "mp", "Streaming KVQuant": "kvquant", "KnormPress": "knorm", "Lazy pruning for StreamingLLM": "lazy"}  # fmt: skip
DOTENV = "PG19_MAX_TOKENS=264\nWIKITEXT_MAX_TOKENS=264\n"
FIELDS = {
    "mp/baseline/enhanced_baseline_results.json": "method recall memory_usage compression_ratio runtime_seconds note",
    "mp/compression_sweep/mp-kvm_results.json": "compression_ratio_target compression_ratio_actual num_centroids "
    "total_tokens recall_mean recall_std perplexity n_runs",
    "mp/ablation/ablation_results.json": "similarity_threshold max_centroids recall ppl_no_compression "
    "ppl_with_compression ppl_ratio",
    "mp/attention_analysis/attention_spectrum_data.json": "no_bias_weights with_bias_weights centroid_sizes energy_biases",
    "mp/performance/benchmark_results.json": "ttft tpot throughput speedup peak",
    "mp/needles/192_needle_results.json": "method recall depth total_tokens",
    "mp/experiment_summary.json": "experiment_phases key_metrics paper_ready_figures data",
    "kvquant/exp_results.json": "config results_per_task args exact num_samples compression_ratio",
    "kvquant/ablation/ablation_results.json": "FP16 INT4 +Sink +Outlier Full decode_perplexity kl bits",
    "kvquant/tuning/tuning_results.json": "best_score best_recipe n_trials evaluation_history",
    "knorm/knormpress_results.json": "per_sample means dataset keep_ratio compression_percent sample ttft_ms tpot_ms "
    "throughput_tok_s memory_mb ppl prune_events",
    "lazy/eval.json": "metrics speedup tpot_ms ppl_increase_percent peak_memory_mb streaming baseline perplexity "
    "runtime_sec prefill_sec first_token_latency_sec decode_time_sec decode_tokens config env repeats",
}  # fmt: skip


def sections() -> dict[str, list[list[str]]]:
    """Heading -> rows of its table, the cells as text."""
    found: dict[str, list[list[str]]] = {}
    for part in TEXT.split("\n## ")[1:]:
        head, *lines = part.splitlines()
        rows = [[c.strip() for c in x.strip("|").split("|")] for x in lines if x.startswith("|")]
        found[head] = rows[2:]
    return found


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def commands() -> dict[str, list[str]]:
    """Published scripts in the tables' second column, with the arguments that stand there."""
    found: dict[str, list[str]] = {}
    for rows in sections().values():
        for code in (c for row in rows for c in quoted(row[1])):
            name, *arguments = shlex.split(code)
            if name.endswith((".py", ".sh")):
                found.setdefault(Path(name).stem, arguments)
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which every command of the page ran, with a `.env`."""
    folder, before, here = tmp_path_factory.mktemp("papers"), dict(os.environ), Path.cwd()
    (folder / ".env").write_text(DOTENV)
    os.chdir(folder)
    try:
        for name, arguments in commands().items():
            published.main(name, [*arguments, *shlex.split(TINY[name])])
        yield folder
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)


def test_every_published_flag_and_variable_is_in_the_page() -> None:
    for head, rows in sections().items():
        first = " ".join(code for row in rows for code in quoted(row[0]))
        for flag in FLAGS[head].split():
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", first), f"{head}: {flag}"
    for name in VARIABLES.split():
        assert f"`{name}`" in TEXT


def test_every_script_is_in_the_page_and_can_be_started() -> None:
    assert set(commands()) == set(published.SCRIPTS) == set(TINY)
    assert {p.stem for p in SCRIPTS.iterdir() if p.suffix in (".py", ".sh")} == set(TINY)
    for path in SCRIPTS.glob("*.sh"):
        assert os.access(path, os.X_OK)
        assert f'-m kvloom.evaluation.published {path.stem} "$@"' in path.read_text()
    for path in SCRIPTS.glob("*.py"):
        assert "main(__file__)" in path.read_text()


def test_flags_of_ours_are_flags_of_its_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    for head, rows in sections().items():
        scripts = [
            Path(shlex.split(c)[0]).stem
            for row in rows
            for c in quoted(row[1])
            if ".py" in c or ".sh" in c
        ]
        for name in dict.fromkeys(scripts):
            with pytest.raises(SystemExit) as end:
                published.main(name, ["--help"])
            assert end.value.code == 0
        known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
        for row in rows:
            ours = row[0] if row[1] == "the same" else row[1]
            asked = {
                f
                for code in quoted(ours)
                if code.startswith("--")
                for f in re.findall(r"--[\w-]+", code)
            }
            assert asked <= known, head


def test_other_commands_of_the_page_exist() -> None:
    from kvloom.cli.main import app

    makefile, codes = (ROOT / "Makefile").read_text(), quoted(TEXT)
    for target in (c.removeprefix("make ") for c in codes if c.startswith("make ")):
        assert f"\n{target}" in makefile
    for code in (c for c in codes if re.match(r"kvloom run experiments/\w+\.toml --", c)):
        arguments = shlex.split(code.replace("experiments/", f"{ROOT}/experiments/"))[1:]
        assert CliRunner().invoke(app, [*arguments, "--dry-run"]).exit_code == 0, code
    presets = {
        c
        for row in (row for rows in sections().values() for row in rows)
        if row[0].startswith("presets")
        for c in quoted(row[1])
    }
    assert len(presets) == 7 and presets <= set(registry.presets())


def test_comparisons_show_every_metric_that_was_claimed() -> None:
    from kvloom.evaluation.published import streaming_paper

    experiment, _ = streaming_paper._experiment(quick=True, samples=1)
    claimed = {c.metric for c in experiment.claims}
    assert claimed <= set(streaming_paper.METRIC_NAMES)
    head, *lines = streaming_paper._lines(experiment)
    (mit,) = [dict(zip(head, x, strict=True)) for x in lines if x[:2] == ["table 1", "MIT"]]
    assert mit["TPOT, ms (mean) (claimed)"] == "14.60"


@pytest.mark.full
@pytest.mark.parametrize("head", FOLDERS)
def test_every_published_file_is_written(ran: Path, head: str) -> None:
    here = {p.relative_to(ran / FOLDERS[head]).as_posix() for p in (ran / FOLDERS[head]).rglob("*")}
    ours = [
        c for row in sections()[head] for c in quoted(row[0] if row[1] == "the same" else row[1])
    ]
    files = [c for c in ours if re.fullmatch(r"[\w/{}.-]+\.(json|png|csv|md)", c)]
    assert len(files) >= 1
    for name in files:
        wanted = name.replace("{exp}", "exp").replace("{length}", "192")
        if "h2o" not in name:  # with --quick it is none of the sweep's methods
            assert any(p == wanted or p.endswith(f"/{wanted}") for p in here), name
    pictures = [p for p in (ran / FOLDERS[head]).rglob("*.png")]
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 5000 for p in pictures)


@pytest.mark.full
@pytest.mark.parametrize("name", FIELDS)
def test_files_have_the_published_fields(ran: Path, name: str) -> None:
    known = keys(json.loads((ran / name).read_text()))
    assert set(FIELDS[name].split()) <= known


def keys(value: Any) -> set[str]:
    """All names in a JSON value."""
    if isinstance(value, list):
        return set().union(*map(keys, value))
    if isinstance(value, dict):
        return set(value) | set().union(*map(keys, value.values()))
    return set()


def labels(value: Any) -> set[str]:
    """All values of `data` in a JSON value."""
    if isinstance(value, list):
        return set().union(*map(labels, value))
    if isinstance(value, dict):
        own = {value["data"]} if "data" in value else set()
        return own | set().union(*map(labels, value.values()))
    return set()


@pytest.mark.full
def test_generated_data_is_labelled_everywhere(ran: Path) -> None:
    files = [p for p in (ran / "mp").rglob("*.json") if "rows" not in p.parts]
    assert len(files) > 8
    for path in files:
        assert labels(json.loads(path.read_text())) == {"synthetic"}, path
    real = ran / "real" / "baseline" / "enhanced_baseline_results.json"
    assert labels(json.loads(real.read_text())) == {"real"}
    assert not (ran / "real" / "synthetic").exists()


@pytest.mark.full
def test_numbers_are_those_of_rows(ran: Path) -> None:
    rows = {o.key: o for o in shared.load(ran / "mp" / shared.ROWS).outcomes}
    entries = json.loads((ran / "mp/baseline/enhanced_baseline_results.json").read_text())
    assert {e["method"] for e in entries} == {"No Compression", "Random Eviction", "H2O", "StreamingLLM", "MP-KVM"}  # fmt: skip
    for entry in entries:
        outcome = rows[entry["row"]]
        assert entry["recall"] == shared.of(outcome, "score")
        assert entry["memory_usage"] == shared.of(outcome, "nbytes")
    pruned = json.loads((ran / "knorm/knormpress_results.json").read_text())["per_sample"]
    assert {(x["dataset"], x["keep_ratio"], x["sample"]) for x in pruned} == {
        (d, k, s)
        for d, n in (("wikitext", 2), ("pg19", 1))
        for k in (1.0, 0.7)
        for s in range(1, n + 1)
    }
    assert all((x["prune_events"] > 0) == (x["keep_ratio"] < 1) for x in pruned)


@pytest.mark.full
def test_the_streaming_json_is_checked(ran: Path, tmp_path: Path) -> None:
    both = streaming.read(ran / "lazy" / "eval.json")
    assert both.streaming is not None and both.baseline is not None
    assert both.metrics.speedup == pytest.approx(both.baseline.tpot_ms / both.streaming.tpot_ms)
    alone = streaming.read(ran / "lazy" / "decode.json")
    assert alone.baseline is None and alone.metrics.speedup is None
    assert "every=1" in json.dumps(alone.config) or alone.config["compress_every"] == "1"
    # .env: as many tokens as it says
    check = streaming.read(ran / "lazy" / "check" / "ours_best_r64.json")
    assert check.config["tokens"] == "264"
    fields = json.loads((ran / "lazy" / "eval.json").read_text())
    del fields["streaming"]["tpot_ms"]
    (tmp_path / "x.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="tpot_ms"):
        streaming.read(tmp_path / "x.json")


@pytest.mark.full
def test_the_same_command_measures_nothing_again(ran: Path) -> None:
    ledger = ran / "kvquant" / shared.ROWS / "results.jsonl"
    before = ledger.read_text()
    published.main("run_compression_experiment", ["--quick", *shlex.split(TINY["run_compression_experiment"])])  # fmt: skip
    assert ledger.read_text() == before


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("run_decode_perplexity", "--method kvpress", "make peers"),
        ("eval_streaming_llm", "--quick --max-eval-tokens 100", "--window-size 124"),
        ("optimized_test", "--keep_ratios 0.9,x", "'0.9,x'"),
        ("run_complete_experiment", "--max-tokens 12", "at least"),
        ("visualize_results", "--output_dir nowhere", "run the experiment first"),
        ("run_compression_experiment", "--quick --dataset key_value --tasks trec", "LongBench's"),
        ("run_compression_experiment", "--key_bits_normal 5", "key_bits_normal=5"),
    ],
)
def test_wrong_input_is_said_in_a_line(
    capsys: pytest.CaptureFixture[str], name: str, arguments: str, words: str
) -> None:
    with pytest.raises(SystemExit) as end:
        published.main(name, shlex.split(arguments))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
