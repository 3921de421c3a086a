from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvloom.evaluation import texts


def letters(text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
    """A tokenizer of characters, whose text starts with 0."""
    return {"input_ids": [0] * add_special_tokens + [ord(c) for c in text]}


def test_the_bundled_text_is_held_out_source() -> None:
    found = texts.load("stdlib", letters, 500)
    assert len(found.ids) == 500 and found.ids[0] == 0 and (found.ids[1:] != 0).all()
    assert len(found.raw) >= 500 * texts.FILLER
    assert found.facts.tokens == 500 and found.facts.name == "stdlib"


def test_documents_follow_each_other_with_one_start(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": t}) + "\n" for t in ("abc", "def", "ghi"))
    (tmp_path / "a.jsonl").write_text(lines)
    with lzma.open(tmp_path / "a.jsonl.xz", "wt") as file:
        file.write(lines)
    (tmp_path / "folder").mkdir()
    for name in ("1.txt", "2.md"):
        (tmp_path / "folder" / name).write_text({"1.txt": "abc", "2.md": "defg"}[name])
    for name in ("a.jsonl", "a.jsonl.xz", "folder"):
        assert texts.load(str(tmp_path / name), letters, 7).ids.tolist() == [0, *map(ord, "abcdef")]


def test_the_hash_is_of_the_tokens(tmp_path: Path) -> None:
    for name, text in (("a.txt", "abcd"), ("b.txt", "abcx"), ("c.txt", "bbcd")):
        (tmp_path / name).write_text(text)
    shas = [
        texts.load(str(tmp_path / n), letters, 4).facts.sha256 for n in ("a.txt", "b.txt", "c.txt")
    ]
    assert shas[0] == shas[1] != shas[2]


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("", "t.txt", ("t.txt", "empty")),
        (" \n\n ", "t.txt", ("t.txt", "empty")),
        ("short", "t.txt", ("6 tokens", "100 were asked for")),
        (None, "none.txt", ("none.txt", "no such file")),
        (None, "none.jsonl.xz", ("none.jsonl.xz", "no such file")),
        ("not json", "t.jsonl", ("t.jsonl", "not JSON")),
        ('{"title": "x"}', "t.jsonl", ("t.jsonl", "'text'")),
        ("[1]", "t.jsonl", ("t.jsonl", "'text'")),
        ("plain", "t.jsonl.xz", ("t.jsonl.xz", "cannot be read")),
    ],
)
def test_a_wrong_text_is_named(
    tmp_path: Path, content: str | None, name: str, words: tuple[str, ...]
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        texts.load(str(tmp_path / name), letters, 100)
    assert all(word in str(error.value) for word in words)


def test_an_empty_folder_is_empty(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        texts.load(str(tmp_path), letters, 10)


# -- datasets of the hub -------------------------------------------------------------------------


def test_without_the_library_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"'some/data' is neither .* pip install 'kvloom\[hub\]'"):
        texts.load("some/data", letters, 10)


@pytest.mark.parametrize("error", [ConnectionError("no route"), ValueError("x\ny"), OSError()])
def test_offline_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"'some/data'.*hub.*download it elsewhere"):
        texts.load("some/data", letters, 10)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("some/data", ("some/data", None, "test")),
        ("some/data:raw", ("some/data", "raw", "test")),
        ("some/data:raw:validation", ("some/data", "raw", "validation")),
        ("some/data::train", ("some/data", None, "train")),
    ],
)
def test_a_dataset_is_streamed(
    monkeypatch: pytest.MonkeyPatch, name: str, asked: tuple[Any, ...]
) -> None:
    calls = []

    def load_dataset(path: str, config: str | None, split: str, streaming: bool) -> Any:
        calls.append((path, config, split))
        assert streaming
        return iter([{"id": "1", "text": "abc"}, {"title": "x", "content": "defg"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert texts.load(name, letters, 8).ids.tolist() == [0, *map(ord, "abcdefg")]
    assert calls == [asked]


def test_a_dataset_without_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = SimpleNamespace(load_dataset=lambda *a, **k: iter([{"label": 1}]))
    monkeypatch.setitem(sys.modules, "datasets", data)
    with pytest.raises(ValueError, match=r"no column of text \(columns: label\)"):
        texts.load("some/data", letters, 8)
