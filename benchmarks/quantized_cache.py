"""kvloom beside transformers' own QuantizedCache (quanto): quality, bytes and time per token.

    make quanto            (makes .venv-quanto with optimum-quanto, and runs this)

The testbed model reads a held-out text: a prefill, then token by token through each cache. Caches
take turns block by block, so that they share the machine's ups and downs. KL and first choices are
against a full cache on the same tokens. Bytes are the storages that each cache holds at the end.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from _common import append_rows, paired_ratio, provenance
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import DynamicCache, QuantizedCache

from kvloom import CompressedCache, testbed
from kvloom.evaluation import texts
from kvloom.hf import load

OURS = (
    "int8", "int4", "rotated_int4", "int4_channel", "kivi(bits=4)", "turboquant_mse", "int2",
    "int2(hadamard='keys')", "kivi(bits=2)", "turboquant_mse(bits=2)",
)  # fmt: skip
BLOCK = 32


def caches(model: Any, recipes: list[str]) -> dict[str, Any]:
    made: dict[str, Any] = {"dense": DynamicCache(config=model.config)}
    for bits in (4, 2):
        made[f"quanto {bits} bits"] = QuantizedCache("quanto", model.config, nbits=bits)
    for recipe in recipes:
        made[recipe] = CompressedCache(model, recipe)
    return made


def held(cache: Any) -> int:
    """Bytes of unique storages, tensor subclasses taken apart."""
    if isinstance(cache, CompressedCache):
        return cache.nbytes
    seen = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            for x in plain(value):
                storage = x.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def plain(value: Any) -> Iterator[Tensor]:
    if not isinstance(value, Tensor):
        return
    if not hasattr(value, "__tensor_flatten__") or type(value) is Tensor:
        yield value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from plain(getattr(value, name))


@torch.inference_mode()
def stream(model: Any, ids: Tensor, prefill: int, given: dict[str, Any]) -> dict[str, Any]:
    """Seconds per token, KL to dense and agreement of every cache."""
    seconds: dict[str, list[float]] = {name: [] for name in given}
    kl: dict[str, list[float]] = {name: [] for name in given}
    same: dict[str, list[bool]] = {name: [] for name in given}
    names = list(given)
    for cache in given.values():
        model(ids[:, :prefill], past_key_values=cache)
    for turn, start in enumerate(range(prefill, ids.shape[1] - 1, BLOCK)):
        block = range(start, min(start + BLOCK, ids.shape[1] - 1))
        want = None
        order = names[turn % len(names) :] + names[: turn % len(names)]
        logits = {}
        for name in order:
            began = time.perf_counter()
            out = [model(ids[:, i : i + 1], past_key_values=given[name]).logits for i in block]
            seconds[name].append((time.perf_counter() - began) / len(block))
            logits[name] = torch.cat(out, 1)[0].float().log_softmax(-1)
        want = logits["dense"]
        for name, got in logits.items():
            kl[name] += kl_div(got, want, log_target=True, reduction="none").sum(-1).tolist()
            same[name] += (got.argmax(-1) == want.argmax(-1)).tolist()
        print(f"  {block.stop} of {ids.shape[1]} tokens", flush=True)
    return {"seconds": seconds, "kl": kl, "same": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--prefill", type=int, default=1536)
    parser.add_argument("--text", default="stdlib")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--recipe", action="append", help="instead of the default ones")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    load.quiet()
    model, tokenizer = load.pretrained(testbed.path(), torch.float32, torch.device("cpu"))
    document = texts.load(given.text, tokenizer, given.tokens)
    made = caches(model, given.recipe or list(OURS))
    found = stream(model, document.ids.view(1, -1), given.prefill, made)
    rows = []
    for name, cache in made.items():
        ratio = paired_ratio(found["seconds"][name], found["seconds"]["dense"])
        rows.append({
            **provenance(given.threads), "cache": name, "text": document.facts.sha256[:16],
            "tokens": given.tokens, "prefill": given.prefill, "nbytes": held(cache),
            "kl": round(statistics.fmean(found["kl"][name]), 6),
            "top1": round(statistics.fmean(found["same"][name]), 4),
            "ms": round(statistics.median(found["seconds"][name]) * 1e3, 3),
            "to_dense": round(ratio[0], 4), "q25": round(ratio[1], 4), "q75": round(ratio[2], 4),
        })  # fmt: skip
        shown = ("cache", "nbytes", "kl", "top1", "ms", "to_dense")
        print({key: rows[-1][key] for key in shown})
    print(append_rows("quantized_cache", rows))


if __name__ == "__main__":
    main()
