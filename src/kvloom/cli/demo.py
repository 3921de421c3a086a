"""`kvloom demo`: a short greedy generate with several recipes, and what each cache holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvloom import testbed
from kvloom.hf import load as host
from kvloom.hf.cache import CompressedCache
from kvloom.hf.stats import CacheStats
from kvloom.testbed import texts

Row = tuple[str, str | None]
ROWS: tuple[Row, ...] = (
    ("none", None),
    ("int4", None),
    ("int4_channel", None),
    ("streaming_llm", "25%"),
    ("h2o", "25%"),
    ("h2o | int4", "25%"),
    ("h2o | mean_centroid | int4", "25%"),
)
EXACT = ("sinks", "tail", "centroids", "staged")
SEED = 0


@dataclass
class Subject:
    """What the demo runs: a model, a prompt of one row, and words for them."""

    model: Any
    prompt: Tensor
    name: str
    trained: bool


def run(console: Console, prompt_tokens: int, new_tokens: int, more: list[Row]) -> None:
    """Print the table; `more` are recipes with budgets to add to it."""
    host.quiet()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a small model; waiting threads are slow on a busy machine
    try:
        torch.manual_seed(SEED)
        subject = load(prompt_tokens)
        for row in more:  # wrong input shows before any work
            CompressedCache(subject.model, *row)
        results = measure(subject, [*ROWS, *more], new_tokens)
    finally:
        torch.set_num_threads(threads)
    console.print(table(subject, new_tokens, results))
    for line in notes(subject):
        console.print(line, markup=False)


def measure(subject: Subject, rows: list[Row], new_tokens: int) -> list[tuple[CacheStats, float]]:
    """Each recipe's figures, and the share of tokens that it agrees on with the first."""
    reference, stats, _ = generate(subject, rows[0], new_tokens)
    results = [(stats, 1.0)]
    for row in rows[1:]:
        _, stats, same = generate(subject, row, new_tokens, reference)
        results.append((stats, same))
    return results


def load(prompt_tokens: int) -> Subject:
    """The testbed model on held-out text, or a small random Llama where there are no weights."""
    try:
        folder = testbed.path()
    except FileNotFoundError:
        return random_llama(prompt_tokens)
    model, tokenizer = host.pretrained(folder, torch.bfloat16)
    ids: list[int] = []
    for text in texts.held_out_texts():
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= prompt_tokens:
            break
    longest = model.config.max_position_embeddings
    if prompt_tokens > longest:
        raise ValueError(f"a prompt of {prompt_tokens} tokens: this model was made for {longest}")
    prompt = torch.tensor([ids[:prompt_tokens]])
    return Subject(model, prompt, _describe(model.config, "testbed model"), True)


def random_llama(prompt_tokens: int) -> Subject:
    """A seeded Llama without training: right for bytes, meaningless for quality."""
    model = host.random_llama(torch.bfloat16)
    prompt = torch.randint(1, model.config.vocab_size, (1, prompt_tokens))
    return Subject(model, prompt, _describe(model.config, "random Llama"), False)


def _describe(config: Any, name: str) -> str:
    return (
        f"{name}, {config.num_hidden_layers} layers, {config.num_attention_heads} heads, "
        f"{config.num_key_value_heads} KV heads x {config.head_dim}, bf16"
    )


def generate(
    subject: Subject, row: Row, new_tokens: int, follow: Tensor | None = None
) -> tuple[Tensor, CacheStats, float]:
    """Greedy tokens `[N]`, the cache's figures after them, and the agreement with `follow`."""
    cache = CompressedCache(subject.model, *row)
    tokens, same = host.greedy(subject.model, subject.prompt, cache, new_tokens, follow)
    return tokens, cache.stats(), same


def table(subject: Subject, new_tokens: int, results: list[tuple[CacheStats, float]]) -> Table:
    """One line per recipe; the quality column only for a trained model."""
    seen = subject.prompt.shape[1] + new_tokens - 1
    title = f"{subject.name}; {seen} tokens seen; ratio against a 16-bit dense cache"
    out = Table(title=title, title_justify="left", title_style="", header_style="")
    out.add_column("recipe", no_wrap=True)
    columns = ["budget", "entries\nper head", "bytes", "pages\nKiB", "exact\nKiB", "books\nKiB"]
    columns += ["ratio", "bits\nkey/value"] + (["top-1"] if subject.trained else [])
    for name in columns:
        out.add_column(name, justify="right", no_wrap=True)
    for stats, same in results:
        parts = stats.by_part
        out.add_row(
            stats.recipe,
            stats.budget or "",
            f"{stats.stored_mean:.0f}",
            f"{stats.nbytes:,}",
            _kib(parts["pages"]),
            _kib(sum(parts[name] for name in EXACT)),
            _kib(stats.nbytes - parts["pages"] - sum(parts[name] for name in EXACT)),
            f"{stats.compression_ratio:.2f}x",
            f"{stats.avg_key_bits:.1f}/{stats.avg_value_bits:.1f}",
            *([f"{same:.0%}"] if subject.trained else []),
        )
    return out


def _kib(n: int) -> str:
    return f"{n / 1024:,.1f}" if n else ""


def notes(subject: Subject) -> list[str]:
    """What the columns mean, and what they do not say."""
    lines = [
        "bytes: every live storage of the cache, each once = pages (codes and scales) + exact "
        "(sinks, tail, centroids) + books (page tables, live flags, slot state, counters).",
        "bits: effective bits per stored element, scales included.",
    ]
    if subject.trained:
        lines.append(
            "top-1: share of the tokens generated by `none` that the recipe, fed those tokens, "
            "ranks first too; a smoke test, not an evaluation."
        )
    else:
        lines.append(
            "The weights are random, so nothing can be said about quality: no such column."
        )
    return lines
