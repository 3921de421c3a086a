"""Recall of planted facts by generation: the context is compressed before the question is seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvloom.core.budget import Budget
from kvloom.evaluation.decoders import decoder_for, feed_prompt
from kvloom.evaluation.identity import tokens_sha256
from kvloom.evaluation.subjects import Subject
from kvloom.testbed import tasks

SPARE = 3  # tokens generated beyond the answer's own, since a tokenizer may split it otherwise
LEAST = 64  # tokens of a task: room for a planted fact and its question


@dataclass(frozen=True)
class Needle:
    """A task in tokens: the context `[C]`, the question `[Q]`, and how many tokens to generate."""

    task: tasks.Task
    context: Tensor
    question: Tensor
    new_tokens: int


def prepare(filler: str, tokenizer: Any, count: int, length: int, seed: int) -> list[Needle]:
    """`count` tasks of at most `length` tokens, the asked fact at evenly spread depths.

    Raises ValueError if the length has no room for a fact, or the filler is too short.
    """
    if count and length < LEAST:
        raise ValueError(f"needle tasks of {length} tokens: at least {LEAST} have room for a fact")

    def encode(text: str, special: bool = False) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    needles = []
    for i in range(count):
        depth = (i + 0.5) / count
        task = tasks.needle(
            seed * 1000 + i, filler, length, lambda text: len(encode(text)), depth=depth
        )
        context, question = encode(task.context, special=True), encode(task.question)
        new = len(encode(" " + task.answer)) + SPARE
        needles.append(Needle(task, torch.tensor(context), torch.tensor(question), new))
    shortest = min((len(n.context) + len(n.question) for n in needles), default=length)
    if shortest < 0.9 * length - 20:  # tasks keep some tokens spare
        raise ValueError(
            f"the text is too short for needle tasks of {length} tokens (one has {shortest}): use a "
            "longer text, shorter tasks or none"
        )
    return needles


def fingerprint(needles: list[Needle]) -> str:
    """Hash of all their token ids; empty without tasks."""
    if not needles:
        return ""
    return tokens_sha256(torch.cat([torch.cat([n.context, n.question]) for n in needles]))


def answered(
    model: Any,
    tokenizer: Any,
    subject: Subject,
    budget: Budget | None,
    needle: Needle,
    chunk: int = 0,
) -> bool:
    """Whether greedy generation from the compressed context gives the answer exactly.

    The context goes in at once, or `chunk` tokens at a time; the question after it, in one forward.
    """
    decoder = decoder_for(model, subject, budget)
    feed_prompt(decoder, needle.context, chunk)
    token = decoder.feed(needle.question)[-1].argmax().cpu()[None]
    chosen = [int(token)]
    while len(chosen) < needle.new_tokens:
        token = decoder.feed(token)[-1].argmax().cpu()[None]
        chosen.append(int(token))
    return needle.task.correct(str(tokenizer.decode(chosen)))
