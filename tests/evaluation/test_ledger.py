from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvloom.evaluation.ledger import NAME, Ledger
from kvloom.evaluation.results import VERSION, Row
from tests.evaluation.conftest import changed


def test_rows_are_found_again(tmp_path: Path, row: Row) -> None:
    ledger = Ledger(tmp_path / "new" / "folder")
    assert not ledger.path.exists(), "nothing is written before the first row"
    ledger.append(row)
    ledger.append(changed(row, key="k1"))
    again = Ledger(tmp_path / "new" / "folder")
    assert again.rows == ledger.rows and list(again.rows) == ["k0", "k1"]
    assert again.get("k0") == row and again.get("other") is None
    assert again.path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("cut", [1, 9, 40, 400])
def test_a_torn_line_is_neither_read_nor_joined(tmp_path: Path, row: Row, cut: int) -> None:
    ledger = Ledger(tmp_path)
    ledger.append(row)
    with ledger.path.open("ab") as file:
        file.write(changed(row, key="torn").to_json().encode()[:cut])
    again = Ledger(tmp_path)
    assert (again.torn, list(again.rows)) == (1, ["k0"])
    again.append(changed(row, key="k1"))
    last = Ledger(tmp_path)
    assert (last.torn, list(last.rows)) == (1, ["k0", "k1"])


def test_a_whole_row_without_its_newline_counts(tmp_path: Path, row: Row) -> None:
    (tmp_path / NAME).write_text(row.to_json())
    ledger = Ledger(tmp_path)
    assert (ledger.torn, list(ledger.rows)) == (0, ["k0"])
    ledger.append(changed(row, key="k1"))
    assert list(Ledger(tmp_path).rows) == ["k0", "k1"]


def test_a_killed_writer_leaves_whole_rows(tmp_path: Path, row: Row) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from kvloom.evaluation.ledger import Ledger\n"
        "from tests.evaluation.conftest import ROW, changed\n"
        "ledger, i = Ledger(sys.argv[1]), 0\n"
        "while True:\n"
        "    ledger.append(changed(ROW, key=f'k{i}')); i += 1\n"
        "    print(i, flush=True)\n"
    )
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(root)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child:
        written = [int(child.stdout.readline()) for _ in range(20)][-1]
        child.send_signal(signal.SIGKILL)
    ledger = Ledger(tmp_path)
    assert len(ledger.rows) >= written and list(ledger.rows)[:written] == [
        f"k{i}" for i in range(written)
    ]
    ledger.append(row)
    assert "k0" in Ledger(tmp_path).rows


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("not ours\n", "not JSON"),
        ('{"recipe": "h2o", "ppl": 3}\n', "not a row of schema"),
        ("[1, 2]\n", "not a row of schema"),
        ("3\n", "not a row of schema"),
        (f'{{"schema":"kvloom.cell","version":{VERSION + 1}}}\n', f"version {VERSION + 1}"),
    ],
)
def test_a_foreign_file_is_refused_and_kept(
    tmp_path: Path, row: Row, content: str, word: str
) -> None:
    for before in ("", row.to_json() + "\n"):
        (tmp_path / NAME).write_text(before + content)
        with pytest.raises(ValueError, match=word) as error:
            Ledger(tmp_path)
        assert str(tmp_path / NAME) in str(error.value)
        assert (tmp_path / NAME).read_text() == before + content
        assert os.listdir(tmp_path) == [NAME]


def test_a_folder_is_made_with_the_first_row(tmp_path: Path, row: Row) -> None:
    ledger = Ledger(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    ledger.append(row)
    assert Ledger(tmp_path / "a" / "b").rows == {row.key: row}


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(OSError, match=r"cannot write results to .*file"):
        Ledger(tmp_path / "file")
    with pytest.raises(OSError, match=r"cannot write results to .*file.below"):
        Ledger(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "here"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error(tmp_path: Path, row: Row) -> None:
    ledger = Ledger(tmp_path)
    ledger.path = Path("/dev/full")
    with pytest.raises(OSError):
        ledger.append(row)
    assert ledger.rows == {}
