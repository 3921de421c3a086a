"""The phenomena that cache compression relies on, each as a figure.

- Attention sinks: how much attention later tokens spend on the first ones.
    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453.
- Retrieval heads: heads whose strongest attention, while an answer is produced, lies on the very
  token to be copied.  Wu et al., "Retrieval Head Mechanistically Explains Long-Context
  Factuality", arXiv:2404.15574. Deviation: teacher-forced, so that every head is scored on every
  answer token.
- Key channels of unequal magnitude: why keys are quantized per channel and values per token.
    Liu et al., "KIVI", arXiv:2402.02750.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvloom.testbed import tasks
from training.loss import windows

LENGTH, SETTLED = 1024, 128


def phenomena(model: Any, tokenizer: Any, documents: Sequence[str]) -> dict[str, Any]:
    """All three, measured with eager attention on windows of 1,024 tokens."""
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        rows = windows(tokenizer, documents, LENGTH, count=6)
        return {
            "sinks": sinks(model, rows),
            "retrieval_heads": retrieval_heads(model, tokenizer, documents),
            "channels": channels(model, rows),
        }
    finally:
        model.set_attn_implementation(attention)


@torch.no_grad()
def sinks(model: Any, rows: Sequence[list[int]]) -> dict[str, Any]:
    """Mean attention mass on the first 1 and 4 tokens, of queries from position 128 on [L][H]."""
    maps = [_attentions(model, ids)[:, :, SETTLED:] for ids in rows]
    first = torch.stack([m[..., 0].mean(-1) for m in maps]).mean(0)
    four = torch.stack([m[..., :4].sum(-1).mean(-1) for m in maps]).mean(0)
    return {
        "first_token": _table(first),
        "first_four": _table(four),
        "mean_first_four": round(four.mean().item(), 3),
        "uniform_share_of_four": round(uniform_share(4), 4),
    }


def uniform_share(tokens: int) -> float:
    """Mass on the first ``tokens`` if each of these queries spread its attention evenly, in the mean.

    Query i sees i + 1 tokens. The mean is over shares: the share at the mean position is less.
    """
    return sum(tokens / (i + 1) for i in range(SETTLED, LENGTH)) / (LENGTH - SETTLED)


@torch.no_grad()
def retrieval_heads(
    model: Any, tokenizer: Any, documents: Sequence[str], count: int = 24
) -> dict[str, Any]:
    """Share of answer tokens whose source is a head's most attended token [L][H]."""
    text, total = "\n".join(documents), 0
    hits = torch.zeros(model.config.num_hidden_layers, model.config.num_attention_heads)
    for seed in range(count):
        at = (seed * 7919 * 101) % max(1, len(text) - 24 * 512)
        filler = text[at : at + 24 * 512]
        task = tasks.needle(seed, filler, 512, lambda t: len(tokenizer(t).input_ids), facts=2)
        ids, source = _aligned(tokenizer, task)
        digits = len(task.answer)
        strongest = _attentions(model, ids)[:, :, -digits - 1 : -1].argmax(-1)
        hits = hits + (strongest == torch.arange(source, source + digits)).sum(-1)
        total += digits
    score = hits / total
    return {"score": _table(score), "above_half": int((score > 0.5).sum()), "heads": score.numel()}


def _aligned(tokenizer: Any, task: tasks.Task) -> tuple[list[int], int]:
    """Prompt with its answer, and where the answer's first digit stands in the context."""
    ids = tokenizer(f"{task.prompt} {task.answer}").input_ids
    digits = tokenizer(task.answer, add_special_tokens=False).input_ids
    n = len(digits)
    source = next(i for i in range(len(ids)) if ids[i : i + n] == digits)
    assert ids[-n:] == digits and source < len(ids) - n
    return ids, source


@torch.no_grad()
def channels(model: Any, rows: Sequence[list[int]]) -> dict[str, Any]:
    """Mean magnitudes of key and value channels [L][Hkv][D] as they are cached, with RoPE.

    Largest over median of them [L][Hkv] says how unequal they are.
    """
    caches = [model(torch.tensor([ids], device=model.device)).past_key_values for ids in rows]
    layers = range(len(caches[0].layers))
    key_size = torch.stack([_magnitude([c.layers[i].keys for c in caches]) for i in layers])
    value_size = torch.stack([_magnitude([c.layers[i].values for c in caches]) for i in layers])
    keys, values = _spread(key_size), _spread(value_size)
    return {
        "key_magnitude": [_table(layer) for layer in key_size],
        "value_magnitude": [_table(layer) for layer in value_size],
        "keys": _table(keys),
        "values": _table(values),
        "mean_keys": round(keys.mean().item(), 2),
        "mean_values": round(values.mean().item(), 2),
    }


def _magnitude(states: Sequence[Tensor]) -> Tensor:
    """Mean magnitude of every channel [Hkv, D]; sinks are left out."""
    return torch.cat([s[0, :, 4:] for s in states], dim=1).abs().mean(1).cpu()


def _spread(magnitude: Tensor) -> Tensor:
    """Max / median over channels [L, Hkv]."""
    return magnitude.amax(-1) / magnitude.median(-1).values


def _attentions(model: Any, ids: Sequence[int]) -> Tensor:
    """Attention probabilities of one sequence [L, H, T, T], on the CPU."""
    out = model(torch.tensor([list(ids)], device=model.device), output_attentions=True)
    return torch.cat(out.attentions).cpu()


def _table(values: Tensor) -> list[list[float]]:
    return [[round(v, 3) for v in row] for row in values.tolist()]
