"""Texts to token files, once: a tokenizer, and one flat uint16 file per source.

``books`` are the texts given on the command line, ``code`` the standard library without the
held-out modules, ``held_out`` those modules. Each document begins with the begin token.
"""

from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from kvloom.testbed import texts
from training import tokenizer as bpe

Tokens = NDArray[np.uint16]
SAMPLE_CHARS = 200_000
SAMPLE_BOOKS = 60


@dataclass(frozen=True)
class Corpus:
    tokenizer: Tokenizer
    books: Tokens
    code: Tokens
    held_out: Tokens


def prepare(source: Path, out: Path, vocab: int) -> Corpus:
    """Load the tokenised corpus from ``out``, building it first unless it is complete there."""
    identity = {"source": source.name, "bytes": _size(source), "vocab": vocab}
    done = out / "meta.json"
    known = json.loads(done.read_text()) if done.exists() else None
    if known is None:
        _build(source, out, vocab)
        done.write_text(json.dumps(identity))
    elif known != identity:
        raise ValueError(f"{out} was built from {known}, not from {identity}; use another --out")
    files = {n: np.memmap(out / f"{n}.bin", dtype=np.uint16, mode="r") for n in _NAMES}
    return Corpus(Tokenizer.from_file(str(out / "tokenizer.json")), **files)


_NAMES = ("books", "code", "held_out")


def fingerprint(corpus: Corpus) -> str:
    """Hash of the tokenizer and of the token files' sizes: what a checkpoint belongs to."""
    sizes = [len(corpus.books), len(corpus.code), len(corpus.held_out)]
    text = corpus.tokenizer.to_str() + json.dumps(sizes)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def documentation() -> list[str]:
    """The language reference that ships with Python for its ``help()``."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


def _build(source: Path, out: Path, vocab: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    books = list(texts.local_texts(source))
    if not any(book.strip() for book in books):
        raise ValueError(f"{source} holds no text to train on")
    random.Random(0).shuffle(books)
    code = [texts.read(path) for path in texts.stdlib_split(held_out=False)] + documentation()
    sample = [text[:SAMPLE_CHARS] for text in books[:SAMPLE_BOOKS]]
    tokenizer = bpe.train([*sample, *code[::2]], vocab)
    tokenizer.save(str(out / "tokenizer.json"))
    for name, documents in zip(_NAMES, (books, code, texts.held_out_texts()), strict=True):
        _encode(tokenizer, documents).tofile(out / f"{name}.bin")


def _encode(tokenizer: Tokenizer, documents: Iterable[str]) -> Tokens:
    parts = [np.array(tokenizer.encode(text).ids, dtype=np.uint16) for text in documents]
    return np.concatenate(parts)


def _size(source: Path) -> int:
    files = source.rglob("*") if source.is_dir() else [source]
    return sum(file.stat().st_size for file in files if file.is_file())
