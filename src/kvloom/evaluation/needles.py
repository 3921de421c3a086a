"""Recall of planted facts by generation: the context is compressed before the question is seen."""

from __future__ import annotations

from typing import Any

import torch

from kvloom.core.budget import Budget
from kvloom.evaluation import answering
from kvloom.evaluation.answering import Asked
from kvloom.evaluation.decoders import decoder_for, feed_prompt
from kvloom.evaluation.identity import tokens_sha256
from kvloom.evaluation.subjects import Subject
from kvloom.evaluation.tasks import needle
from kvloom.evaluation.tasks.base import LEAST


def prepare(filler: str, tokenizer: Any, count: int, length: int, seed: int) -> list[Asked]:
    """`count` tasks of at most `length` tokens, the asked fact at evenly spread depths.

    Raises ValueError if the length has no room for a fact, or the filler is too short.
    """
    if count and length < LEAST:
        raise ValueError(f"needle tasks of {length} tokens: at least {LEAST} have room for a fact")
    if not count:
        return []
    task = needle.Needle(length=length, examples=count, seed=seed)
    return answering.prepare(task, tokenizer, "blind", filler).asked


def fingerprint(needles: list[Asked]) -> str:
    """Hash of all their token ids; empty without tasks."""
    if not needles:
        return ""
    return tokens_sha256(torch.cat([torch.cat([n.context, n.question]) for n in needles]))


def answered(
    model: Any, tokenizer: Any, subject: Subject, budget: Budget | None, asked: Asked, chunk: int = 0
) -> bool:  # fmt: skip
    """Whether greedy generation from the compressed context gives the answer exactly.

    The context goes in at once, or `chunk` tokens at a time; the question after it, in one forward.
    """
    decoder = decoder_for(model, subject, budget)
    feed_prompt(decoder, asked.context, chunk)
    logits = decoder.feed(asked.question)
    text = answering.answer(model, tokenizer, decoder, logits, asked.example)
    return needle.Needle().score(asked.example, text) == 1
