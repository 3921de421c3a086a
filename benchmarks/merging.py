"""What merging is worth: every merger against plain dropping, and what each switch of mp_kvm does.

    python benchmarks/merging.py --part mergers
    python benchmarks/merging.py --part ablation

Each recipe reads the same documents (the context at once, then token by token through the cache, in
lockstep with a full cache) and answers the same retrieval tasks, at the same budget in bytes. A line of
docs/results/merging/PART.jsonl holds one recipe at one budget with its figures per document and task, so
that differences are paired; `docs/make_merging.py` makes table and figure. Lines that are there are not
measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from _common import provenance
from torch import Tensor

from kvloom.core.budget import Budget
from kvloom.core.recipe import Recipe
from kvloom.evaluation import compare, identity, needles, texts
from kvloom.evaluation.decoders import decoder_for, feed_prompt
from kvloom.evaluation.measure import Scores

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "merging"
SCORERS = ["snapkv", "h2o", "knorm"]
MERGERS = [  # spelled out, so that no row changes its meaning with a default
    "", "nearest", "nearest(keys=True)", "mass_fold(weight='count')", "d2o", "refit",
    "mean_centroid", "mp_kvm",
]  # fmt: skip
BY_ATTENTION = ["mass_fold(weight='score')", "cam"]  # after scorers whose scores are attention
PACKED = ["snapkv | int4", "snapkv | mass_fold(weight='score') | int4", "snapkv | mp_kvm | int4"]
BASE = "mp_kvm(max_centroids=128)"
SWITCHES = [
    "mass_bias=False", "positions='slot'", "positions='positionless'",
    "rope='post'", "similarity_threshold=0.5", "similarity_threshold=0.95", "adaptive_threshold=True",
    "min_merge_similarity=0.9", "init_preserve_first_n=8", "metric='euclidean'",
    "per_head_clustering=False", "per_head_clustering=False, head_mean=True", "update='ema'",
    "sample_stride=4", "max_injected_centroids=32", "per_layer_injection=(0, 1)", "block=1",
    "flush_threshold=64, flush_interval=100", "sinks=0", "window_size=64", "window_size=256", "max_centroids=32", "max_centroids=64", "max_centroids=192",
]  # fmt: skip


def merger_recipes() -> list[str]:
    """Scorers alone, and with each merger; some in front of packed pages."""
    found = []
    for scorer in SCORERS:
        named = [*MERGERS, *(BY_ATTENTION if scorer in ("h2o", "snapkv") else [])]
        found += [f"{scorer} | {merger}" if merger else scorer for merger in named]
    return [*found, *PACKED]


def ablation_recipes() -> list[str]:
    """mp_kvm, and with one switch turned each; what it replaces: a window alone."""
    inside = BASE.removesuffix(")")
    turned = [
        f"mp_kvm({switch})" if switch.startswith("max_centroids") else f"{inside}, {switch})"
        for switch in SWITCHES
    ]
    return [BASE, *turned, "streaming_llm(positions='original')"]


class Bench:
    """The documents and tasks that all recipes share."""

    def __init__(self, given: argparse.Namespace):
        self.model, self.tokenizer = compare.load_model("testbed", given.dtype, "cpu")
        self.context, self.decode = given.context, given.decode
        length = given.context + given.decode
        text = texts.load("stdlib", self.tokenizer, given.documents * length, filler=given.context)
        self.documents = text.ids.view(given.documents, length)
        self.tasks = needles.prepare(text.raw, self.tokenizer, given.tasks, given.context, seed=7)
        self.dense = [self._dense(ids) for ids in self.documents]

    def _dense(self, ids: Tensor) -> Tensor:
        decoder = decoder_for(self.model, Recipe(), None)
        feed_prompt(decoder, ids[: self.context], 0)
        return decoder.feed(ids[self.context : -1], keep=self.decode - 1).half()

    def measure(self, recipe: str, budget: str | None) -> dict[str, Any]:
        subject, parsed = Recipe.parse(recipe), None if budget is None else Budget.parse(budget)
        row: dict[str, Any] = {"nll": [], "kl": [], "nbytes": [], "merged": 0, "evicted": 0}
        for ids, dense in zip(self.documents, self.dense, strict=True):
            decoder = decoder_for(self.model, subject, parsed)
            feed_prompt(decoder, ids[: self.context], 0)
            logits, held = [], []
            for i in range(self.context, len(ids) - 1):
                logits.append(decoder.feed(ids[i : i + 1])[-1])
                held.append(decoder.nbytes())
            scores = Scores()
            scores.add(dense.float(), torch.stack(logits), ids[self.context + 1 :])
            row["nll"].append(sum(scores.nll) / len(scores.nll))
            row["kl"].append(sum(scores.kl) / len(scores.kl))
            row["nbytes"].append(sum(held) / len(held))
            stats = decoder.cache.stats()
            row["merged"], row["evicted"] = (
                row["merged"] + stats.merged,
                row["evicted"] + stats.evicted,
            )
            row["floor"] = decoder.cache.floor()
        row["right"] = [
            int(needles.answered(self.model, self.tokenizer, subject, parsed, task))
            for task in self.tasks
        ]
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["mergers", "ablation"], required=True)
    parser.add_argument("--budgets", nargs="+", default=["25%"])
    parser.add_argument("--context", type=int, default=3072)
    parser.add_argument("--decode", type=int, default=97, help="tokens fed singly, per document")
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="only these recipes")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{given.part}.jsonl"
    setting = {k: v for k, v in vars(given).items() if k in ("context", "decode", "documents", "tasks", "dtype")}  # fmt: skip
    lines = path.read_text().splitlines() if path.exists() else []
    source = identity.environment(torch.device("cpu")).source_sha256
    held = {
        (r["recipe"], r["budget"])
        for r in map(json.loads, lines)
        if r["setting"] == setting and r["source_sha256"] == source
    }
    recipes = given.only or (merger_recipes() if given.part == "mergers" else ablation_recipes())
    with torch.inference_mode():
        bench = Bench(given)
        cells: list[tuple[str, str | None]] = [(r, b) for b in given.budgets for r in recipes]
        for recipe, budget in cells if given.only else [("none", None), *cells]:
            if (recipe, budget) in held:
                continue
            asked = None if "window_size" in recipe else budget  # a window states the size itself
            row = bench.measure(recipe, asked)
            where = {**provenance(given.threads), "source_sha256": source}
            line = {"recipe": recipe, "budget": budget, "setting": setting, **where, **row}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            n = len(row["nll"])
            print(f"{budget} {recipe}: nll {sum(row['nll']) / n:.4f}, KL {sum(row['kl']) / n:.4f}, "
                  f"{sum(row['right'])}/{len(row['right'])}, {sum(row['nbytes']) / n / 1024:.0f} KiB",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
