"""Checkpoints as safetensors and JSON: never a pickle, never half written.

    step-00001200/  state.json  tensors-00.safetensors  tensors-01.safetensors ...

A checkpoint is written beside its final name and renamed when complete; the last two are kept.
Tensors are split over files below 16 MiB, so that they pass through size-limited transfers.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

SHARD_BYTES = 15 * 2**20
KEPT = 2


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write one checkpoint atomically and delete all but the last ``KEPT``."""
    target, part = folder / f"step-{step:08d}", folder / f".part-{os.getpid()}"
    if target.exists():
        return target
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for index, shard in enumerate(_shards(tensors)):
        save_file(shard, part / f"tensors-{index:02d}.safetensors")
    (part / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
    for file in part.iterdir():
        _flush(file)
    part.rename(target)
    for old in steps(folder)[:-KEPT]:
        shutil.rmtree(old)
    return target


def steps(folder: Path) -> list[Path]:
    """Complete checkpoints below ``folder``, oldest first."""
    return sorted(folder.glob("step-*"))


def load(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    for shard in sorted(checkpoint.glob("tensors-*.safetensors")):
        tensors |= load_file(shard)
    return tensors, json.loads((checkpoint / "state.json").read_text())


def _shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    return shards


def _flush(file: Path) -> None:
    """Reach the disk before the rename does: a crash must not leave a complete-looking shell."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
