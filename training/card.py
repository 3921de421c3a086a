"""The model card: what the weights are, what they were made from, what was measured on them.

    python -m training.card [FOLDER]

Writes the pages and figures beside the weights again, from ``training.json`` and ``evaluation.json``
alone. Nothing is measured and no training run is needed. Without FOLDER: the weights that kvloom ships.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kvloom.testbed import WEIGHTS
from training import config, figures, provenance, report
from training.config import Recipe

CARD = """# The testbed model

A small language model that kvloom trained itself, so that perplexity and recall can be measured
through a compressed KV cache anywhere, without a download. It is an instrument for measuring
caches: it writes plausible sentences and finds planted facts, and knows nothing about the world.

| | |
| --- | --- |
| architecture | Llama, RoPE (theta {rope_theta:g}), tied embeddings |
| shape | {layers} layers, hidden {hidden}, {heads} query and {kv_heads} KV heads of {head_dim} |
| parameters | {parameters:,}, stored in fp16, loaded as float32 unless a dtype is given |
| tokenizer | byte-level BPE, {vocab:,} tokens, single digits; `<|begin|>` starts every text |
| context | {max_positions:,} tokens; longest length trained so far {longest:,} |
| licence | that of kvloom, for these weights |

## How it was made

{tokens:,} tokens ({share:.0f} % of a schedule of {planned:,}) in {hours:.1f} hours on {machine},
seed {seed}, torch {torch}, tokenizers {tokenizers}, Python {python}. The recipe is in
`training.json` beside this card, word for word, with those of earlier parts of the run if there were
any. `training/README.md` in the repository has the commands, and says what they repeat and what not.
{remarks}
Data: English novels in the public domain (computationalstylistics/100_english_novels and
dbamman/litbank; litbank's collection is CC BY 4.0), and the Python standard library's sources and
language reference (PSF licence), of which the modules that `kvloom.testbed.texts` names as held
out were never seen. The rest is synthetic: facts asked again, key-value lists, copied and repeated
spans. Synthetic sequences count in the loss only where looking back can predict them. Sequences
start short and grow; matrices are trained with Muon, everything else with AdamW.
{weights}

{measured}{judged}
## Limits

- English prose of the 19th century and Python; anything else is foreign to it.
- Facts of the form `name, thing, value` and lists of keys and values are what it retrieves; it does
  not answer free questions.
{limits}- Figures above are with a dense cache in float32.
- Being small, it has few heads: a method that relies on many specialised heads shows less here
  than in a large model.
- Attention sinks are weaker than in Llama-2-7B, where all layers and heads above the lowest two layers
  attend heavily to the first token (Xiao et al., arXiv:2309.17453).
"""


def write(folder: Path) -> None:
    """``MODEL_CARD.md``, and with an evaluation of these weights ``evaluation.md`` and figures."""
    measured = _measured(folder)
    if measured:
        figures.draw(measured, folder / "figures")
        (folder / "evaluation.md").write_text(report.evaluation(measured))
    if (folder / "training.json").exists():
        made = json.loads((folder / "training.json").read_text())
        (folder / "MODEL_CARD.md").write_text(card(made, config.parse(made["recipe"]), measured))


def _measured(folder: Path) -> dict[str, Any] | None:
    """The evaluation beside the weights, if there is one and it is of these weights."""
    path = folder / "evaluation.json"
    measured = json.loads(path.read_text()) if path.exists() else None
    weights = provenance.file_sha256(folder / "model.safetensors")
    return measured if measured and measured["about"]["weights_sha256"] == weights else None


def card(made: dict[str, Any], recipe: Recipe, measured: dict[str, Any] | None) -> str:
    """The card of an exported checkpoint; figures only if they were measured."""
    model, versions = recipe.model, made["versions"]
    remarks = [made["note"], "" if made["tokens"] >= made["planned_tokens"] else UNFINISHED]
    averaged = made["weights"] == "average"
    return CARD.format(
        **vars(model),
        parameters=made["parameters"],
        longest=_longest(recipe, made["tokens"]),
        tokens=made["tokens"],
        planned=made["planned_tokens"],
        share=100 * made["tokens"] / made["planned_tokens"],
        hours=made["seconds"] / 3600,
        seed=made["seed"],
        machine=versions["machine"],
        torch=versions["torch"],
        tokenizers=versions["tokenizers"],
        python=versions["python"],
        remarks="".join(f"{remark}\n" for remark in remarks if remark),
        weights="The weights are the running average of the trained ones." if averaged else "",
        measured=report.evaluation(measured) if measured else "Not evaluated yet.\n",
        limits=f"{report.limits(measured)}\n" if measured else "",
        judged=AIMS.format(report.targets(measured, versions["machine"] != "CPU"))
        if measured
        else "",
    )


AIMS = """
## What was set out to be reached

By the figures above, as measured.

{}
"""
UNFINISHED = """**The schedule is not finished**: the learning rate has not been lowered to its end
and later stages have not been seen. The figures below are of these weights as they are."""


def _longest(recipe: Recipe, tokens: int) -> int:
    """The longest length of the stages that training has reached."""
    reached = recipe.stages[: recipe.stages.index(recipe.stage(max(0, tokens - 1))) + 1]
    return max(length for stage in reached for length in stage.lengths)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=WEIGHTS)
    return parser


if __name__ == "__main__":
    write(parser().parse_args().folder)
