from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvloom.evaluation import compare, needles, texts


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


class Counting:
    """A tokenizer of `letters` that counts the characters it reads."""

    def __init__(self) -> None:
        self.read = 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        self.read += len(text)
        return letters(text, **options)


def test_of_a_large_text_only_the_start_is_read(tmp_path: Path) -> None:
    (tmp_path / "large.txt").write_text("0123456789 " * 200_000)
    tokenizer = Counting()
    found = texts.load(str(tmp_path / "large.txt"), tokenizer, 100, filler=300)
    assert found.ids.tolist() == letters("0123456789 " * 10)["input_ids"][:100]
    assert tokenizer.read < 100 * 64 and len(found.raw) == 300 * texts.FILLER


def test_a_text_of_long_words_is_read_until_enough(tmp_path: Path) -> None:
    def words(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    (tmp_path / "long.txt").write_text(f"{'x' * 300} " * 900)
    assert texts.load(str(tmp_path / "long.txt"), words, 400).ids.tolist() == [300] * 400


def test_a_cut_text_has_the_tokens_of_the_whole(tmp_path: Path) -> None:
    _, tokenizer = compare.load_model("testbed", "float32", "cpu")
    whole = next(text for text in texts.documents("stdlib") if len(text) > 30_000)
    (tmp_path / "t.py").write_text(whole)
    ids = texts.load(str(tmp_path / "t.py"), tokenizer, 300).ids.tolist()
    assert ids == tokenizer(whole, verbose=False)["input_ids"][:300]


def test_tasks_longer_than_the_text_get_enough_filler() -> None:
    _, tokenizer = compare.load_model("testbed", "float32", "cpu")
    raw = texts.load("stdlib", tokenizer, 200, filler=3000).raw
    assert len(needles.prepare(raw, tokenizer, 2, 3000, seed=0)) == 2


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
        ('{"text": 5}', "t.jsonl", ("t.jsonl", "'text'")),
        ("plain", "t.jsonl.xz", ("t.jsonl.xz", "cannot be read")),
        ("\x7fELF\0\0\0" * 50, "t.txt", ("t.txt", "not text in UTF-8", "150 of 350")),
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


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(bytes(range(128, 256)) * 9)
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "\xff"}')
    for name, words in (("t.txt", "t.txt.*not text in UTF-8"), ("t.jsonl", "cannot be read")):
        with pytest.raises(ValueError, match=words):
            texts.load(str(tmp_path / name), letters, 10)
    (tmp_path / "t.txt").write_bytes(b"one odd byte \xff in " * 9 + b"much else " * 999)
    assert len(texts.load(str(tmp_path / "t.txt"), letters, 10).ids) == 10


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
