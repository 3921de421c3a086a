"""What every benchmark shares: the model, interleaved timing, and CSV rows with provenance."""

from __future__ import annotations

import csv
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

RESULTS = Path(__file__).parent / "results"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu: seconds of work


SHAPES = {  # hidden, intermediate, layers, heads, KV heads
    "small": (512, 1408, 8, 8, 4),
    "1b": (2048, 8192, 16, 32, 8),
}


def benchmark_model(threads: int = 2, shape: str = "small") -> LlamaForCausalLM:
    """The Llama of all decode benchmarks: hidden 512, 8 layers, 8/4 heads of 64, fp32; `shape="1b"`: that
    of a model of a billion parameters. Weights are random.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    hidden, intermediate, layers, heads, kv = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=64, max_position_embeddings=131072,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def provenance(threads: int) -> dict[str, Any]:
    """Machine, versions, commit and time of a row."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "when": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": commit or "unknown",
        "machine": f"{_cpu()}, {os.cpu_count()} cores",
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu() -> str:
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    ):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def append_rows(name: str, rows: list[dict[str, Any]]) -> Path:
    """Append rows to `results/NAME.csv`; a file with other columns is refused, not overwritten."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    columns = list(rows[0])
    fresh = not path.exists()
    if not fresh:
        with path.open() as file:
            held = next(csv.reader(file))
        if held != columns:
            raise SystemExit(f"{path} has columns {held}, not {columns}: move it away first")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
    return path


def interleaved(
    calls: dict[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` times, taking turns; the order rotates every round.

    With `time.process_time` as the clock they are seconds of work, which other processes change less.
    """
    names, times = list(calls), {name: [] for name in calls}
    for i in range(warmup + repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = clock()
            calls[name]()
            taken = clock() - start
            if i >= warmup:
                times[name].append(taken)
    return times


def paired_ratio(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the ratios a/b of the same round."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else 3 * ratios
    return statistics.median(ratios), quartiles[0], quartiles[2]
