"""The training log: one CSV row every few steps, and the same as a line to read.

Speed is given per second of processor time too: unlike wall time it stands still while the process
is paused.
"""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path
from typing import Any

from training.config import Recipe

COLUMNS = ["step", "tokens", "length", "lr_scale", "loss", "wall_s", "tokens_per_cpu_s"]
COLUMNS += ["recall", "recall_unseen", "held_out_loss"]


class Log:
    """Appends to a CSV; on resuming, rows after the checkpoint are dropped: they come again."""

    def __init__(self, path: Path, step: int, seconds: float) -> None:
        _keep_until(path, step)
        self.file = path.open("a", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS, restval="")
        self.earlier, self.started = seconds, time.monotonic()
        self._reset()

    def close(self) -> None:
        self.file.close()

    def _reset(self) -> None:
        self.losses: list[float] = []
        self.count, self.cpu = 0, time.process_time()

    def seconds(self) -> float:
        """Wall time spent training, earlier sessions included."""
        return self.earlier + time.monotonic() - self.started

    def add(self, loss: float, length: int, tokens: int) -> None:
        self.losses.append(loss)
        self.length = length
        self.count += tokens

    def write(self, step: int, tokens: int, recipe: Recipe, measured: dict[str, float]) -> None:
        """Write a row over the steps since the last one."""
        row: dict[str, Any] = {
            "step": step,
            "tokens": tokens,
            "length": self.length,
            "lr_scale": round(recipe.optimizer.scale(tokens, recipe.total), 4),
            "loss": round(sum(self.losses) / len(self.losses), 4),
            "wall_s": round(self.seconds(), 1),
            "tokens_per_cpu_s": round(self.count / max(1e-9, time.process_time() - self.cpu)),
        } | {name: round(value, 4) for name, value in measured.items()}
        self.writer.writerow(row)
        self.file.flush()
        done = f"{100 * tokens / recipe.total:5.1f} %"
        print(done, *(f"{name} {value}" for name, value in row.items()), flush=True)
        self._reset()


def _keep_until(path: Path, step: int) -> None:
    """Write the rows up to ``step`` beside the log and rename: a kill then leaves the old or the new."""
    kept, part = _rows_until(path, step), path.with_name(f".part-{path.name}")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(kept)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _rows_until(path: Path, step: int) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["step"]) <= step]
