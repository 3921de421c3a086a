from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from kvloom import testbed
from kvloom.testbed import texts


def test_held_out_modules_are_a_fixed_part_of_the_library() -> None:
    held_out, rest = texts.stdlib_split(held_out=True), texts.stdlib_split(held_out=False)
    assert not set(held_out) & set(rest)
    assert 0.04 < len(held_out) / (len(held_out) + len(rest)) < 0.12
    assert texts.is_held_out("shutil.py")
    assert not texts.is_held_out("argparse.py")


def test_held_out_texts_are_python_sources() -> None:
    documents = texts.held_out_texts()
    assert sum(len(document) for document in documents) > 300_000
    assert any("def rmtree(" in document for document in documents)


def test_local_texts_come_from_files_folders_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.md").write_text("second")
    (tmp_path / "folder" / "a.txt").write_text("first")
    (tmp_path / "folder" / "image.png").write_bytes(b"\x89")
    lines = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(("x", "y")))
    (tmp_path / "t.jsonl").write_text(lines)
    (tmp_path / "t.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    assert list(texts.local_texts(tmp_path / "folder")) == ["first", "second"]
    assert list(texts.local_texts(tmp_path / "folder" / "a.txt")) == ["first"]
    assert list(texts.local_texts(tmp_path / "t.jsonl")) == ["x", "y"]
    assert list(texts.local_texts(tmp_path / "t.jsonl.xz")) == ["x", "y"]
    with pytest.raises(FileNotFoundError, match=r"neither a text file"):
        list(texts.local_texts(tmp_path / "absent"))


def test_missing_weights_say_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(testbed, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"lacks config.json, model.safetensors"):
        testbed.path()
