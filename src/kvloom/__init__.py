"""kvloom: every way of shrinking an LLM's KV cache, in one cache.

    from kvloom import CompressedCache
    cache = CompressedCache(model, "h2o | int4", budget="25%")
    out = model.generate(**inputs, past_key_values=cache)

Importing kvloom patches nothing; constructing a cache from a model sets that model's attention
implementation.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from kvloom.core import registry
from kvloom.core.budget import Budget
from kvloom.core.policy import Allocator, Merger, Policy, Scorer
from kvloom.core.recipe import Recipe
from kvloom.core.registry import policies as methods
from kvloom.core.registry import presets, register
from kvloom.core.schedule import Lazy

if TYPE_CHECKING:
    from kvloom.hf.cache import CompressedCache

try:
    __version__ = version("kvloom")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Allocator", "Budget", "CompressedCache", "Lazy", "Merger", "Policy", "Recipe", "Scorer",
    "methods", "presets", "register",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "CompressedCache":  # lazily: transformers takes seconds to import
        from kvloom.hf.cache import CompressedCache

        return CompressedCache
    for policy in registry.policies().values():  # H2O, Int4, ...: discovered, not listed
        if policy.__name__ == name:
            return policy
    raise AttributeError(f"module 'kvloom' has no attribute {name!r}")
