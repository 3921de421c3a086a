"""The ways in which a model is run: each takes (model, make_cache) and yields comparable outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.models import generate, left_padded, tokens

STEPS = 10
LONG = 150  # enough for two sealed pages
Run = list[tuple[Tensor, Tensor]]  # (sequences, logits [steps, rows, vocabulary]) per turn


def _result(out: Any) -> tuple[Tensor, Tensor]:
    return out.sequences, torch.stack(out.logits)


def single(model: Any, make: Callable[[], Any]) -> Run:
    return [_result(generate(model, make(), tokens(LONG), n=STEPS))]


def padded(model: Any, make: Callable[[], Any]) -> Run:
    ids, mask = left_padded([LONG, 71, 9])
    return [_result(generate(model, make(), ids, mask, n=STEPS))]


def chunked(model: Any, make: Callable[[], Any]) -> Run:
    return [_result(generate(model, make(), tokens(LONG), n=STEPS, prefill_chunk_size=48))]


def padded_chunked(model: Any, make: Callable[[], Any]) -> Run:
    ids, mask = left_padded([LONG, 71, 9])
    return [_result(generate(model, make(), ids, mask, n=STEPS, prefill_chunk_size=48))]


def beams(model: Any, make: Callable[[], Any]) -> Run:
    ids, mask = left_padded([LONG, 80])
    return [_result(generate(model, make(), ids, mask, n=STEPS, num_beams=3))]


def sequences(model: Any, make: Callable[[], Any]) -> Run:
    out = generate(model, make(), tokens(LONG), n=STEPS, num_beams=2, num_return_sequences=2)
    return [_result(out)]


def turns(model: Any, make: Callable[[], Any]) -> Run:
    """Three turns on one cache; the last one is forward calls without generate."""
    cache, ids = make(), tokens(LONG)
    first = generate(model, cache, ids, n=STEPS)
    ids = torch.cat([first.sequences, tokens(40, seed=7)], 1)
    second = generate(model, cache, ids, n=STEPS)
    results = [_result(first), _result(second)]
    ids = torch.cat([second.sequences[:, -1:], tokens(20, seed=8)], 1)
    logits = [model(ids[:, :15], past_key_values=cache).logits[:, -1]]
    logits += [model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(15, 21)]
    results.append((ids, torch.stack(logits)))
    return results


MODES = {f.__name__: f for f in (single, padded, chunked, padded_chunked, beams, sequences, turns)}
# rows that a cache holds in each mode
ROWS = {name: 1 for name in MODES} | {"padded": 3, "padded_chunked": 3, "beams": 6, "sequences": 2}
