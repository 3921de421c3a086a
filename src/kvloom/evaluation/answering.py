"""Answers to a task's examples, generated greedily through a compressed cache.

`blind`: the context goes in and is compressed before the question is seen; `sighted`: the question is in
view. Both feed the same tokens: those of the context, then those of the question. In view, the last of them
goes in by itself, so that the first token of an answer, too, is read through the compressed cache.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvloom.core.budget import Budget
from kvloom.evaluation import disjoint
from kvloom.evaluation.decoders import Decoder, Final, decoder_for, feed_prompt, final
from kvloom.evaluation.identity import tokens_sha256
from kvloom.evaluation.matching import Probe
from kvloom.evaluation.measure import Advance, allowed, probed
from kvloom.evaluation.results import Counts
from kvloom.evaluation.subjects import Subject
from kvloom.evaluation.task_results import Answer, Held, TaskFacts
from kvloom.evaluation.tasks import Example, Task

VIEWS = ("blind", "sighted")


@dataclass(frozen=True)
class Asked:
    """An example in tokens: context `[C]` and question `[Q]`, int64 on the CPU."""

    example: Example
    context: Tensor
    question: Tensor

    @property
    def tokens(self) -> int:
        """Of context and question."""
        return len(self.context) + len(self.question)

    @property
    def sha256(self) -> str:
        """Hash of all that determines what is asked and what counts."""
        e = self.example
        ids = [tokens_sha256(self.context), tokens_sha256(self.question)]
        text = json.dumps([*ids, e.answers, e.max_new_tokens, e.stop, e.classes])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Prepared:
    """A task with its examples in tokens. sha256: of them all. tokens: mean of an example's."""

    task: Task
    view: str
    asked: list[Asked]

    @property
    def sha256(self) -> str:
        """Of all examples, in order."""
        return hashlib.sha256("".join(a.sha256 for a in self.asked).encode()).hexdigest()

    @property
    def tokens(self) -> float:
        """Mean length of context and question."""
        return statistics.fmean(a.tokens for a in self.asked)

    def facts(self, chunk: int) -> TaskFacts:
        """The task's part of a row."""
        return TaskFacts(
            task=str(self.task),
            family=self.task.family,
            metric=self.task.metric,
            sha256=self.sha256,
            examples=len(self.asked),
            tokens=self.tokens,
            prompts=self.task.wording,
            view=self.view,
            prefill_chunk=chunk,
        )


