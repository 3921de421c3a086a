"""kvloom: every way of shrinking an LLM's KV cache, in one cache.

    from kvloom import CompressedCache
    cache = CompressedCache(model, "h2o | int4", budget="25%")
    out = model.generate(**inputs, past_key_values=cache)

Importing kvloom patches nothing; constructing a cache from a model sets that model's attention
implementation.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from kvloom.core import registry
from kvloom.core.budget import Budget
from kvloom.core.merge import CentroidMerger, Merger, SurvivorMerger
from kvloom.core.policy import Allocator, Policy, Scorer
from kvloom.core.recipe import Recipe
from kvloom.core.registry import policies as methods
from kvloom.core.registry import presets, register
from kvloom.core.schedule import Lazy

if TYPE_CHECKING:
    from kvloom.hf.cache import CompressedCache
    from kvloom.hf.compressed_model import (
        CompressedLlamaForCausalLM,
        CompressedModelForCausalLM,
        CompressionConfig,
    )

try:
    __version__ = version("kvloom")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Allocator",
    "Budget",
    "CentroidMerger",
    "CompressedCache",
    "CompressedLlamaForCausalLM",
    "CompressedModelForCausalLM",
    "CompressionConfig",
    "Lazy",
    "Merger",
    "Policy",
    "Recipe",
    "Scorer",
    "SurvivorMerger",
    "methods",
    "presets",
    "register",
]  # fmt: skip


_NEED_TRANSFORMERS = {
    "CompressedCache": "kvloom.hf.cache",
    "CompressedLlamaForCausalLM": "kvloom.hf.compressed_model",
    "CompressedModelForCausalLM": "kvloom.hf.compressed_model",
    "CompressionConfig": "kvloom.hf.compressed_model",
}


def __getattr__(name: str) -> Any:
    if name in _NEED_TRANSFORMERS:  # lazily: it takes seconds to import
        return getattr(import_module(_NEED_TRANSFORMERS[name]), name)
    for policy in registry.policies().values():  # H2O, Int4, ...: discovered, not listed
        if policy.__name__ == name:
            return policy
    raise AttributeError(f"module 'kvloom' has no attribute {name!r}")
