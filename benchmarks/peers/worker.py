"""One library behind a pipe: runs in its own environment and takes orders, one JSON line each.

    {"do": "load", "model": FOLDER, "tokens": [...]}
    {"do": "prefill", "method": "knorm", "keep": 512, "kept": PATH}    -> seconds, bytes
    {"do": "decode", "steps": 8}                                       -> seconds per token

`kept` names a JSON file for the indices kept, `[layer][head][...]`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar

SNAPKV = {"window": 64, "kernel": 5}
RECIPES = {
    "knorm": "knorm",
    "keydiff": "keydiff",
    "streaming_llm": "streaming_llm(sinks=4, positions='original')",
    "snapkv": f"snapkv(window={SNAPKV['window']}, kernel={SNAPKV['kernel']})",
}


class KVPress:
    """kvpress: a press around the prefill, then a `DynamicCache` with fewer entries."""

    def __init__(self, model: Any):
        self.model = model

    def version(self) -> str:
        from importlib.metadata import version

        return f"kvpress {version('kvpress')}"

    def prefill(self, ids: torch.Tensor, method: str, keep: int) -> Any:
        import kvpress

        ratio = 1 - keep / ids.shape[1] - 1e-9  # it keeps int(n * (1 - ratio))
        made = {
            "knorm": lambda: kvpress.KnormPress(ratio),
            "keydiff": lambda: kvpress.KeyDiffPress(ratio),
            "streaming_llm": lambda: kvpress.StreamingLLMPress(ratio, n_sink=4),
            "snapkv": lambda: kvpress.SnapKVPress(
                ratio, window_size=SNAPKV["window"], kernel_size=SNAPKV["kernel"]
            ),
        }
        cache = DynamicCache(config=self.model.config)
        if method == "none":
            self.model(ids, past_key_values=cache, logits_to_keep=1)
            return cache
        with made[method]()(self.model):
            self.model(ids, past_key_values=cache, logits_to_keep=1)
        return cache

    def nbytes(self, cache: Any) -> int:
        return sum(x.untyped_storage().nbytes() for c in cache.layers for x in (c.keys, c.values))

    def kept(self, cache: Any, ids: torch.Tensor, method: str, keep: int) -> list:
        """Found again by comparing keys with those of the full cache, which are the same numbers."""
        full = self.prefill(ids, "none", ids.shape[1])
        out = []
        for mine, whole in zip(cache.layers, full.layers, strict=True):
            heads = zip(mine.keys[0], whole.keys[0], strict=True)
            out.append([torch.cdist(k, w).argmin(-1).sort().values.tolist() for k, w in heads])
        return out


class KVLoom:
    """kvloom, with the same sizes and original positions as kvpress has them."""

    def __init__(self, model: Any):
        self.model = model

    def version(self) -> str:
        import kvloom

        return f"kvloom {kvloom.__version__}"

    def prefill(self, ids: torch.Tensor, method: str, keep: int, positions: bool = False) -> Any:
        from kvloom import CompressedCache

        if method == "none":
            cache = CompressedCache(self.model, "none")
        else:
            # kvpress compresses the prompt only; ours goes on, here every 64 tokens
            recipe = f"{RECIPES[method]} | lazy(every=64)"
            cache = CompressedCache(self.model, recipe, f"{keep}tok", track_positions=positions)
        self.model(ids, past_key_values=cache, logits_to_keep=1)
        return cache

    def nbytes(self, cache: Any) -> int:
        return int(cache.nbytes)

    def kept(self, cache: Any, ids: torch.Tensor, method: str, keep: int) -> list:
        cache = self.prefill(ids, method, keep, positions=True)
        return [cache.positions(i)[0] for i in range(len(cache.layers))]


class Worker:
    """Holds the model and one cache between orders."""

    def __init__(self, library: str):
        self.library, self.cache, self.at = library, None, 0

    def load(self, model: str, tokens: list[int], threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        disable_progress_bar()
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.ids = torch.tensor([tokens])
        self.library = {"kvpress": KVPress, "kvloom": KVLoom}[self.library](loaded)
        return {"version": self.library.version()}

    def prefill(self, method: str, keep: int, kept: str | None = None) -> dict[str, Any]:
        start = time.perf_counter()
        self.cache = self.library.prefill(self.ids, method, keep)
        seconds, self.at = time.perf_counter() - start, self.ids.shape[1]
        if kept is not None:
            with open(kept, "w") as file:
                json.dump(self.library.kept(self.cache, self.ids, method, keep), file)
        return {"seconds": seconds, "nbytes": self.library.nbytes(self.cache)}

    def decode(self, steps: int) -> dict[str, Any]:
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            token, at = self.ids[:, :1], torch.tensor([[self.at]])
            self.library.model(token, past_key_values=self.cache, position_ids=at)
            times.append(time.perf_counter() - start)
            self.at += 1
        return {"seconds": statistics.median(times)}


@torch.no_grad()
def main() -> None:
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        order = json.loads(line)
        answer = getattr(worker, order.pop("do"))(**order)
        print("=> " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
