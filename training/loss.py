"""Loss of a model on held-out text, per byte, so that tokenizers of any size can be compared."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

OVERALL = 1024
EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096)


def windows(tokenizer: Any, documents: Sequence[str], length: int, count: int) -> list[list[int]]:
    """Seeded stretches of ``length`` tokens; short documents are joined. Begin token first."""
    text = "\n\n".join(documents)
    rng, out = random.Random(0), []
    for _ in range(count):
        start = rng.randrange(max(1, len(text) - 8 * length))
        ids = tokenizer(text[start : start + 8 * length], verbose=False).input_ids
        if len(ids) >= length:
            out.append(ids[:length])
    if not out:
        raise ValueError(f"{len(text)} characters of text are too few for {length} tokens")
    return out


def byte_lengths(tokenizer: Any) -> Tensor:
    """Bytes per token id: in a byte-level vocabulary one character of a token is one byte."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    return torch.tensor([0 if token in special else len(token) for token in tokens])


@torch.no_grad()
def token_losses(model: Any, ids: Sequence[int]) -> Tensor:
    """Nats of every token but the first [T - 1], on the CPU."""
    row = torch.tensor([list(ids)], device=model.device)
    logits = model(row, use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits, row[0, 1:], reduction="none").cpu()


def loss_per_byte(
    model: Any, tokenizer: Any, documents: Sequence[str], length: int, count: int = 64
) -> dict[str, Any]:
    """Bits per byte and perplexity of the first 1,024 tokens; bits per byte by position."""
    sizes, rows = byte_lengths(tokenizer), windows(tokenizer, documents, length, count)
    losses = torch.stack([token_losses(model, ids) for ids in rows])
    weights = sizes[torch.tensor(rows)[:, 1:]]
    edges = [0, *(high for low, high in pairwise(EDGES) if low < length)]
    # Of equal span for every model, also for one that was not trained on the longest windows.
    early, early_weights = losses[:, : OVERALL - 1], weights[:, : OVERALL - 1]
    return {
        "bits_per_byte": _bits(early, early_weights),
        "perplexity": round(math.exp(early.mean().item()), 3),
        "tokens": early.numel(),
        "bits_per_byte_by_position": bits_by_position(losses, weights, edges),
    }


def bits_by_position(losses: Tensor, sizes: Tensor, edges: Sequence[int]) -> dict[str, float]:
    """Bits per byte between token positions; losses and bytes [N, T - 1] are of all but the first."""
    parts = {f"{low}-{high}": slice(max(0, low - 1), high - 1) for low, high in pairwise(edges)}
    return {name: _bits(losses[:, part], sizes[:, part]) for name, part in parts.items()}


def loss_by_context(
    model: Any, tokenizer: Any, documents: Sequence[str], lengths: Sequence[int], count: int = 64
) -> dict[str, float]:
    """Bits per byte of the *same* 128 last tokens of each window, given more and more context.

    Paired, so that the effect of context is not drowned in the difference between texts.
    """
    sizes, target = byte_lengths(tokenizer), 128
    rows = windows(tokenizer, documents, max(lengths), count)
    out = {}
    for length in sorted(lengths):
        # The begin token stays first, as in training.
        cut = [[ids[0], *ids[len(ids) - length + 1 :]] for ids in rows]
        losses = torch.stack([token_losses(model, ids)[-target:] for ids in cut])
        out[str(length)] = _bits(losses, sizes[torch.tensor(cut)[:, -target:]])
    return out


def _bits(losses: Tensor, sizes: Tensor) -> float:
    return round(losses.sum().item() / math.log(2) / max(1, int(sizes.sum())), 4)
