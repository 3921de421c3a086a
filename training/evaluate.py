"""Measure a finished model with a dense cache: recall by generation, loss, phenomena.

    python -m training.evaluate MODEL_DIR [--texts books_val.jsonl.xz] [--parts loss recall ...]

Writes ``evaluation.json`` beside the model, after every part, with the hash of the weights and what each
part was measured with; parts of the same weights and texts are kept. Once all parts are there, the
pages of ``training.card`` follow. Held-out standard-library modules are always measured; ``--texts``
adds documents of your own, as a second text and as needle filler.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvloom.testbed import tasks, texts
from training import card, provenance
from training.limits import beyond, forms, layers
from training.loss import loss_by_context, loss_per_byte
from training.needles import answer, needle_tasks, share
from training.phenomena import phenomena
from training.provenance import file_sha256, texts_sha256

PARTS = ("loss", "loss_by_context", "recall", "key_value", "phenomena", "beyond", "forms", "layers")
CODE, BOOKS = "held-out stdlib", "held-out books"
LENGTHS = (256, 512, 1024, 2048, 4096)
PAIRS = (8, 32, 64, 128)
OFTEN = 2048  # longer tasks are dear and have no target on a CPU: one round of them has to do


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
        size = len(tokenizer(made[0].prompt).input_ids)
        found = share(task.correct(answer(model, tokenizer, task)) for task in made)
        out[str(pairs)] = {**found, "tokens": size}
        print("key-value", pairs, out[str(pairs)], flush=True)
    return out


def evaluate(
    model: Any,
    tokenizer: Any,
    books: Sequence[str],
    lengths: Sequence[int],
    depths: int,
    rounds: int = 1,
    parts: Sequence[str] = PARTS,
) -> Iterator[tuple[str, Any]]:
    """The measurements of one model, part by part: its name and its results as plain data."""
    code, longest = texts.held_out_texts(), max(lengths)
    sources = {CODE: code} | ({BOOKS: list(books)} if books else {})
    fillers = _fillers(code, books, longest)

    def per_source(measure: Callable[..., Any], argument: Any) -> dict[str, Any]:
        return {name: measure(model, tokenizer, t, argument) for name, t in sources.items()}

    measures: dict[str, Callable[[], Any]] = {
        "loss": lambda: per_source(loss_per_byte, longest),
        "loss_by_context": lambda: per_source(loss_by_context, lengths),
        "recall": lambda: recall(model, tokenizer, fillers, lengths, depths, rounds),
        "key_value": lambda: key_value_recall(model, tokenizer),
        "phenomena": lambda: phenomena(model, tokenizer, list(books) or code),
        "beyond": lambda: beyond(model, tokenizer, fillers),
        "forms": lambda: forms(model, tokenizer, fillers),
        "layers": lambda: layers(model, tokenizer, fillers),
    }
    for part in parts:
        yield part, measures[part]()


def _fillers(code: Sequence[str], books: Sequence[str], longest: int) -> list[str]:
    """Prose and code in equal parts, each text long enough for the longest prompt."""
    joined = "\n".join(code)
    parts = [joined[i : i + 48 * longest] for i in range(0, len(joined), 48 * longest)]
    prose = [b for b in books if len(b) > 24 * longest]
    return parts + prose * max(1, round(len(parts) / max(1, len(prose))))


def subject(folder: Path, books: Path | None, documents: Sequence[str]) -> dict[str, Any]:
    """What the figures are about: hashes of the weights' file and of the texts."""
    held_out = {CODE: {"from": "standard library", "sha256": texts_sha256(texts.held_out_texts())}}
    if books:
        held_out[BOOKS] = {"from": books.name, "sha256": texts_sha256(documents)}
    return {"weights_sha256": file_sha256(folder / "model.safetensors"), "texts": held_out}


def begin(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The results to go on from: those at ``path`` if they are about the same, else none."""
    known = json.loads(path.read_text()) if path.exists() else {}
    return known if known.get("about") == about else {"about": about, "measured_with": {}}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, help="held-out documents: folder, .jsonl(.xz), text")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--depths", type=int, default=11)
    parser.add_argument("--rounds", type=int, default=3, help="needle tasks per depth and facts")
    parser.add_argument("--threads", type=int, default=1)
    return parser


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    books = list(texts.local_texts(args.texts)) if args.texts else []
    path = args.model / "evaluation.json"
    results = begin(path, subject(args.model, args.texts, books))
    environment = {"commit": provenance.commit(), **provenance.versions()}
    grid = args.lengths, args.depths, args.rounds
    for part, found in evaluate(model, tokenizer, books, *grid, args.parts):
        results[part] = found
        results["measured_with"][part] = environment
        path.write_text(json.dumps(results, indent=1))
    missing = [part for part in PARTS if part not in results]
    if missing:
        print(f"not measured yet, so no page: {', '.join(missing)}")
    else:
        card.write(args.model)


if __name__ == "__main__":
    main()
