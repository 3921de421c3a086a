"""Tiny random models of every family, and the inputs that the tests feed them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as tf
from torch import Tensor

VOCABULARY = 97
_BASE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 8192, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "initializer_range": 0.3,
}  # fmt: skip
_ALTERNATE = ["sliding_attention", "full_attention", "sliding_attention"]


def _rope(kind: str, **extra: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **extra}}


_LLAMA3 = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
_YARN = _rope("yarn", factor=16.0, original_max_position_embeddings=256)

# name -> (architecture, changes to the base config, keys that the config does not take)
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("Llama", {}, ()),
    "llama3_rope": ("Llama", _LLAMA3, ()),
    "llama_yarn": ("Llama", _YARN, ()),
    "mistral": ("Mistral", {"sliding_window": None}, ()),
    "qwen3": ("Qwen3", {}, ()),
    "gpt_neox": ("GPTNeoX", {"rotary_pct": 0.25}, ("num_key_value_heads", "head_dim")),
    "gpt_neox_80": (
        "GPTNeoX",
        {"rotary_pct": 0.25, "hidden_size": 160, "num_attention_heads": 2},
        ("num_key_value_heads", "head_dim"),
    ),
    "phi3": ("Phi3", {"sliding_window": None, "partial_rotary_factor": 0.75}, ("head_dim",)),
    "gemma2": (
        "Gemma2",
        {"sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
        (),
    ),
    "gemma3": (
        "Gemma3",
        {"sliding_window": 8, "query_pre_attn_scalar": 16, "layer_types": _ALTERNATE},
        (),
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
            "layer_types": _ALTERNATE,
            **_rope("yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
                    original_max_position_embeddings=4096),
        },
        (),
    ),
    "cohere": ("Cohere", {}, ("head_dim",)),
    "glm": ("Glm", {"partial_rotary_factor": 0.5}, ()),
}  # fmt: skip


@cache
def _weights(name: str, seed: int) -> Any:
    architecture, changes, drop = FAMILIES[name]
    fields = {k: v for k, v in {**_BASE, **changes}.items() if k not in drop}
    config_name = {"Gemma3": "Gemma3TextConfig"}.get(architecture, f"{architecture}Config")
    config = getattr(tf, config_name)(**fields)
    torch.manual_seed(seed)
    model = getattr(tf, f"{architecture}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if parameter.endswith(("q_norm.weight", "k_norm.weight")):
                weight += torch.rand_like(weight) - 0.5  # else all keys have the same norm
    return model


def build(
    name: str, *, attention: str | None = None, dtype: Any = torch.float32, seed: int = 0
) -> Any:
    """A fresh model of a family; equal weights for equal arguments."""
    template = _weights(name, seed)
    config = type(template.config)(**template.config.to_dict())
    with torch.no_grad():
        model = type(template)(config)
        model.load_state_dict(template.state_dict())
    model = model.to(dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


def tokens(length: int, rows: int = 1, seed: int = 1) -> Tensor:
    """Random token ids `[rows, length]` without padding or bos."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


def left_padded(lengths: list[int], seed: int = 1) -> tuple[Tensor, Tensor]:
    """Ids and mask of rows of these lengths; row i equals `tokens(lengths[i], seed=seed + i)`."""
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        ids[i, width - n :] = tokens(n, seed=seed + i)[0]
        mask[i, width - n :] = 1
    return ids, mask


def generate(
    model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None, n: int = 12, **kw: Any
) -> Any:
    """Greedy generation with logits kept."""
    return model.generate(
        ids, attention_mask=torch.ones_like(ids) if mask is None else mask, past_key_values=cache,
        max_new_tokens=n, do_sample=False, return_dict_in_generate=True, output_logits=True, **kw,
    )  # fmt: skip
