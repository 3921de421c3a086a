"""The text that a model is measured on: bundled, local, or from the Hugging Face hub."""

from __future__ import annotations

import importlib
import itertools
import json
import lzma
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvloom.evaluation import results
from kvloom.evaluation.identity import tokens_sha256
from kvloom.testbed import tasks, texts

_PAIRS = 24  # of a generated list


def lists(words: bool = False) -> Iterator[str]:
    """Generated key-value lists without end; the values are numbers, or words."""
    return (tasks.key_value(seed, _PAIRS, words=words).context for seed in itertools.count())


BUNDLED: dict[str, Callable[[], Iterable[str]]] = {
    "stdlib": texts.held_out_texts,
    "stdlib_train": lambda: map(texts.read, texts.stdlib_split(held_out=False)),
    "synthetic": lists,
    "synthetic_words": lambda: lists(words=True),
}
FILLER = 24  # characters of raw text per token asked for
_PER_TOKEN = 32  # characters of a long text that are tokenised at first for each token asked for
_BAD = 0.001  # share of characters that may be unreadable, as in a text with a few odd bytes
_UNSURE = 64  # tokens before a cut that might be others if the text went on
_LOCAL_SUFFIXES = (*sorted(texts.SUFFIXES), ".jsonl", ".xz")


@dataclass(frozen=True)
class Document:
    """The first tokens of a text.

    Attributes:
        name: as given. ids: int64 `[N]` on the CPU. raw: the text that gave them and what follows,
            as filler for retrieval tasks.
    """

    name: str
    ids: Tensor
    raw: str

    @property
    def facts(self) -> results.Text:
        return results.Text(self.name, tokens_sha256(self.ids), len(self.ids))


def load(name: str, tokenizer: Any, tokens: int, filler: int = 0, skip: int = 0) -> Document:
    """The first `tokens` tokens of a text behind `skip` others, its documents one after the other.

    Special tokens stand at the start only. `filler` asks for raw text for tasks of so many tokens,
    if the text has it. Raises ValueError if the text is unknown, unreadable, empty, too short, or no
    text.
    """
    ids: list[int] = []
    read: list[str] = []
    wanted = tokens + skip
    missing = FILLER * max(wanted, filler)  # characters
    for text in documents(name):
        if len(ids) < wanted:
            ids += _first_ids(text, tokenizer, wanted - len(ids), start=not ids)
        read.append(text[: max(0, missing)])
        missing -= len(text)
        if len(ids) >= wanted and missing <= 0:
            break
    if not any(text.strip() for text in read):
        raise ValueError(f"text {name!r} is empty: there is nothing to predict")
    if len(ids) < wanted:
        behind = f" behind {skip} others" if skip else ""
        raise ValueError(
            f"text {name!r} has {len(ids)} tokens, and {tokens}{behind} were asked for"
        )
    special = len(tokenizer("", verbose=False)["input_ids"])
    chosen = ids[:special] + ids[skip + special : wanted]
    return Document(name + (f" from {skip}" if skip else ""), torch.tensor(chosen), "\n".join(read))


def _first_ids(text: str, tokenizer: Any, tokens: int, start: bool) -> list[int]:
    """The first `tokens` ids of a text, or all if it has fewer; no more of it is read than needed."""
    characters = _PER_TOKEN * tokens + _UNSURE
    while True:
        part = text[:characters]
        ids: list[int] = tokenizer(part, add_special_tokens=start, verbose=False)["input_ids"]
        if len(part) == len(text) or len(ids) >= tokens + _UNSURE:
            return ids[:tokens] if len(part) < len(text) else ids
        characters *= 2


def documents(name: str) -> Iterator[str]:
    """The documents of a text.

    Args:
        name: `"stdlib"` (modules of the standard library held out of the testbed's training),
            `"stdlib_train"` (the others); `"synthetic"`, `"synthetic_words"` (generated lists); a text
            file, a `.jsonl` or
            `.jsonl.xz` of objects with a `text`, or a folder of text files; or a dataset of the
            hub as `"owner/name"`, `"owner/name:config"` or `"owner/name:config:split"`. `"#2"` at
            the end: from the document behind the first two.
    """
    name, first = _first_document(name)
    yield from itertools.islice(_documents(name), first, None)


def _first_document(name: str) -> tuple[str, int]:
    text, mark, number = name.rpartition("#")
    if not mark or not number.isdecimal() or Path(name).exists():
        return name, 0
    return text, int(number)


def _documents(name: str) -> Iterator[str]:
    if name in BUNDLED:
        yield from BUNDLED[name]()
    elif Path(name).exists() or name.endswith(_LOCAL_SUFFIXES):
        yield from _local(name)
    else:
        yield from _hub(name)


def _local(name: str) -> Iterator[str]:
    try:
        for text in texts.local_texts(name):
            _check_text(text, name)
            yield text
    except FileNotFoundError:
        raise ValueError(f"text {name!r}: there is no such file or folder") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"text {name!r}: a line is not JSON ({error})") from None
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"text {name!r}: every line must be an object with a 'text'") from None
    except (OSError, lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"text {name!r} cannot be read: {error}") from None


def _check_text(text: str, name: str) -> None:
    """Raise ValueError if this was no UTF-8 text: such bytes were read as replacement characters."""
    bad = text.count("\0") + text.count("\ufffd")
    if bad > len(text) * _BAD:
        raise ValueError(
            f"text {name!r} is not text in UTF-8: {bad:,} of {len(text):,} characters are NUL or could "
            "not be read; convert it, or name another file"
        )


def _hub(name: str) -> Iterator[str]:
    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    known = f"text {name!r} is neither bundled ({', '.join(BUNDLED)}) nor a local file or folder"
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise ValueError(
            f"{known}; to read it as a dataset of the hub, pip install 'kvloom[hub]'"
        ) from None
    try:  # streaming: a book or two, not the whole collection
        rows = datasets.load_dataset(path, config or None, split=split or "test", streaming=True)
        for row in rows:
            yield _text_of(row, name)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{known}, and the hub did not give it as a dataset "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason'}); offline, download "
            "it elsewhere and name the file"
        ) from None


def _text_of(row: dict[str, Any], name: str) -> str:
    if isinstance(row.get("text"), str):
        return str(row["text"])
    strings = [v for v in row.values() if isinstance(v, str)]
    if not strings:
        raise ValueError(f"dataset {name!r} has no column of text (columns: {', '.join(row)})")
    return max(strings, key=len)
