"""`kvloom generate`: continue a prompt with a compressed cache, and say what the cache held."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from kvloom.evaluation import compare
from kvloom.hf import load
from kvloom.hf.cache import CompressedCache


@dataclass
class Options:
    """What is asked for; see `kvloom generate --help`."""

    model: str
    prompt: str | None
    prompt_file: Path | None
    recipe: str
    budget: str | None
    new_tokens: int
    temperature: float
    seed: int
    dtype: str
    device: str


def run(options: Options, out: Console) -> None:
    """Print the text as it is chosen, then the cache's table. Raises ValueError on wrong input."""
    prompt = read_prompt(options.prompt, options.prompt_file)
    model, tokenizer = compare.load_model(options.model, options.dtype, options.device)
    cache = CompressedCache(model, options.recipe, options.budget)
    ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"].to(model.device)
    torch.manual_seed(options.seed)
    writer = _Writer(tokenizer, out)
    with torch.inference_mode():
        load.generate(model, ids, cache, options.new_tokens, options.temperature, writer)
    writer.flush()
    out.print()
    out.print()
    out.print(str(cache), markup=False)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from one of its two sources. Raises ValueError if there is none or it is empty."""
    if (prompt is None) == (file is None):
        raise ValueError(
            "give the prompt as --prompt TEXT or as --prompt-file FILE, one of the two"
        )
    if file is not None:
        try:
            prompt = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"prompt file {str(file)!r} cannot be read: {error}") from None
    assert prompt is not None
    if not prompt.strip():
        raise ValueError(f"the prompt {(str(file) if file else prompt)!r} is empty")
    return prompt


class _Writer:
    """Prints tokens as text, holding back what may still change with the next token."""

    def __init__(self, tokenizer: Any, out: Console):
        self.tokenizer, self.out = tokenizer, out
        self.ids: list[int] = []
        self.shown = 0

    def __call__(self, tokens: list[int]) -> None:
        self.ids += tokens
        text = self._text()
        if not text.endswith("\ufffd"):  # half of a character
            self._print(text)

    def flush(self) -> None:
        """Print what was held back."""
        self._print(self._text())

    def _text(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _print(self, text: str) -> None:
        self.out.print(text[self.shown :], end="", markup=False, soft_wrap=True)
        self.shown = len(text)
