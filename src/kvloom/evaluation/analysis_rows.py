"""Results of an analysis in a folder: a row (one line of JSON), its tensors, and figures of both.

The row names its tensors by their sha256, so that figures are never made from a row and the numbers of
another run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from kvloom.evaluation.results import from_line, to_line
from kvloom.evaluation.subjects import file_sha256

VERSION = 2
Kind = TypeVar("Kind")


def check_folder(folder: Path, force: bool) -> None:
    """Raise ValueError if a folder holds something and may not be written over, or is no folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; name a folder for rows and figures")
    if not force and folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{str(folder)!r} is not empty; --force replaces what an analysis left there"
        )


def save(row: Any, tensors: dict[str, Tensor], folder: Path, name: str) -> Any:
    """Write `name.safetensors` and `name.jsonl`; the row as written, with the hash of its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.safetensors"
    save_file({key: x.contiguous() for key, x in tensors.items()}, data)
    row = dataclasses.replace(row, data=file_sha256(str(data)))
    line = to_line(row, f"kvloom.{name}", VERSION) + "\n"
    (folder / f"{name}.jsonl").write_text(line, encoding="utf-8")
    return row


def load(kind: type[Kind], folder: Path, name: str) -> tuple[Kind, dict[str, Tensor]]:
    """What `save` wrote. Raises ValueError if it is missing, of another kind, or does not belong together."""
    path, data = folder / f"{name}.jsonl", folder / f"{name}.safetensors"
    try:
        row = from_line(kind, path.read_text(encoding="utf-8"), f"kvloom.{name}", VERSION)
    except OSError as error:
        raise ValueError(f"{str(folder)!r} holds no results of this analysis: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    found = file_sha256(str(data))
    if found != row.data:
        raise ValueError(f"{data} ({found}) is not what {path} was made from ({row.data})")
    return row, load_file(data)
