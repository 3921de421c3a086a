"""What merging is worth: every merger against plain dropping, and what each switch of mp_kvm does.

    python benchmarks/merging.py --part mergers
    python benchmarks/merging.py --part ablation

Each recipe reads the same documents (the context at once, then token by token through the cache; a full
cache has read the same) and answers the same retrieval tasks, at the same budget in bytes. Documents are
the rows of one batch, and so are the contexts of tasks: rows do not touch each other (tests/contract), and
together they are clustered in a fraction of the time. A line of docs/results/merging/PART.jsonl holds one
recipe at one budget with its figures per document and task, so that differences are paired;
`docs/make_merging.py` makes table and figure. Lines that are there are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _common import provenance
from torch import Tensor

from kvloom.core.budget import Budget
from kvloom.core.recipe import Recipe
from kvloom.evaluation import answering, compare, identity, needles, texts
from kvloom.evaluation.answering import Asked
from kvloom.evaluation.decoders import CacheDecoder, WatchedCache
from kvloom.evaluation.measure import Scores
from kvloom.evaluation.tasks import needle
from kvloom.hf.stats import CacheStats

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "merging"
SIDE_BY_SIDE = 8  # contexts of tasks in one batch
SETTING = ("context", "decode", "documents", "tasks", "dtype")
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


@dataclass
class Reading:
    """What the documents tell about one cache.

    Attributes:
        logits: `[D, n, V]` of the tokens fed singly. held: bytes per document after each of them.
        stats, floor: of the cache in the end.
    """

    logits: Tensor
    held: list[float]
    stats: CacheStats
    floor: int


class Bench:
    """The documents and tasks that all recipes share.

    Contexts of tasks are cut at the start to the length of the shortest.
    """

    def __init__(self, context: int, decode: int, documents: int, tasks: int, dtype: str):
        self.model, self.tokenizer = compare.load_model("testbed", dtype, "cpu")
        self.context, length = context, context + decode
        text = texts.load("stdlib", self.tokenizer, documents * length, filler=context)
        self.documents = text.ids.view(documents, length)
        self.tasks = needles.prepare(text.raw, self.tokenizer, tasks, context, seed=7)
        self.dense = self.read(Recipe(), None).logits

    def _feed(self, cache: WatchedCache, ids: Tensor) -> Tensor:
        """Logits `[B, V]` of the last of tokens `[B, n]`."""
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1]
        return logits

    def read(
        self, subject: Recipe, budget: Budget | None, documents: Tensor | None = None
    ) -> Reading:
        """The documents, or others, side by side through one cache."""
        cache = WatchedCache(self.model, subject, budget)
        ids = self.documents if documents is None else documents
        self._feed(cache, ids[:, : self.context])
        logits, held = [], []
        for i in range(self.context, ids.shape[1] - 1):
            logits.append(self._feed(cache, ids[:, i : i + 1]))
            held.append(cache.nbytes / len(ids))
        return Reading(torch.stack(logits, 1), held, cache.stats(), cache.floor())

    def row(self, reading: Reading) -> dict[str, Any]:
        """Figures per document."""
        row: dict[str, Any] = {
            "nll": [],
            "dense_nll": [],
            "kl": [],
            "nbytes": [fmean(reading.held)],
        }
        for dense, own, ids in zip(self.dense, reading.logits, self.documents, strict=True):
            scores = Scores()
            scores.add(dense, own, ids[self.context + 1 :])
            for name in ("nll", "dense_nll", "kl"):
                row[name].append(fmean(getattr(scores, name)))
        stats = reading.stats
        return row | {"merged": stats.merged, "evicted": stats.evicted, "floor": reading.floor}

    def right(self, subject: Recipe, budget: Budget | None) -> list[int]:
        """Whether each task is answered, 1 or 0."""
        shortest, found = min(len(task.context) for task in self.tasks), []
        for start in range(0, len(self.tasks), SIDE_BY_SIDE):
            tasks = self.tasks[start : start + SIDE_BY_SIDE]
            cache = WatchedCache(self.model, subject, budget)
            self._feed(cache, torch.stack([task.context[-shortest:] for task in tasks]))
            found += [self._answered(cache, i, task) for i, task in enumerate(tasks)]
        return found

    def _answered(self, cache: WatchedCache, i: int, task: Asked) -> int:
        own = copy.deepcopy(cache)
        own.batch_select_indices(torch.tensor([i]))
        decoder = CacheDecoder(self.model, own)
        logits = decoder.feed(task.question)
        text = answering.answer(self.model, self.tokenizer, decoder, logits, task.example)
        return int(needle.Needle().score(task.example, text) == 1)

    def measure(self, recipe: str, budget: str | None) -> dict[str, Any]:
        """Figures per document and task."""
        subject, parsed = Recipe.parse(recipe), None if budget is None else Budget.parse(budget)
        return self.row(self.read(subject, parsed)) | {"right": self.right(subject, parsed)}


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results; none if there is no file."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def said(recipe: str, row: dict[str, Any]) -> str:
    """A line for whoever waits."""
    figures = f"nll {fmean(row['nll']):.4f}, KL {fmean(row['kl']):.4f}, {sum(row['right'])}/{len(row['right'])}"
    return f"{recipe}: {figures}, {fmean(row['nbytes']) / 1024:.0f} KiB"


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
    setting = {k: v for k, v in vars(given).items() if k in SETTING}
    source = identity.environment(torch.device("cpu")).source_sha256
    held = {
        (r["recipe"], r["budget"])
        for r in lines_of(path)
        if r["setting"] == setting and r["source_sha256"] == source
    }
    recipes = given.only or (merger_recipes() if given.part == "mergers" else ablation_recipes())
    with torch.inference_mode():
        bench = Bench(**setting)
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
            print(f"{budget} {said(recipe, row)}", flush=True)


if __name__ == "__main__":
    main()
