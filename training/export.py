"""Checkpoint to a folder that transformers loads: fp16 weights, tokenizer, configuration, card.

    python -m training.export DIR --recipe training/recipes/cpu.toml [--to FOLDER]

Without ``--to``, they become the weights that kvloom ships.

The averaged weights are exported: at a constant learning rate they are the better model.
``training.evaluate`` on the result then puts its figures into the card.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig

from kvloom.testbed import WEIGHTS
from training import card, checkpoint, config
from training.tokenizer import BEGIN, BEGIN_ID, PAD, PAD_ID


def llama_config(model: config.ModelConfig) -> LlamaConfig:
    """The same shape in transformers' words.

    ``dtype`` is float32: the file is fp16 to be small, but half precision is slow on CPUs.
    """
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=model.vocab,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_positions,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=BEGIN_ID,
        eos_token_id=BEGIN_ID,
        pad_token_id=PAD_ID,
        dtype="float32",
    )


def export(
    run: Path,
    recipe_path: Path,
    target: Path,
    weights: str = "average",
    note: str = "",
    earlier: Sequence[Path] = (),
) -> None:
    """Write the newest checkpoint of ``run`` to ``target``; ``note`` goes into the card.

    ``earlier`` are the recipes of the parts of the run before this one, recorded beside its own.
    """
    recipe = config.load(recipe_path)
    newest = checkpoint.steps(run / "checkpoints")[-1]
    tensors, state = checkpoint.load(newest)
    target.mkdir(parents=True, exist_ok=True)
    prefix = f"{weights}/"
    half = {n.removeprefix(prefix): t.half() for n, t in tensors.items() if n.startswith(prefix)}
    if not all(torch.isfinite(t).all() for t in half.values()):
        raise ValueError(f"{newest}: weights exceed the range of fp16")
    save_file(half, target / "model.safetensors", metadata={"format": "pt"})
    llama_config(recipe.model).save_pretrained(target)
    GenerationConfig(
        bos_token_id=BEGIN_ID, eos_token_id=BEGIN_ID, pad_token_id=PAD_ID
    ).save_pretrained(target)
    _save_tokenizer(run, target, recipe.model.max_positions)
    made = {
        "weights": weights,
        "note": note,
        "parameters": sum(t.numel() for t in half.values()),
        **state,
    }
    made |= {"planned_tokens": recipe.total, "recipe": recipe_path.read_text()}
    made["earlier_recipes"] = [path.read_text() for path in earlier]
    (target / "training.json").write_text(json.dumps(made, indent=1))
    card.write(target)


def _save_tokenizer(run: Path, target: Path, longest: int) -> None:
    shutil.copyfile(run / "data" / "tokenizer.json", target / "tokenizer.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": BEGIN,
        "pad_token": PAD,
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder given to training.train as --out")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=WEIGHTS)
    parser.add_argument("--weights", choices=("average", "model"), default="average")
    parser.add_argument("--note", default="", help="what the card should say about this run")
    parser.add_argument("--earlier", type=Path, nargs="*", default=[], help="recipes before this")
    return parser


def main() -> None:
    args = parser().parse_args()
    export(args.run, args.recipe, args.to, args.weights, args.note, args.earlier)


if __name__ == "__main__":
    main()
