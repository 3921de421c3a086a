"""What exactly was measured, and where: hashes, versions, and the key of a cell."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from kvloom.core.policy import Policy
from kvloom.evaluation.results import SCHEMA, VERSION, Environment, Model, Text
from kvloom.kernels import ops

PACKAGE = Path(__file__).parents[1]
# Sources that only show results; changing them leaves every row valid.
_SHOWING = (
    "cli/", "evaluation/table.py", "evaluation/figures.py", "evaluation/analysis_figures.py",
    "evaluation/token_figures.py", "evaluation/statistics.py", "evaluation/report/",
)  # fmt: skip
_SOURCES = {".py", ".cpp", ".h", ".hpp", ".cu", ".cuh"}


def cell_key(**parts: Any) -> str:
    """Hash of everything that determines a cell: dataclasses, numbers and text."""
    plain = {k: dataclasses.asdict(v) if _is_record(v) else v for k, v in parts.items()}
    text = json.dumps({"schema": SCHEMA, "version": VERSION, **plain}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def tokens_sha256(ids: Tensor) -> str:
    """Hash of token ids of any shape, independent of dtype and byte order."""
    flat = ids.flatten().cpu().tolist()
    return hashlib.sha256(b"".join(n.to_bytes(8, "little", signed=True) for n in flat)).hexdigest()


def model_sha256(model: nn.Module) -> str:
    """Hash of a model's config and of every parameter and buffer as it is in memory."""
    digest = hashlib.sha256()
    digest.update(_config(model))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().data)  # no copy: models are large
    return digest.hexdigest()


def config_sha256(model: nn.Module) -> str:
    """Hash of a model's config, where it lies and who wrote it left out."""
    return hashlib.sha256(_config(model)).hexdigest()


def _config(model: nn.Module) -> bytes:
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    return json.dumps(config, sort_keys=True, default=str).encode()


def model_facts(model: nn.Module, name: str) -> Model:
    """The model's part of a row."""
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    heads = config.num_attention_heads
    return Model(
        name=name,
        sha256=model_sha256(model),
        type=config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        positions=getattr(config, "max_position_embeddings", None),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
    )


def calibration_facts(model: nn.Module, name: str, text: Text) -> dict[str, str]:
    """What a calibration says of its model, its text and the versions that made it.

    Of a file or folder it keeps the name alone, not where it lay on this machine.
    """
    return {
        "model": _basename(name),
        "model_sha256": model_sha256(model),
        "config_sha256": config_sha256(model),
        "text": _basename(text.name),
        "text_sha256": text.sha256,
        "text_tokens": str(text.tokens),
        "kvloom": installed("kvloom"),
        "torch": torch.__version__,
        "transformers": installed("transformers"),
    }


def _basename(name: str) -> str:
    return Path(name).resolve().name if Path(name).exists() else name


@cache
def source_sha256() -> str:
    """Hash of kvloom's sources, as far as they can influence a result."""
    digest = hashlib.sha256()
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in _SOURCES):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(_SHOWING):
            digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def foreign_sha256(policies: Iterable[Policy]) -> str:
    """Hash of the sources of policies that are not kvloom's own; empty if there are none.

    Their base classes' modules count, and the policies that they are made of. Where there is no
    module to read (a notebook, `__main__`), the answer is never the same twice.
    """
    foreign = sorted({m for p in policies for m in _foreign_modules(p)})
    text = "\0".join(map(_module_source, foreign))
    return hashlib.sha256(text.encode()).hexdigest() if foreign else ""


def _foreign_modules(policy: Policy) -> set[str]:
    own = {c.__module__ for c in type(policy).__mro__}
    known = ("kvloom", *sys.stdlib_module_names)
    found = {m for m in own if m == "__main__" or m.partition(".")[0] not in known}
    return found.union(*(_foreign_modules(p) for p in policy.inner))


def _module_source(name: str) -> str:
    try:
        return uuid4().hex if name == "__main__" else inspect.getsource(sys.modules[name])
    except (KeyError, OSError, TypeError):
        return uuid4().hex


def environment(device: torch.device) -> Environment:
    """The environment's part of a row."""
    return Environment(
        kvloom=installed("kvloom"),
        git=_commit(),
        source_sha256=source_sha256(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=installed("transformers"),
        platform=f"{platform.system()} {platform.machine()}",
        cpu=_cpu(),
        capability=torch.backends.cpu.get_cpu_capability(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        device=_device(device),
        backend=ops.serving(),
    )


def installed(package: str) -> str:
    """Version of a package; "unknown" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that was never installed
        return "unknown"


@cache
def _commit() -> str | None:
    """Commit of the checkout that this package is part of, or None if it was installed."""
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", ".")
    return f"{commit}+dirty" if commit and changed else commit


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:  # no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _device(device: torch.device) -> str:
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return f"{device.type}{name}"
