"""Every format and preset on the testbed model: quality through the cache against effective bits.

    python benchmarks/format_quality.py

Measures two models: the testbed model, and a copy of it whose keys have loud channels. In the copy,
a few rotary pairs of every key head are scaled up and those of its queries down by the same factor:
rotation commutes with that, so the function is unchanged, while a scale per token has to span the
loud pairs. Rows go to docs/results/formats*/results.jsonl (finished ones are used again), from which
`docs/make_formats.py` makes the table and the figure.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch

from kvloom import testbed
from kvloom.cli._console import console
from kvloom.cli.calibrate import Options as Calibration
from kvloom.cli.calibrate import run as calibrate
from kvloom.cli.compare import Options, run
from kvloom.evaluation.results import Protocol
from kvloom.hf import load
from kvloom.testbed import texts

RESULTS = Path(__file__).parent.parent / "docs" / "results"
UNIFORM = [
    "fp8", "int8", "k8v4", "int4", "int4(symmetric=True)", "int4_channel", "rotated_int4",
    "int4(hadamard='both')", "int3", "int3(hadamard='both')", "int2", "int2(hadamard='both')",
]  # fmt: skip
PUBLISHED = [
    "kivi(bits=4)", "kivi(bits=2)", "turboquant_mse(bits=4)", "turboquant_mse(bits=3)",
    "turboquant_mse(bits=2)",
]  # fmt: skip
STREAMING = [
    "streaming_kvquant_int8", "streaming_kvquant_int4", "streaming_kvquant_int4_sink_outlier",
    "streaming_kvquant_ablation_sink", "streaming_kvquant_ablation_outlier",
    "streaming_kvquant_ablation_ema95", "streaming_kvquant(rope='pair')",
    "streaming_kvquant(rope='post')", "streaming_kvquant(clip=False)",
    "streaming_kvquant(key_bits=8, value_bits=8, clip=False)",
    "int4(keys='channel', values='channel', symmetric=True)", "kvquant", "kvquant(bits=2)",
]  # fmt: skip
LOUD = 16.0  # how much louder the scaled pairs are
PAIRS = (3, 11)  # which of each head's rotary pairs


def loud_copy(folder: Path) -> str:
    """The testbed model with loud key channels, saved in `folder`; the same function."""
    model, tokenizer = load.pretrained(testbed.path(), torch.float32, torch.device("cpu"))
    config = model.config
    half, group = config.head_dim // 2, config.num_attention_heads // config.num_key_value_heads
    channels = torch.tensor([c for p in PAIRS for c in (p, p + half)])
    with torch.no_grad():
        for layer in model.model.layers:
            for head in range(config.num_key_value_heads):
                layer.self_attn.k_proj.weight[head * config.head_dim + channels] *= LOUD
                for query in range(head * group, (head + 1) * group):
                    layer.self_attn.q_proj.weight[query * config.head_dim + channels] /= LOUD
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def calibrations(model: str, folder: Path) -> list[str]:
    """Recipes of KVQuant, calibrated for this model on a module that it was trained on."""
    text, recipes = str(texts.stdlib_root() / "argparse.py"), []
    for bits in (4, 3, 2):
        for outliers in (0.01, 0.0):
            out = folder / f"kvquant-{bits}-{outliers:.0%}.safetensors"
            if not out.exists():
                ask = Calibration(
                    model, text, out, bits, outliers, 16, 1024, "float32", "cpu", False
                )
                calibrate(ask, console())
            where = os.path.relpath(out)
            recipes.append(f"kvquant(bits={bits}, outliers={outliers}, calibration={where!r})")
    return recipes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--prefill", type=int, default=1024)
    parser.add_argument("--needles", type=int, default=12, help="of 768 tokens")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    protocol = Protocol(given.tokens, given.prefill, needles=given.needles, needle_tokens=768)
    with tempfile.TemporaryDirectory() as folder:
        for model, name in (("testbed", "formats"), (loud_copy(Path(folder)), "formats-loud-keys")):
            out = RESULTS / name
            out.mkdir(parents=True, exist_ok=True)
            recipes = UNIFORM + PUBLISHED + STREAMING + calibrations(model, out)
            run(
                Options(
                    recipes=recipes,
                    protocol=protocol,
                    out=out,
                    model=model,
                    dtype="float32",
                    threads=given.threads,
                )
            )


if __name__ == "__main__":
    main()
