"""Where figures and weights come from: hashes of files and texts, versions, the commit."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
# What a training run or an evaluation executes; what else changed in the checkout does not matter.
SOURCES = ("training", "src/kvloom/testbed/*.py")
PACKAGES = ("kvloom", "torch", "transformers", "tokenizers", "numpy")


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def texts_sha256(documents: Iterable[str]) -> str:
    """Hexadecimal SHA-256 of the documents in UTF-8, each followed by a zero byte."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode() + b"\0")
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Python, the packages that compute, and the machine: "CPU" or the name of the GPU."""
    found = {"python": platform.python_version()}
    found |= {package: _version(package) for package in PACKAGES}
    found["machine"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return found


def commit() -> str:
    """Commit of the checkout, ``+changed`` if its sources were; "unknown" outside of one."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    return f"{head}+changed" if _git("status", "--porcelain", "--", *SOURCES) else head


def _version(package: str) -> str:
    # torch says more of itself than its metadata does: whether it was built for CPUs.
    if package == "torch":
        return torch.__version__
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that was never installed
        return "unknown"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:  # no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None
