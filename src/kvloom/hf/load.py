"""Loading models and running them, for the rooms above that do not import transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar


def quiet() -> None:
    """Let transformers report errors only, and load without a progress bar."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    disable_progress_bar()


def pretrained(
    source: str | Path, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> tuple[Any, Any]:
    """`(model, tokenizer)` from a folder or hub name, ready for inference.

    Raises ValueError if there is no such model, or the hub cannot be reached.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"model {str(source)!r} cannot be loaded ({reason[0] if reason else 'no reason'}); "
            "name a folder with config.json, weights and tokenizer, or a model of the hub; offline, "
            "only what was downloaded before"
        ) from None
    return model.eval().to(device), tokenizer


def forward(model: Any, ids: Tensor, cache: Any, keep: int = 1) -> Tensor:
    """Logits `[keep, V]` of the last `keep` tokens of `ids [1, n]`; None as cache: without one."""
    out = model(
        input_ids=ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=keep
    )
    logits: Tensor = out.logits[0]
    return logits[-keep:]


class _Tell(BaseStreamer):
    """Hands new tokens to a function as they are chosen."""

    def __init__(self, tell: Callable[[list[int]], None]):
        self.tell, self.prompt = tell, True

    def put(self, value: Tensor) -> None:
        if not self.prompt:  # transformers puts the prompt first
            self.tell(value.flatten().tolist())
        self.prompt = False

    def end(self) -> None:
        """Nothing is held back."""


def generate(
    model: Any,
    prompt: Tensor,
    cache: Any,
    new_tokens: int,
    temperature: float = 0.0,
    tell: Callable[[list[int]], None] | None = None,
) -> Tensor:
    """Tokens `[N]` after `prompt [1, T]`, N at most `new_tokens`; greedy at temperature 0."""
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        streamer=None if tell is None else _Tell(tell),
        **(sampling or {"do_sample": False}),
    )
    return out[0, prompt.shape[1] :]
