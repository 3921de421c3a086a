"""The file of rows: rows are only ever appended, each by one write, and survive a kill.

A process that dies inside the write leaves a torn last line. It stays where it is, is never read as
a row, and the next row starts on a line of its own.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from kvloom.evaluation import results, task_results
from kvloom.evaluation.metrics import AnyRow
from kvloom.evaluation.results import Row
from kvloom.evaluation.task_results import TaskRow

NAME = "results.jsonl"
# how each of our lines begins, torn or not
_STARTS = {f'{{"schema":"{kind}"': row for kind, row in ((results.SCHEMA, Row), (task_results.SCHEMA, TaskRow))}  # fmt: skip


class Ledger:
    """The rows of one file.

    Raises, on construction, OSError if the file cannot be written and ValueError if it holds
    anything else than our rows; the file is then as before.

    Attributes:
        path: the file. rows: key -> row, a later row replacing an earlier one of the same key.
        torn: lines that a killed process left incomplete.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / NAME
        self.rows: dict[str, AnyRow] = {}
        self.torn = 0
        _check_writable(self.path)
        if self.path.exists():
            self._read(self.path.read_bytes())

    def _read(self, data: bytes) -> None:
        for number, line in enumerate(data.decode("utf-8", "replace").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = read_row(line)
            except json.JSONDecodeError:
                if not any(line.startswith(s) or s.startswith(line) for s in _STARTS):
                    raise ValueError(self._foreign(number, "it is not JSON")) from None
                self.torn += 1
            except ValueError as error:
                raise ValueError(self._foreign(number, str(error))) from None
            else:
                self.rows[row.key] = row

    def _foreign(self, number: int, reason: str) -> str:
        return (
            f"{self.path} line {number} is no row of this kvloom: {reason}; nothing was written, "
            "choose another output folder or move the file away"
        )

    def get(self, key: str) -> AnyRow | None:
        """The row of a cell, if it was measured before."""
        return self.rows.get(key)

    def append(self, row: AnyRow) -> None:
        """Add a row: one write at the end of the file, on the disk before this returns.

        Raises OSError if not all of it could be written (it then counts as torn).
        """
        line = row.to_json().encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists()
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":  # a torn line: leave it alone
                line = b"\n" + line
            written = os.write(handle, line)
            os.fsync(handle)
        finally:
            os.close(handle)
        if written != len(line):
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes were written")
        if fresh:
            _sync_folder(self.path.parent)
        self.rows[row.key] = row


def read_row(line: str) -> AnyRow:
    """A line of either kind. Raises ValueError if it is neither."""
    for start, kind in _STARTS.items():
        if line.startswith(start):
            return kind.from_json(line)
    return Row.from_json(line)  # which says what is wrong


def _check_writable(path: Path) -> None:
    """Raise OSError, naming the folder, if rows cannot be appended to `path`."""
    folder = next(
        p for p in path.parents if p.exists()
    )  # what is missing is made with the first row
    try:
        probe = folder / f".{path.name}.{os.getpid()}"
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT, 0o644))
        probe.unlink()
        if path.exists():
            os.close(os.open(path, os.O_RDWR | os.O_APPEND))
    except OSError as error:
        raise OSError(f"cannot write results to {path.parent}: {error}") from None


def _sync_folder(folder: Path) -> None:
    """Make a new file's name durable, where the system allows it."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
