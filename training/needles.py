"""Needle tasks in texts of a given length in tokens, and what a model answers to them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from kvloom.testbed import tasks

FACTS = (1, 2, 3, 4)


def needle_tasks(
    length: int,
    fillers: Sequence[str],
    tokenizer: Any,
    depths: int,
    unseen: bool,
    rounds: int = 1,
) -> list[tasks.Task]:
    """``rounds`` of every depth with every number of facts; seeded filler from a seeded text."""
    grid = itertools.product(range(rounds), range(depths), FACTS)
    made = []
    for seed, (_, step, facts) in enumerate(grid, start=10_000 * unseen):
        rng = random.Random(seed)
        text = rng.choice(fillers)
        start = rng.randrange(max(1, len(text) - 24 * length))
        made.append(
            tasks.needle(
                seed,
                text[start : start + 24 * length],
                length,
                lambda piece: len(tokenizer(piece, verbose=False).input_ids),
                facts=facts,
                depth=step / max(1, depths - 1),
                unseen=unseen,
            )
        )
    return made


@torch.no_grad()
def answer(model: Any, tokenizer: Any, task: tasks.Task, count: int = 0) -> str:
    """Greedy continuation of the prompt by ``count`` tokens, or one more than the answer needs."""
    inputs = tokenizer(task.prompt, return_tensors="pt").to(model.device)
    own = len(tokenizer(f" {task.answer}", add_special_tokens=False).input_ids)
    out = model.generate(**inputs, max_new_tokens=count or own + 1, do_sample=False)
    return tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def share(hits: Iterable[bool]) -> dict[str, float]:
    """How many of how many: ``all`` from 0 to 1, and ``count``."""
    right = list(hits)
    return {"all": round(sum(right) / len(right), 4), "count": len(right)}
