"""A bench of a tiny random model, whose tokenizer knows bytes."""

from __future__ import annotations

from typing import Any

import torch

from kvloom.evaluation import needles
from kvloom.evaluation.compare import Bench
from kvloom.evaluation.results import Protocol
from kvloom.evaluation.texts import Document
from tests.models import VOCABULARY, build, tokens


class ByteTokenizer:
    """Bytes modulo the vocabulary; decodes to nonsense, as a random model deserves."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [2 + b % (VOCABULARY - 2) for b in text.encode()]}

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(32 + i % 90) for i in ids)


def bench(
    tasks: int = 0, model: Any = None, seed: int = 1, name: str = "tiny", **fields: Any
) -> Bench:
    protocol = Protocol(**{
        "tokens": 60, "prefill": 30, "prefill_runs": 1, "needles": tasks,
        "needle_tokens": 200 if tasks else 0, **fields,
    })  # fmt: skip
    tokenizer = ByteTokenizer()
    made = needles.prepare("many words of filler " * 99, tokenizer, tasks, 200, protocol.seed)
    document = Document("words", tokens(protocol.tokens, seed=seed)[0], "raw")
    return Bench(model or build("llama"), tokenizer, name, document, made, protocol)


def perturbed() -> Any:
    """The tiny model with one weight changed."""
    model = build("llama")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    return model
