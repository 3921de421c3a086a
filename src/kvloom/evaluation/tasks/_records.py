"""Tasks that others published, from where the user has them: a local file or folder, or the hub."""

from __future__ import annotations

import gzip
import importlib
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvloom.evaluation.tasks.base import Example

Record = dict[str, Any]
_OPENERS: dict[str, Callable[..., Any]] = {".jsonl": open, ".xz": lzma.open, ".gz": gzip.open}


def is_local(path: str) -> bool:
    """Whether a path names a file or folder, not a dataset of the hub."""
    return Path(path).exists() or path.endswith((".jsonl", ".jsonl.xz", ".jsonl.gz"))


def read(path: str) -> list[Record]:
    """The objects of a `.jsonl`, `.jsonl.xz` or `.jsonl.gz`. Raises ValueError if it cannot be read."""
    file = Path(path)
    if not path.endswith((".jsonl", ".jsonl.xz", ".jsonl.gz")):
        raise ValueError(f"data {path!r}: a .jsonl, .jsonl.xz or .jsonl.gz was expected")
    try:
        with _OPENERS[file.suffix](file, "rt", encoding="utf-8") as lines:
            found = [json.loads(line) for line in lines if line.strip()]
    except FileNotFoundError:
        raise ValueError(f"data {path!r}: there is no such file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"data {path!r}: a line is not JSON ({error})") from None
    except (OSError, lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"data {path!r} cannot be read: {error}") from None
    if not found or not all(isinstance(record, dict) for record in found):
        raise ValueError(f"data {path!r}: every line must be an object, and there must be one")
    return found


def hub(path: str, config: str, split: str = "test") -> list[Record]:
    """The rows of a dataset of the hub. Raises ValueError if it cannot be had."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise ValueError(
            f"data {path!r} is no local file or folder; to read it as a dataset of the hub, pip install "
            "'kvloom[hub]'"
        ) from None
    try:
        return [dict(row) for row in datasets.load_dataset(path, config, split=split)]
    except Exception as error:  # what goes wrong there has as many types as there are releases
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"data {path!r} is no local file or folder, and the hub did not give it as a dataset "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason'}); offline, or where it needs "
            "a loading script that datasets no longer runs, download it and name its .jsonl or folder"
        ) from None


def field(record: Record, name: str, path: str) -> Any:
    """A field of a record. Raises ValueError if it has none of this name."""
    if name not in record:
        raise ValueError(f"data {path!r}: a record has no {name!r} (it has: {', '.join(record)})")
    return record[name]


def choose(
    records: list[Record], count: int | None, seed: int, make: Callable[[Record], Example | None]
) -> list[Example]:
    """Examples of all records that give one, or of `count` of them drawn with a seed, in their order."""
    order = list(range(len(records)))
    if count is not None:
        random.Random(f"choose {seed}").shuffle(order)
    made: dict[int, Example] = {}
    for i in order:
        example = make(records[i])
        if example is not None:
            made[i] = example
        if len(made) == count:
            break
    return [made[i] for i in sorted(made)]
