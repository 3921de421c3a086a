"""A training recipe: one TOML file says the model, the optimiser, the curriculum and the seed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomllib


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the Llama. Embeddings are tied; head_dim is free of ``hidden / heads``."""

    vocab: int = 4096
    hidden: int = 256
    intermediate: int = 704
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 100_000.0
    max_positions: int = 4096
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class Stage:
    """One span of the curriculum: which sequences, how long, until how many tokens.

    ``lengths`` and ``mixture`` are weights; each batch draws one length, each sequence one kind.
    ``phrasings`` limits facts to the first few ways of saying them; 0 means all, and questions too.
    ``invented`` is the share of phrasings that are made up on the spot (``training.phrasings``).
    """

    until: int
    batch_tokens: int
    lengths: dict[int, float]
    mixture: dict[str, float]
    phrasings: int = 0
    invented: float = 0.0


@dataclass(frozen=True)
class Optimizer:
    """Learning rates and their schedule, counted in tokens so that pauses change nothing.

    The rate is flat up to ``hold``, then falls as 1/sqrt(tokens), and linearly to zero over the
    last ``cooldown``: weights taken at any moment are then close to converged.
    """

    muon_lr: float = 0.02
    adam_lr: float = 0.004
    momentum: float = 0.95
    weight_decay: float = 0.02
    warmup: int = 300_000
    hold: int = 10_000_000
    cooldown: int = 15_000_000
    ema_tokens: int = 1_500_000

    def scale(self, tokens: int, total: int) -> float:
        """Factor on both learning rates after ``tokens`` of ``total``."""
        rise = min(1.0, (tokens + 1) / self.warmup)
        fall = (self.hold / max(tokens, self.hold)) ** 0.5
        return rise * fall * max(0.0, min(1.0, (total - tokens) / self.cooldown))

    def ema_decay(self, tokens: int, batch_tokens: int) -> float:
        """Decay of the averaged weights; the window grows with training, up to ``ema_tokens``."""
        window = min(self.ema_tokens, tokens / 5 + batch_tokens)
        return max(0.0, 1.0 - batch_tokens / window)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a run, apart from the texts."""

    seed: int
    answer_weight: float
    code_share: float
    bf16: bool
    micro_tokens: int
    save_seconds: float
    log_steps: int
    probe_steps: int
    workers: int
    model: ModelConfig
    optimizer: Optimizer
    stages: tuple[Stage, ...]

    @property
    def total(self) -> int:
        return self.stages[-1].until

    @property
    def digest(self) -> str:
        """Hash of all values: tells whether a recipe was edited between two parts of a run."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def stage(self, tokens: int) -> Stage:
        """The stage a batch belongs to that starts after ``tokens``."""
        return next((s for s in self.stages if tokens < s.until), self.stages[-1])


def load(path: Path) -> Recipe:
    """Read a recipe; see ``parse``."""
    return parse(path.read_text(), str(path))


def parse(text: str, name: str = "recipe") -> Recipe:
    """A recipe from TOML. Raises ValueError on what would otherwise fail hours later."""
    raw = tomllib.loads(text)
    stages = tuple(_stage(entry) for entry in raw.pop("stage"))
    model, optimizer = ModelConfig(**raw.pop("model")), Optimizer(**raw.pop("optimizer"))
    recipe = Recipe(model=model, optimizer=optimizer, stages=stages, **raw)
    if list(stages) != sorted(stages, key=lambda s: s.until):
        raise ValueError(f"{name}: stages must be ordered by `until`")
    for stage in stages:
        if any(stage.batch_tokens % length for length in stage.lengths):
            raise ValueError(f"{name}: batch_tokens must be a multiple of every length: {stage}")
    longest = max(length for stage in stages for length in stage.lengths)
    if longest > model.max_positions:
        raise ValueError(f"{name}: length {longest} exceeds max_positions {model.max_positions}")
    return recipe


def _stage(raw: dict[str, Any]) -> Stage:
    lengths = {int(length): weight for length, weight in raw.pop("lengths").items()}
    return Stage(lengths=lengths, **raw)
