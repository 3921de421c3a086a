"""Every format and preset on the testbed model: quality through the cache against effective bits.

    python benchmarks/format_quality.py

Measures two models: the testbed model, and a copy of it whose keys have loud channels. In the copy,
a few rotary pairs of every key head are scaled up and those of its queries down by the same factor:
rotation commutes with that, so the function is unchanged, while a scale per token has to span the
loud pairs.

Each recipe reads the same documents, held-out modules side by side in one batch: a prefill at once, then
what is scored, all of it through the compressed cache; a full cache has read the same tokens. What is
scored goes in up to the next sealing of a page, mostly 64 tokens at once: between two sealings nothing
that is stored changes and new tokens are exact, so that each of them sees what it would see if they came
one by one (tests/test_format_quality.py), at a fortieth of the time. Then the recipe answers retrieval
tasks, one by one. A line of docs/results/formats*/results.jsonl holds one recipe with its figures per
document and task, so that differences are paired; from these `docs/make_formats.py` makes tables and
figure.

A line is on the disk as soon as it is measured, and the same command goes on after the last one; the two
models take turns, family by family, the copy first. Its weights go to results/, which git ignores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvloom import testbed
from kvloom.cli._console import console
from kvloom.cli.calibrate import Options
from kvloom.cli.calibrate import run as calibrate
from kvloom.core.format import PAGE
from kvloom.core.recipe import Recipe
from kvloom.evaluation import compare, disjoint, identity, needles, texts
from kvloom.evaluation.measure import Scores
from kvloom.evaluation.subjects import Cell
from kvloom.formats._calibration import Calibration
from kvloom.hf import load
from kvloom.hf.cache import CompressedCache
from kvloom.testbed.texts import stdlib_root

RESULTS = Path(__file__).parent.parent / "docs" / "results"
TEXT = "stdlib"  # modules that the testbed model was not trained on
UNIFORM = [
    "none", "fp8", "int8", "k8v4", "int4", "int4(symmetric=True)", "int4_channel", "rotated_int4",
    "int4(hadamard='both')", "int3", "int3(hadamard='both')", "int2", "int2(hadamard='both')",
]  # fmt: skip
PUBLISHED = [
    "kivi(bits=4)", "kivi(bits=4, residual=0)", "kivi(bits=2)", "kivi(bits=2, residual=0)", "turboquant_mse(bits=4)", "turboquant_mse(bits=3)",
    "turboquant_mse(bits=2)",
]  # fmt: skip
STREAMING = [
    "streaming_kvquant_int8", "streaming_kvquant_int4", "streaming_kvquant_int4_sink_outlier",
    "streaming_kvquant_ablation_sink", "streaming_kvquant_ablation_outlier",
    "streaming_kvquant_ablation_ema95", "streaming_kvquant(rope='pair')",
    "streaming_kvquant(rope='post')", "streaming_kvquant(clip=False)",
    "streaming_kvquant(key_bits=8, value_bits=8, clip=False)",
    "int4(keys='channel', values='channel', symmetric=True)",
]  # fmt: skip
UNCALIBRATED = ["kvquant", "kvquant(bits=2)"]
LOUD = 16.0  # how much louder the scaled pairs are
PAIRS = (3, 11)  # which of each head's rotary pairs
COPY = Path("results") / "testbed-loud-keys"


def loud_channels(width: int) -> Tensor:
    """The channels of a head that are scaled: both of each pair."""
    return torch.tensor([c for p in PAIRS for c in (p, p + width // 2)])


def loud_copy(folder: Path) -> str:
    """The testbed model with loud key channels, saved in `folder`; the same function."""
    model, tokenizer = load.pretrained(testbed.path(), torch.float32, torch.device("cpu"))
    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    channels = loud_channels(config.head_dim)
    with torch.no_grad():
        for layer in model.model.layers:
            for head in range(config.num_key_value_heads):
                layer.self_attn.k_proj.weight[head * config.head_dim + channels] *= LOUD
                for query in range(head * group, (head + 1) * group):
                    layer.self_attn.q_proj.weight[query * config.head_dim + channels] /= LOUD
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def calibrations(folder: Path) -> list[Path]:
    """KVQuant's files for the testbed model, calibrated on a module that it was trained on.

    Files in `folder` are used again: remove them when calibration changes.
    """
    text, found = str(stdlib_root() / "argparse.py"), []
    for bits in (4, 3, 2):
        for outliers in (0.01, 0.0):
            out = folder / f"kvquant-{bits}-{outliers:.0%}.safetensors"
            if not out.exists():
                ask = Options("testbed", text, out, bits, outliers, 16, 1024, "float32", "cpu", False)  # fmt: skip
                calibrate(ask, console())
            found.append(out)
    return found


def louder(plain: Path, model: Any, folder: Path) -> Path:
    """The calibration of the loud copy, `model`: ranges of loud channels times `LOUD`.

    The copy computes the same, and a power of two rounds nothing, so that calibrating it gives just
    that (tests/test_format_quality.py) and would take as long again.
    """
    made = Calibration.load(plain)
    channels = loud_channels(made.shape[2])
    for ranges in (made.key_offset, made.key_scale):
        ranges[..., channels] *= LOUD
    whose = {"model": folder.name, "model_sha256": identity.model_sha256(model)}
    out = folder / plain.name
    dataclasses.replace(made, facts=made.facts | whose).save(out)
    return out


def kvquant(path: Path) -> str:
    """The recipe of a calibration."""
    made = Calibration.load(path)
    where = os.path.relpath(path)
    return f"kvquant(bits={made.bits}, outliers={made.outliers}, calibration={where!r})"


class Bench:
    """A model, and the documents `[B, N]` and tasks that all recipes share."""

    def __init__(self, name: str, given: argparse.Namespace):
        self.model, self.tokenizer = compare.load_model(name, "float32", "cpu")
        self.setting = {k: getattr(given, k) for k in ("documents", "tokens", "prefill", "needles", "needle_tokens")}  # fmt: skip
        self.prefill = given.prefill
        self.documents = self._modules(given.documents, given.tokens)
        raw = texts.load(TEXT, self.tokenizer, given.needle_tokens).raw
        self.tasks = needles.prepare(raw, self.tokenizer, given.needles, given.needle_tokens, 0)
        self.facts = {
            "setting": self.setting,
            "model": dataclasses.asdict(identity.model_facts(self.model, name)),
            "text": {"name": TEXT, "sha256": identity.tokens_sha256(self.documents),
                     "needle_sha256": needles.fingerprint(self.tasks)},
            "environment": dataclasses.asdict(identity.environment(self.model.device)),
        }  # fmt: skip
        self.dense = self.read(Recipe())[0]

    def _modules(self, count: int, tokens: int) -> Tensor:
        """The first tokens of the first modules that are long enough, int64 `[count, tokens]`."""
        found: list[list[int]] = []
        for text in texts.documents(TEXT):
            ids = self.tokenizer(text[: 32 * tokens], verbose=False)["input_ids"]
            found += [ids[:tokens]] if len(ids) >= tokens else []
            if len(found) == count:
                return torch.tensor(found)
        raise ValueError(f"text {TEXT!r} has {len(found)} modules of {tokens} tokens, not {count}")

    def read(self, subject: Recipe, stepwise: bool = False) -> tuple[Tensor, CompressedCache]:
        """Logits `[B, N-1-P, V]` of all tokens after the prefill but the last, and the cache then.

        They go in up to the next sealing, or one by one.
        """
        cache, ids, at = CompressedCache(self.model, subject, None), self.documents, self.prefill
        self.model(input_ids=ids[:, :at], past_key_values=cache, use_cache=True, logits_to_keep=1)
        made, fmt = [], subject.format
        exact = fmt.pinned + fmt.residual if fmt else 0
        while at < ids.shape[1] - 1:
            step = 1 if stepwise else PAGE - (at - exact) % PAGE
            x = ids[:, at : min(at + step, ids.shape[1] - 1)]
            at += x.shape[1]
            made.append(self.model(input_ids=x, past_key_values=cache, use_cache=True).logits)
            if not stepwise:
                self._check(cache, (at - exact) // PAGE * PAGE, subject)
        return torch.cat(made, dim=1), cache

    def _check(self, cache: CompressedCache, sealed: int, subject: Recipe) -> None:
        """Pages are sealed where `read` expects it."""
        stats, model = cache.stats(), self.facts["model"]
        found = stats.sealed / (model["layers"] * model["kv_heads"] * len(self.documents))
        if found != sealed:
            raise RuntimeError(
                f"'{subject}' has sealed {found:g} tokens of each head, not {sealed}: figures would "
                "differ from those of tokens that come one by one"
            )

    def key(self, recipe: str) -> str:
        """Hash of everything that determines a line."""
        environment = {k: v for k, v in self.facts["environment"].items() if k not in ("kvloom", "git")}  # fmt: skip
        full = Cell(Recipe.parse(recipe)).facts.full
        model = self.facts["model"]["sha256"]
        return identity.cell_key(
            recipe=full, setting=self.setting, model=model, text=self.facts["text"], environment=environment
        )  # fmt: skip

    def measure(self, recipe: str) -> dict[str, Any]:
        """Figures of one recipe; lists are per document or task."""
        subject = Recipe.parse(recipe)
        disjoint.check(subject, TEXT, [*self.documents, *(task.context for task in self.tasks)])
        logits, cache = self.read(subject)
        row: dict[str, Any] = {"nll": [], "dense_nll": [], "kl": [], "top1": []}
        for dense, own, ids in zip(self.dense, logits, self.documents, strict=True):
            scores = Scores()
            scores.add(dense, own, ids[self.prefill + 1 :])
            for name, values in zip(row, vars(scores).values(), strict=True):
                row[name].append(sum(values) / len(values))
        stats = cache.stats()
        row["decoded"] = logits.shape[1]
        row["right"] = [
            int(needles.answered(self.model, self.tokenizer, subject, None, task))
            for task in self.tasks
        ]
        names = ("nbytes", "dense_nbytes", "avg_key_bits", "avg_value_bits", "sealed", "evicted", "by_part")  # fmt: skip
        return row | {name: getattr(stats, name) for name in names}


def held(path: Path) -> set[str]:
    """Keys of the lines of a file; a line that a killed process left incomplete is cut off."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return {json.loads(line)["key"] for line in whole.splitlines()}


