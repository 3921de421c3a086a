"""Loading models and running them, for the rooms above that do not import transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
)
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


def random_llama(dtype: torch.dtype) -> Any:
    """A small Llama without training (seed it before): right for bytes, meaningless for quality."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=20480,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()  # type: ignore[arg-type]


class _Follow(LogitsProcessor):
    """Makes generate follow given tokens, and counts how often it would have chosen the same."""

    def __init__(self, tokens: Tensor):
        self.tokens, self.step, self.same = tokens.tolist(), 0, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.tokens[self.step]
        self.step += 1
        self.same += int(scores[0].argmax()) == token
        index = torch.tensor([token], device=scores.device)
        return torch.full_like(scores, float("-inf")).index_fill_(1, index, 0.0)


def greedy(
    model: Any, prompt: Tensor, cache: Any, new_tokens: int, follow: Tensor | None = None
) -> tuple[Tensor, float]:
    """Greedy tokens `[N]` after `prompt [1, T]`, and the share of `follow` that ranks first.

    With `follow [N]` the tokens are dictated and only compared with what would have been chosen.
    """
    processor = None if follow is None else _Follow(follow)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        do_sample=False,
        min_new_tokens=new_tokens if follow is None else None,
        max_new_tokens=new_tokens,
        logits_processor=LogitsProcessorList([] if processor is None else [processor]),
    )
    tokens = out[0, prompt.shape[1] :]
    return tokens, 1.0 if processor is None else processor.same / len(tokens)
