from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from training import corpus, tokenizer

from kvloom.testbed import texts


@pytest.fixture(autouse=True)
def small_library(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = texts.stdlib_split(held_out=False)[:2], texts.stdlib_split(held_out=True)[:1]
    monkeypatch.setattr(texts, "stdlib_split", lambda held_out: modules[held_out])
    monkeypatch.setattr(corpus, "documentation", lambda: ["The if statement."])


def test_texts_are_tokenised_once_and_then_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "books"
    source.mkdir()
    (source / "one.txt").write_text("In 1834 there were 12 ships. " * 20)
    (source / "two.txt").write_text("Nobody counted them. " * 20)
    built = corpus.prepare(source, tmp_path / "data", vocab=400)
    assert np.count_nonzero(built.books == tokenizer.BEGIN_ID) == 2
    assert built.books.max() < 400 and built.books.dtype == np.uint16
    assert "12 ships" in built.tokenizer.decode(built.books.tolist())
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_build", pytest.fail)
        loaded = corpus.prepare(source, tmp_path / "data", vocab=400)
    assert corpus.fingerprint(loaded) == corpus.fingerprint(built)
    (source / "three.txt").write_text("More.")
    with pytest.raises(ValueError, match="use another --out"):
        corpus.prepare(source, tmp_path / "data", vocab=400)


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no text"):
        corpus.prepare(tmp_path / "books", tmp_path / "data", vocab=400)


def test_digits_stay_single_and_every_byte_has_a_token() -> None:
    bpe = tokenizer.train(["12345 12345 12345 one two"] * 50, vocab=300)
    assert bpe.encode("12345", add_special_tokens=False).tokens == list("12345")
    unusual = "naïve \u2603 \x00"
    assert bpe.decode(bpe.encode(unusual).ids) == unusual
