"""Measure a finished model with a dense cache: recall by generation, loss, phenomena.

    python -m training.evaluate MODEL_DIR [--texts books_val.jsonl.xz]

Writes ``evaluation.json``, ``evaluation.md`` and figures beside the model. Held-out standard-library modules
are always measured; ``--texts`` adds documents of your own, as a second text and as needle filler.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvloom.testbed import tasks, texts
from training import figures, report
from training.loss import loss_by_context, loss_per_byte
from training.phenomena import phenomena

LENGTHS = (256, 512, 1024, 2048, 4096)
FACTS = (1, 2, 3, 4)
PAIRS = (8, 32, 64, 128)
OFTEN = 2048  # longer tasks are dear and have no target on a CPU: one round of them has to do


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
                lambda piece: len(tokenizer(piece).input_ids),
                facts=facts,
                depth=step / max(1, depths - 1),
                unseen=unseen,
            )
        )
    return made


@torch.no_grad()
def answer(model: Any, tokenizer: Any, task: tasks.Task) -> str:
    """Greedy continuation of the prompt, one token longer than the answer needs."""
    inputs = tokenizer(task.prompt, return_tensors="pt").to(model.device)
    count = len(tokenizer(f" {task.answer}", add_special_tokens=False).input_ids) + 1
    out = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def recall(
    model: Any,
    tokenizer: Any,
    fillers: Sequence[str],
    lengths: Iterable[int],
    depths: int,
    rounds: int,
) -> dict[str, Any]:
    """Share of exact answers by length, and by depth and number of facts within each length."""
    out: dict[str, Any] = {}
    for length, unseen in itertools.product(lengths, (False, True)):
        tally: dict[str, list[bool]] = defaultdict(list)
        times = rounds if length <= OFTEN else 1
        for task in needle_tasks(length, fillers, tokenizer, depths, unseen, times):
            right = task.correct(answer(model, tokenizer, task))
            for key in ("all", f"facts {task.facts}", f"depth {task.depth:.1f}"):
                tally[key].append(right)
        shares = {key: round(sum(hits) / len(hits), 4) for key, hits in tally.items()}
        shares["count"] = len(tally["all"])
        out.setdefault(str(length), {})["unseen" if unseen else "seen"] = shares
        print("recall", length, "unseen" if unseen else "seen", shares["all"], flush=True)
    return out


def key_value_recall(model: Any, tokenizer: Any, count: int = 40) -> dict[str, dict[str, float]]:
    """Share of exact values from lists of 8 to 128 keys, the asked key at evenly spread depths."""
    out = {}
    for pairs in PAIRS:
        made = [tasks.key_value(seed, pairs, depth=seed / (count - 1)) for seed in range(count)]
        right = [task.correct(answer(model, tokenizer, task)) for task in made]
        size = len(tokenizer(made[0].prompt).input_ids)
        out[str(pairs)] = {"all": round(sum(right) / count, 4), "count": count, "tokens": size}
        print("key-value", pairs, out[str(pairs)], flush=True)
    return out


def evaluate(
    model: Any,
    tokenizer: Any,
    books: Sequence[str],
    lengths: Sequence[int],
    depths: int,
    rounds: int = 1,
) -> dict[str, Any]:
    """All measurements of one model, as plain data."""
    code = texts.held_out_texts()
    sources = {"held-out stdlib": code} | ({"held-out books": list(books)} if books else {})
    longest = max(lengths)
    return {
        "loss": {name: loss_per_byte(model, tokenizer, t, longest) for name, t in sources.items()},
        "loss_by_context": {
            name: loss_by_context(model, tokenizer, t, lengths) for name, t in sources.items()
        },
        "recall": recall(model, tokenizer, _fillers(code, books, longest), lengths, depths, rounds),
        "key_value": key_value_recall(model, tokenizer),
        "phenomena": phenomena(model, tokenizer, list(books) or code),
    }


def _fillers(code: Sequence[str], books: Sequence[str], longest: int) -> list[str]:
    """Prose and code in equal parts, each text long enough for the longest prompt."""
    joined = "\n".join(code)
    parts = [joined[i : i + 48 * longest] for i in range(0, len(joined), 48 * longest)]
    prose = [b for b in books if len(b) > 24 * longest]
    return parts + prose * max(1, round(len(parts) / max(1, len(prose))))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, help="held-out documents: folder, .jsonl(.xz), text")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--depths", type=int, default=11)
    parser.add_argument("--rounds", type=int, default=3, help="needle tasks per depth and facts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for the results (default: MODEL_DIR)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    books = list(texts.local_texts(args.texts)) if args.texts else []
    results = evaluate(model, tokenizer, books, args.lengths, args.depths, args.rounds)
    out = args.out or args.model
    (out / "evaluation.json").write_text(json.dumps(results, indent=1))
    figures.draw(results, out / "figures")
    (out / "evaluation.md").write_text(report.evaluation(results))
    print(report.evaluation(results))


if __name__ == "__main__":
    main()
