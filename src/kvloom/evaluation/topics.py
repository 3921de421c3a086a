"""A document of known topics: passages of several texts in turn."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvloom.evaluation import texts
from kvloom.testbed import texts as bundled


def _reference() -> Iterable[str]:
    """Python's language reference."""
    return (text for _, text in sorted(pydoc_data.topics.topics.items()))


SOURCES: dict[str, Callable[[], Iterable[str]]] = {
    "code": bundled.held_out_texts,
    "reference": _reference,
    "lists": texts.lists,
}
SYNTHETIC = ("synthetic", "synthetic_words")  # topics of generated text


@dataclass(frozen=True)
class Labelled:
    """A document with topics.

    Attributes:
        topic: of each token, int64 `[N]`, an index into `names`.
    """

    document: texts.Document
    topic: Tensor
    names: list[str]


def plain(name: str, tokenizer: Any, tokens: int) -> Labelled:
    """A text of one topic; see `texts.load`."""
    document = texts.load(name, tokenizer, tokens)
    return Labelled(document, torch.zeros(tokens, dtype=torch.int64), [name])


def alternate(names: Sequence[str], tokenizer: Any, tokens: int, passage: int) -> Labelled:
    """`tokens` tokens: passages of `passage` from the texts in turn, each going on where it stopped.

    `names` are those of `SOURCES` or what `texts.load` takes. Special tokens stand at the start only.
    Raises ValueError on fewer than two texts, the same text twice, a document too short for one passage
    of each, or a text that has too few tokens.
    """
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"topics {', '.join(names)}: at least two different texts are needed, e.g. of "
            f"{', '.join(SOURCES)}"
        )
    if tokens < passage * len(names):
        raise ValueError(
            f"{tokens} tokens are too few for one passage of {passage} of each of {len(names)} topics; "
            "use a longer text or shorter passages"
        )
    start = tokenizer("")["input_ids"]
    topic = torch.arange(tokens) // passage % len(names)
    ids, raw = torch.empty(tokens, dtype=torch.int64), ""
    for i, name in enumerate(names):
        where = (topic == i).nonzero().flatten()
        special = start if i == 0 else []
        taken, text = _take(name, tokenizer, len(where) - len(special))
        ids[where] = torch.tensor([*special, *taken])
        raw += text
    title = f"{', '.join(names)} in turn by {passage}"
    return Labelled(texts.Document(title, ids, raw), topic, list(names))


def _take(name: str, tokenizer: Any, tokens: int) -> tuple[list[int], str]:
    """The first tokens of a text, without special ones, and what was read for them."""
    ids: list[int] = []
    read = ""
    for text in SOURCES[name]() if name in SOURCES else texts.documents(name):
        part = text[: texts.FILLER * (tokens - len(ids)) + texts.FILLER]
        ids += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        read += part
        if len(ids) >= tokens:
            return ids[:tokens], read
    raise ValueError(f"text {name!r} has {len(ids)} tokens, and {tokens} were asked for")