def measure_all(bench: Bench, recipes: list[str], folder: Path) -> None:
    """Append a line for each recipe that has none."""
    path = folder / "results.jsonl"
    known = held(path)
    for recipe in recipes:
        key, start = bench.key(recipe), time.perf_counter()
        if key in known:
            continue
        row = bench.measure(recipe)
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        line = {"key": key, "recipe": str(Recipe.parse(recipe)), "measured_at": when,
                "took": round(time.perf_counter() - start, 1), **bench.facts, **row}  # fmt: skip
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
        kl = sum(row["kl"]) / len(row["kl"])
        print(f"{folder.name} {recipe}: KL {kl:.5f}, needles {sum(row['right'])}, {line['took']} s",
              flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=1537, help="of each")
    parser.add_argument("--prefill", type=int, default=1024)
    parser.add_argument("--needles", type=int, default=8)
    parser.add_argument("--needle-tokens", type=int, default=768)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    plain, loud = RESULTS / "formats", RESULTS / "formats-loud-keys"
    with torch.inference_mode():
        benches = {loud: Bench(loud_copy(COPY), given), plain: Bench(compare.TESTBED, given)}
    files = {plain: calibrations(plain)}
    files[loud] = [louder(path, benches[loud].model, COPY) for path in files[plain]]
    for family in (UNIFORM, PUBLISHED, STREAMING, None):
        for folder, bench in benches.items():
            folder.mkdir(parents=True, exist_ok=True)
            recipes = family or UNCALIBRATED + [kvquant(path) for path in files[folder]]
            with torch.inference_mode():
                measure_all(bench, recipes, folder)


if __name__ == "__main__":
    main()