def encode(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Token ids of a text, with the special ones that begin a sequence if asked for."""
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def ask(example: Example, tokenizer: Any) -> Asked:
    """An example in tokens. Raises ValueError if its context or its question is empty."""
    context = encode(tokenizer, example.context, special=True)
    question = encode(tokenizer, example.question)
    if not example.context or not question:
        raise ValueError("an example needs a context and a question, and one of them is empty")
    return Asked(example, torch.tensor(context), torch.tensor(question))


def prepare(task: Task, tokenizer: Any, view: str, filler: str) -> Prepared:
    """The task's examples in tokens; `filler` is raw text, of at least `task.filler_tokens` tokens.

    Raises ValueError on an unknown view, or a task that cannot be made.
    """
    if view not in VIEWS:
        raise ValueError(f"view {view!r}: one of {', '.join(VIEWS)}")
    examples = task.make(lambda text: len(encode(tokenizer, text)), filler)
    if not examples:
        raise ValueError(f"task '{task}' has no examples")
    return Prepared(task, view, [ask(example, tokenizer) for example in examples])


def check(
    model: Any, subject: Subject, budget: Budget | None, prepared: Prepared, text: str
) -> None:
    """Raise ValueError if the subject cannot be measured; `text` names what the examples are made of."""
    decoder_for(model, subject, budget)
    ids = [torch.cat([a.context, a.question]) for a in prepared.asked]
    disjoint.check(subject, text, ids)


def measure(
    model: Any, tokenizer: Any, subject: Subject, budget: Budget | None, prepared: Prepared,
    chunk: int, advance: Advance,
) -> tuple[Held, Counts, list[Answer]]:  # fmt: skip
    """Answer all examples, each through a fresh cache; `advance` is told of their tokens.

    A context goes in at once, or `chunk` tokens at a time; with the question in view, both do.
    """
    filled, ends, answers = [], [], []
    for asked in prepared.asked:
        decoder = decoder_for(model, subject, budget)
        logits, held = _read(decoder, asked, prepared.view, chunk)
        filled.append(held)
        text = answer(model, tokenizer, decoder, logits, asked.example)
        ends.append((decoder.nbytes(), final(decoder).counts))
        score = prepared.task.score(asked.example, text)
        expected, depth = list(asked.example.answers), asked.example.depth
        answers.append(Answer(score, text, expected, asked.tokens, depth))
        advance(asked.tokens)
    peak = max(nbytes for nbytes, _ in ends)
    return _held(filled, budget, peak), _sum([c for _, c in ends]), answers


def probe(
    model: Any, subject: Subject, budget: Budget, target: Budget, prepared: Prepared, chunk: int
) -> Probe:
    """What a subject holds under `budget` when contexts were compressed, against what `target` means."""
    filled = []
    for asked in prepared.asked:
        decoder = decoder_for(model, subject, budget)
        filled.append(_read(decoder, asked, prepared.view, chunk)[1])
    held = _held(filled, target, 0)
    evicted = sum(f.end.counts.evicted for f in filled)
    return probed(target, held.mean, held.other_mean, held.dense_mean, held.floor, evicted)


def answer(model: Any, tokenizer: Any, decoder: Decoder, logits: Tensor, example: Example) -> str:
    """What the model writes after a prompt that ended in `logits`."""

    def stop(ids: list[int]) -> bool:
        return "\n" in str(tokenizer.decode(ids)).lstrip("\n")

    ids = greedy(
        decoder, logits, example.max_new_tokens, end_tokens(model, tokenizer),
        stop if example.stop == "line" else None,
    )  # fmt: skip
    return str(tokenizer.decode(ids))


def read(decoder: Decoder, prompt: Tensor, chunk: int = 0) -> Tensor:
    """Feed a prompt `[n]`; logits `[1, V]` of its last token, which goes in after all else was compressed."""
    if len(prompt) > 1:
        feed_prompt(decoder, prompt[:-1], chunk)
    return decoder.feed(prompt[-1:])


def greedy(
    decoder: Decoder, logits: Tensor, limit: int, ends: frozenset[int] = frozenset(),
    stop: Callable[[list[int]], bool] | None = None,
) -> list[int]:  # fmt: skip
    """The likeliest tokens after `logits [.., V]`, one by one, at most `limit`.

    It ends before a token of `ends`, and after one that makes `stop` true.
    """
    chosen: list[int] = []
    while True:
        token = logits[-1].argmax().cpu()[None]
        if int(token) in ends:
            return chosen
        chosen.append(int(token))
        if len(chosen) >= limit or (stop is not None and stop(chosen)):
            return chosen
        logits = decoder.feed(token)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text, by the model's generation config and the tokenizer."""
    found: set[int] = set()
    config = getattr(model, "generation_config", None)
    for holder in (config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return frozenset(found)


# -- bytes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Filled:
    """A cache when its context has been compressed."""

    nbytes: int
    other: int
    end: Final


def _read(decoder: Decoder, asked: Asked, view: str, chunk: int) -> tuple[Tensor, _Filled]:
    """Feed context and question; logits of the last token, and what the cache held (see `Held`)."""
    if view == "sighted":
        logits = read(decoder, torch.cat([asked.context, asked.question]), chunk)
        return logits, _filled(decoder)
    feed_prompt(decoder, asked.context, chunk)
    held = _filled(decoder)
    return decoder.feed(asked.question), held


def _filled(decoder: Decoder) -> _Filled:
    return _Filled(decoder.nbytes(), decoder.other_nbytes(), final(decoder))


def _held(filled: list[_Filled], budget: Budget | None, peak: int) -> Held:
    dense = statistics.fmean(f.end.dense for f in filled)
    return Held(
        mean=statistics.fmean(f.nbytes for f in filled),
        other_mean=statistics.fmean(f.other for f in filled),
        dense_mean=dense,
        allowed=allowed(budget, dense),
        floor=max(f.end.floor for f in filled),
        peak=peak,
    )


def _sum(counts: list[Counts]) -> Counts:
    return Counts(
        compressions=sum(c.compressions for c in counts),
        evicted=sum(c.evicted for c in counts),
        merged=sum(c.merged for c in counts),
        sealed=sum(c.sealed for c in counts),
        compactions=sum(c.compactions for c in counts),
    )
