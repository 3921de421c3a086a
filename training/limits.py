"""Where the model ends: longer contexts, other ways of stating and asking, layers without a past.

What the model card says under its limits is measured here, so that nobody has to find it out.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from kvloom.testbed import phrases, tasks
from training.loss import bits_by_position, byte_lengths, token_losses, windows
from training.needles import answer, needle_tasks, share

BEYOND = (1.125, 1.25, 1.5)  # times the longest length that the model claims
DEPTHS = 6
CONTEXT, LEFT = 1024, 64
FREE_LENGTH, FREE_TASKS, FREE_TOKENS = 512, 24, 16

VALUE_FIRST = (
    "{value} is the {kind} of {name}'s {thing}.",
    "{value} stands on the {thing} of {name}.",
    "The {kind} {value} belongs to {name}'s {thing}.",
    "With {value} one opens {name}'s {thing}.",
)
NO_LEAD = (
    "What stands on {name}'s {thing}?",
    "Do you recall {name}'s {thing}?",
    "What is the {kind} of {name}'s {thing}?",
    "Which {kind} has the {thing} of {name}?",
)
NO_CUE = (
    "{name}'s {thing} has",
    "On the {thing} of {name} stands",
    "And so {name}'s {thing} carries",
    "Then {name} opened the {thing} with",
)
FORMS = {
    "as trained": (phrases.STATEMENTS, phrases.QUESTIONS),
    "sentence to complete, without its kind or a colon": (phrases.STATEMENTS, NO_CUE),
    "question that ends in a question mark": (phrases.STATEMENTS, NO_LEAD),
    "value stated before its owner": (VALUE_FIRST, phrases.QUESTIONS),
}


def beyond(model: Any, tokenizer: Any, fillers: Sequence[str]) -> dict[str, Any]:
    """Needle recall in contexts longer than the model claims, and bits per byte by position there."""
    longest = model.config.max_position_embeddings
    lengths = [int(factor * longest) for factor in BEYOND]
    recall = {}
    for length in lengths:
        made = needle_tasks(length, fillers, tokenizer, DEPTHS, unseen=False)
        recall[str(length)] = share(t.correct(answer(model, tokenizer, t)) for t in made)
        print("beyond", length, recall[str(length)], flush=True)
    rows = windows(tokenizer, fillers, lengths[-1], count=16)
    losses = torch.stack([token_losses(model, ids) for ids in rows])
    edges = [longest // 2, longest, *lengths]
    return {
        "recall": recall,
        "bits_per_byte_by_position": bits_by_position(
            losses, byte_lengths(tokenizer)[torch.tensor(rows)[:, 1:]], edges
        ),
    }


def forms(model: Any, tokenizer: Any, fillers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Share of tasks with one fact whose value is among the next 16 tokens, by form."""
    found = {}
    for name, (statements, questions) in FORMS.items():
        made = [free_task(s, fillers, tokenizer, statements, questions) for s in range(FREE_TASKS)]
        found[name] = share(
            task.answer in answer(model, tokenizer, task, FREE_TOKENS) for task in made
        )
        print("form", name, found[name], flush=True)
    return found


def free_task(
    seed: int,
    fillers: Sequence[str],
    tokenizer: Any,
    statements: Sequence[str],
    questions: Sequence[str],
) -> tasks.Task:
    """One fact in at most 512 tokens, stated and asked by templates that may name the value."""
    rng = random.Random(f"form {seed}")
    fact, text, depth = tasks.random_facts(rng, 1)[0], rng.choice(fillers), rng.random()
    start = rng.randrange(max(1, len(text) - 24 * FREE_LENGTH))
    statement, question = rng.choice(statements), rng.choice(questions)
    stated = statement.format(**vars(fact)) if "{value}" in statement else fact.state(statement)
    room = FREE_LENGTH - 64  # for statement, question and answer
    filler = tasks.fit(text[start:], room, lambda piece: len(tokenizer(piece).input_ids))
    context = tasks.plant(filler, [f"\n{stated}\n"], [depth])
    return tasks.Task(context, f"\n{fact.prefix(question)}", fact.value, depth, 1)


def layers(model: Any, tokenizer: Any, fillers: Sequence[str]) -> dict[str, Any]:
    """Recall when some layers keep only the newest 64 tokens of a context of 1,024.

    The context is read in full; then question and answer see no more of it in those layers.
    ``only``: one layer loses its past, ``all_but``: every other one does.
    """
    made = needle_tasks(CONTEXT, fillers, tokenizer, DEPTHS + 1, unseen=True)
    made = [task for task in made if task.depth < 1]  # at 1 the fact stands among what is kept
    every = range(model.config.num_hidden_layers)
    out: dict[str, Any] = {"tokens": CONTEXT, "left": LEFT}
    out["none"] = share(_correct(model, tokenizer, t, ()) for t in made)
    out["only"] = [share(_correct(model, tokenizer, t, {i}) for t in made) for i in every]
    out["all_but"] = [
        share(_correct(model, tokenizer, t, set(every) - {i}) for t in made) for i in every
    ]
    print("layers", out, flush=True)
    return out


@torch.no_grad()
def _correct(model: Any, tokenizer: Any, task: tasks.Task, cut: Iterable[int]) -> bool:
    """Whether every token of the answer is the likeliest one, teacher-forced."""
    prompt = tokenizer(task.prompt).input_ids
    expected = tokenizer(f" {task.answer}", add_special_tokens=False).input_ids
    tokens = torch.tensor([prompt + expected[:-1]], device=model.device)
    seen = len(tokenizer(task.context).input_ids)
    mask = visible(tokens.shape[1], seen).to(model.device)

    def masked(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": mask}

    with ExitStack() as hooks:
        for layer in cut:
            attention = model.model.layers[layer].self_attn
            hooks.enter_context(attention.register_forward_pre_hook(masked, with_kwargs=True))
        logits = model(tokens, use_cache=False).logits[0, -len(expected) :]
    return logits.argmax(-1).tolist() == expected


def visible(length: int, seen: int) -> Tensor:
    """Causal mask [1, 1, T, T] that hides all but 64 of the first ``seen`` tokens from later ones."""
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[seen:, : max(0, seen - LEFT)] = False
    return mask[None, None]
