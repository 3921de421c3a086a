"""What the contract suite runs: everything that is registered, in small settings.

A new method needs no line here: it is found in the registry and tested with its defaults. Methods
with modes, or whose defaults do nothing, add texts to `VARIANTS`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from kvloom.core import registry
from kvloom.core.budget import DENSE_BYTES, Budget
from kvloom.core.recipe import Recipe
from kvloom.hf.model import plan_for
from tests.contract.covering import Case

CAPACITY = 90  # entries per head: below the prompt, above a page, so that sealed entries go too
NONE = "none"

# name -> texts that are tested beside the defaults
VARIANTS = {
    "streaming_llm": ["streaming_llm(positions='original')"],
    "h2o": ["h2o(sinks=3)"],
    "tova": ["tova(per_head=True)"],
    "snapkv": ["snapkv(pooling='max')"],
    "expected_attention": ["expected_attention(covariance=False)"],
    "knorm": ["knorm(recent_fraction=0.5)"],
    "kvquant": ["kvquant(bits=2, outliers=0.0)"],
    "nearest": ["nearest(keys=True)"],
    "mass_fold": ["mass_fold(weight='count')", "mass_fold(weight='score', min_similarity=0.3)"],
    "cam": ["cam(spread=5, seed=3)"],
    "dense": ["dense(rope='pre')", "dense(unpaged=0)"],
    "int4": ["int4(keys='channel')", "int4(hadamard='both', symmetric=True)"],
    "int3": ["int3(values='channel', value_bits=8, group=32, channels=32, hadamard='keys')"],
    "streaming_kvquant": [  # with outliers in most pages
        "streaming_kvquant(relative=1.05, chunk=128, adaptive=True)",
        "streaming_kvquant(absolute=1.0, key_outlier_bits=16, value_groups=4, rope='pair')",
    ],
}
# name -> texts that are tested instead of defaults that do nothing
INSTEAD = {
    "weighted": ["weighted(layers=(1.5, 0.7, 1.0), heads=(1.0, 0.6))"],
    "kivi": ["kivi(residual=8)"],  # 128 would keep everything exact
    "mp_kvm": [  # 64 centroids would leave little of the capacity
        "mp_kvm(max_centroids=6, adaptive_threshold=True)",
        "mp_kvm(max_centroids=5, similarity_threshold=0.4, min_merge_similarity=0.5, update='ema', "
        "ema=0.8, init_preserve_first_n=2, positions='slot', block=1)",
        "mp_kvm(max_centroids=6, metric='euclidean', similarity_threshold=-2.0, mass_bias=False, "
        "positions='positionless', flush_threshold=4, flush_interval=20)",
        "mp_kvm(max_centroids=7, rope='post', sample_stride=2, max_injected_centroids=3, "
        "per_layer_injection=(0,))",
    ],
}
SCHEDULES = [
    "lazy",  # strict
    "lazy(every=16, slack=4)",
    "lazy(every=8, slack=12, max_drop=9, rule='paper')",
    "lazy(every=8, slack=12, max_drop=3, rule='final')",
]
BUDGETS = ["entries", "bytes", "percent"]


BESIDE = {
    text
    for name, texts in VARIANTS.items()
    for text in texts
    if name != "streaming_llm"  # whose default is in-cache, and tested elsewhere
}


def registered(kind: str) -> list[str]:
    """Every registered policy of a kind, with its variants, as recipe texts."""
    texts = []
    for name in registry.policies(kind):
        texts += INSTEAD.get(name, [name, *VARIANTS.get(name, [])])
    return texts


FACTORS = {
    "scorer": [NONE, *registered("scorer")],
    "format": registered("format"),
    "merger": [NONE, *registered("merger")],
    "allocator": [NONE, *registered("allocator")],
    "schedule": SCHEDULES,
}


parse = cache(Recipe.parse)  # the covering array asks the same some ten thousand times


def allowed(case: Case) -> bool:
    """Whether policies can stand in one recipe; judges partial cases, too."""
    scorer = case.get("scorer")
    if scorer == NONE:  # nothing is evicted, so there is nothing to merge, share or schedule
        defaults = {"merger": NONE, "allocator": NONE, "schedule": "lazy", "budget": "entries"}
        return all(case.get(name, value) == value for name, value in defaults.items())
    merger = case.get("merger", NONE)
    if scorer and in_cache(scorer):  # centroids keep original positions
        return merger == NONE
    if merger == NONE or not parse(f"h2o | {merger}").merger.reads_attention:
        return True
    return scorer is None or parse(scorer).scorer.scores_attention


def in_cache(scorer: str) -> bool:
    policy = parse(scorer).scorer
    return policy is not None and policy.in_cache


def text(case: Case) -> str:
    """The recipe of a case, in the canonical order."""
    names = ("scorer", "schedule", "allocator", "merger", "format")
    given = [case[name] for name in names if case.get(name, NONE) not in (NONE, "lazy")]
    return str(parse(" | ".join(given)))


def budget_for(model: Any, recipe: str, kind: str, rows: int, tokens: int) -> str | int | None:
    """A budget of that kind that holds about CAPACITY entries per head, of `tokens` tokens."""
    parsed = Recipe.parse(recipe)
    if not parsed.evicts or (parsed.scorer is not None and parsed.scorer.capacity is not None):
        return None
    if kind == "entries":
        return f"{CAPACITY}tok"
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = kinds.count("full_attention")
    plan = plan_for(config, parsed, Budget("bytes", 1 << 40), layers)
    row = layers * plan.ceiling(torch.full((1, plan.heads), CAPACITY))
    if kind == "bytes":
        return rows * (row + plan.other_nbytes)
    dense = layers * plan.heads * (plan.key_dim + plan.value_dim) * DENSE_BYTES * tokens
    return f"{min(100, 100 * row // dense)}%"


def short(text: str) -> str:
    """A test id without blanks: pytest numbers the ones that are too long."""
    return text.replace(" ", "")
