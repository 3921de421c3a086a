"""A look at the model while it trains: recall at the training length, loss on held-out code.

Teacher-forced, hence cheap: an answer counts if every one of its tokens is the most likely one.
``evaluate`` measures the same by generation.
"""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F

from kvloom.testbed import tasks
from training.corpus import Corpus
from training.model import Llama


def probe(model: Llama, corpus: Corpus, length: int, device: torch.device) -> dict[str, float]:
    """Needle recall with seen and unseen phrasings, and nats per token on held-out modules."""
    count = max(6, min(24, 16384 // length))
    return {
        "recall": recall(model, corpus, length, count, False, device),
        "recall_unseen": recall(model, corpus, length, count, True, device),
        "held_out_loss": held_out_loss(model, corpus, length, device),
    }


@torch.no_grad()
def recall(
    model: Llama, corpus: Corpus, length: int, count: int, unseen: bool, device: torch.device
) -> float:
    encode = corpus.tokenizer.encode
    right = 0
    for seed in range(count):
        start = random.Random(seed).randrange(len(corpus.books) - 4 * length)
        filler = corpus.tokenizer.decode(corpus.books[start : start + 3 * length].tolist())
        task = tasks.needle(
            seed, filler, length, lambda t: len(encode(t).ids), facts=1 + seed % 4, unseen=unseen
        )
        answer = encode(f" {task.answer}", add_special_tokens=False).ids
        ids = encode(task.prompt).ids + answer
        hidden = model(torch.tensor([ids[:-1]], device=device))[0, -len(answer) :]
        right += model.logits(hidden).argmax(-1).tolist() == answer
    return right / count


@torch.no_grad()
def held_out_loss(model: Llama, corpus: Corpus, length: int, device: torch.device) -> float:
    rows = max(1, min(8192, len(corpus.held_out)) // length)
    flat = np.asarray(corpus.held_out[: rows * length], dtype=np.int64)
    losses = []
    for row in torch.from_numpy(flat).view(rows, 1, length).to(device):
        logits = model.logits(model(row))[0, :-1].float()
        losses.append(F.cross_entropy(logits, row[0, 1:]))
    return torch.stack(losses).mean().item()
