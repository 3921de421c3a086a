"""Texts to measure on: standard-library modules held out of training, or any local file or folder.

Every Python has the standard library, so perplexity can be measured anywhere without a download.
Which modules are held out is a property of their path alone, so it is the same in every Python
version and on every machine.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# Generated tables, vendored copies and test suites: plenty of bytes, little language.
SKIPPED = {"site-packages", "test", "tests", "encodings", "lib2to3", "idlelib", "pydoc_data"}
SKIPPED |= {"distutils", "entities.py", "_casefix.py"}
HELD_OUT_PERCENT = 8
SUFFIXES = {".txt", ".md", ".rst", ".py"}


def stdlib_root() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_modules() -> list[Path]:
    """Every source file of the standard library that is worth reading, in a stable order."""
    root = stdlib_root()
    files = (f for f in root.rglob("*.py") if not SKIPPED & set(f.relative_to(root).parts))
    return sorted(f for f in files if f.stat().st_size > 200)


def is_held_out(module: str) -> bool:
    """Whether a module, named by its path below the library root, is kept out of training."""
    digest = hashlib.sha256(f"kvloom held-out {module}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def stdlib_split(held_out: bool) -> list[Path]:
    """The held-out modules, or the ones used for training."""
    root = stdlib_root()
    return [f for f in stdlib_modules() if is_held_out(f.relative_to(root).as_posix()) == held_out]


def held_out_texts() -> list[str]:
    """Source text of the held-out standard-library modules."""
    return [read(path) for path in stdlib_split(held_out=True)]


def read(path: Path) -> str:
    """The text of a file, as UTF-8; what is not gets replacement characters."""
    return path.read_text(encoding="utf-8", errors="replace")


def local_texts(path: str | Path) -> Iterator[str]:
    """Documents of a ``.jsonl``/``.jsonl.xz`` (key ``text``), a text file, or a folder of them.

    Raises FileNotFoundError if there is none of these.
    """
    path = Path(path)
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix in SUFFIXES and file.is_file():
                yield read(file)
    elif path.name.endswith((".jsonl", ".jsonl.xz")):
        opener = lzma.open if path.suffix == ".xz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["text"]
    elif path.is_file():
        yield read(path)
    else:
        raise FileNotFoundError(f"{path} is neither a text file, a .jsonl(.xz), nor a folder")
