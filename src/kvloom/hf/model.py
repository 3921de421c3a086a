"""Preparing a model for a compressed cache, and checking that the two fit."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from kvloom.core import fit
from kvloom.core.budget import Budget
from kvloom.core.plan import LayerPlan
from kvloom.core.recipe import Recipe
from kvloom.formats.dense import Dense
from kvloom.hf import attention
from kvloom.hf.families import cache_refusal, handle_refusal
from kvloom.hf.rope import decoder_of
from kvloom.hf.sliding import kv_shape, sliding_elements

_HOOKED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_DENSE_NEEDS = frozenset({"keys", "values", "positions"})


def attach(model: nn.Module, config: Any, recipe: Recipe, mode: str) -> bool:
    """Make `model` read compressed caches; returns whether it needs dense tensors instead.

    Raises ValueError, with the reason, if model and recipe cannot work together.
    """
    if mode not in ("auto", "dense"):
        raise ValueError(f"attention={mode!r}: use 'auto' or 'dense'")
    refusal = cache_refusal(config)
    if refusal is not None:
        raise ValueError(f"{type(model).__name__} cannot use a compressed cache: {refusal}")
    reason = handle_refusal(model, config) if mode == "auto" else "attention='dense'"
    if reason is not None:
        check_dense(recipe, f"{type(model).__name__} needs dense tensors from its cache: {reason}")
        _hook_decoder(decoder_of(model))
        return True
    attention.install()
    if config._attn_implementation != attention.NAME:
        model.set_attn_implementation(attention.NAME)  # type: ignore[operator]
    return False


def check_dense(recipe: Recipe, reason: str) -> None:
    """Raise ValueError if a recipe cannot work with dense tensors, and say why they are needed."""
    scorer = recipe.scorer
    problem = None
    if recipe.needs - _DENSE_NEEDS:
        problem = f"it needs {sorted(recipe.needs - _DENSE_NEEDS)}, which only our attention sees"
    elif recipe.merger is not None:
        problem = "merged entries carry a mass that only our attention applies"
    elif recipe.allocator is not None or (scorer is not None and scorer.exempt_layers):
        problem = "budgets that differ between layers or heads do not fit one mask"
    elif scorer is not None and scorer.in_cache:
        problem = "in-cache positions rotate the query, which only our attention does"
    elif recipe.evicts and recipe.format is not None and not recipe.format.movable:
        problem = f"{recipe.format.name} evicts whole tiles, so that heads differ in length"
    if problem is not None:
        raise ValueError(f"recipe '{recipe}' cannot be used here: {problem} ({reason})")


def plan_for(config: Any, recipe: Recipe, budget: Budget | None, layers: int) -> LayerPlan:
    """A plan from the config alone, checked: errors come before the first token."""
    heads, width = kv_shape(config)
    dtype = getattr(config, "dtype", None)
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.get_default_dtype()
    fmt = recipe.format or Dense()
    group = max(1, config.num_attention_heads // heads)
    plan = LayerPlan(
        recipe, budget, fmt, 0, max(1, layers), heads, width, width, dtype, group=group,
        other_elements=sliding_elements(config),
    )  # fmt: skip
    plan.layout  # noqa: B018  (raises if a width cannot be stored)
    fit.check(plan)
    return plan


def _hook_decoder(decoder: nn.Module) -> None:
    """Let dense-mode caches learn padding and positions before each forward of the decoder."""
    if decoder in _HOOKED:
        return
    decoder.register_forward_pre_hook(_tell_cache, with_kwargs=True)
    _HOOKED.add(decoder)


def _tell_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    from kvloom.hf.cache import CompressedCache

    cache = kwargs.get("past_key_values")
    if not isinstance(cache, CompressedCache):
        return
    inputs = kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    inputs = args[0] if inputs is None else inputs
    mask, seen = kwargs.get("attention_mask"), cache.get_seq_length()
    if isinstance(mask, torch.Tensor) and mask.ndim == 4 and cache.recipe.evicts:
        raise ValueError(
            f"a 4D attention mask {tuple(mask.shape)} addresses every column, but the recipe "
            f"'{cache.recipe}' evicts entries: pass a 2D mask, or a recipe without eviction"
        )
    two_d = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
    cache.context.host.check_decoder(module)
    cache.context.learn(two_d, seen, inputs.shape[1], cache.valid_tokens())
    cache.context.position_ids = kwargs.get("position_ids")
