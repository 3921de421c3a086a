"""Recipes: policies chained with `|`, as objects and as text, both ways.

Text is a chain of calls with literal keyword arguments, `"h2o(recent=0.5) | lazy(every=64) | int4"`;
it is parsed with `ast`, never evaluated. `"none"` is the empty chain: a full cache.
"""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from kvloom.core import registry
from kvloom.core.format import PageFormat
from kvloom.core.literals import arguments, hint
from kvloom.core.merge import Merger
from kvloom.core.policy import Allocator, Policy, Scorer
from kvloom.core.schedule import Lazy

NONE = "none"


@dataclass(frozen=True)
class Recipe:
    """What a cache does: at most one policy of each kind.

    Attributes:
        scorer: who goes (None: nobody). allocator: how a budget is split (None: uniformly).
        merger: what happens to losers (None: dropped); one that brings a scorer along may stand
            alone. format: how survivors are stored (None:
            dense, in the model's dtype). schedule: when to compress (strictly every token).
    """

    scorer: Scorer | None = None
    allocator: Allocator | None = None
    merger: Merger | None = None
    format: PageFormat | None = None
    schedule: Lazy = field(default_factory=Lazy)

    def __post_init__(self) -> None:
        if self.scorer is None and self._own_scorer is not None:
            object.__setattr__(self, "scorer", self._own_scorer)
        if self.scorer is not None:
            return
        for name in ("allocator", "merger"):
            policy = getattr(self, name)
            if policy is not None:
                raise ValueError(
                    f"recipe '{self}': {policy.name} ({name}) acts on evicted entries, but nothing "
                    "in the recipe evicts; put a scorer before it"
                )
        if self.schedule != Lazy():
            raise ValueError(
                f"recipe '{self}': {self.schedule} schedules eviction without a scorer"
            )

    @cached_property
    def _own_scorer(self) -> Scorer | None:
        text = None if self.merger is None else self.merger.own_scorer
        return None if text is None else Recipe.parse(text).scorer

    @classmethod
    def of(cls, *policies: Policy) -> Recipe:
        """Build a recipe from policies in any order. Raises ValueError on two of one kind."""
        slots: dict[str, Policy] = {}
        for policy in policies:
            if not isinstance(policy, Policy):
                raise TypeError(f"{policy!r} is not a policy; chain policies with '|'")
            if policy.kind in slots:
                raise ValueError(
                    f"a recipe has one {policy.kind}, but this one has "
                    f"'{slots[policy.kind]}' and '{policy}'"
                )
            slots[policy.kind] = policy
        return cls(**slots)  # type: ignore[arg-type]

    @classmethod
    def parse(cls, recipe: str | Policy | Recipe) -> Recipe:
        """A recipe from text, a policy or a recipe; a preset's name may stand in a chain.

        Raises ValueError that restates the text and names the rule it breaks.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Policy):
            return cls.of(recipe)
        if not isinstance(recipe, str):
            raise TypeError(f"recipe {recipe!r}: give text, a policy or a Recipe")
        text = registry.presets().get(recipe.strip(), recipe)
        if text.strip() == NONE:
            return cls()
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except SyntaxError as error:
            raise ValueError(f"recipe {text!r} is not a chain of policies: {error.msg}") from None
        try:
            return cls.of(*(p for node in _chain(tree.body) for p in _policies(node, text)))
        except ValueError as error:
            if repr(text) in str(error):
                raise
            raise ValueError(f"recipe {text!r}: {error}") from None

    @property
    def policies(self) -> list[Policy]:
        """The policies that were asked for, in canonical order."""
        scorer = None if self.scorer == self._own_scorer else self.scorer
        chain = [scorer, self.schedule, self.allocator, self.merger, self.format]
        return [p for p in chain if p is not None and p != Lazy()]

    @property
    def needs(self) -> frozenset[str]:
        """Everything that must be observed for this recipe."""
        policies = [*self.policies, *([] if self.scorer is None else [self.scorer])]
        return frozenset().union(*(p.needs for p in policies))

    @property
    def evicts(self) -> bool:
        """Whether entries can ever leave the cache."""
        return self.scorer is not None and self.schedule.every > 0

    @property
    def takes_budget(self) -> bool:
        """Whether a budget says how many entries stay: something evicts and states no size itself."""
        scorer = self.scorer
        sized = scorer is None or scorer.capacity is not None or scorer.sets_target
        return self.evicts and not sized

    def __or__(self, other: Policy | Recipe) -> Recipe:
        more = other.policies if isinstance(other, Recipe) else [other]
        return Recipe.of(*self.policies, *more)

    def __str__(self) -> str:
        return " | ".join(str(p) for p in self.policies) or NONE


def _chain(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return [*_chain(node.left), *_chain(node.right)]
    return [node]


def _policies(node: ast.expr, text: str) -> list[Policy]:
    """One link of a chain: a policy, or all those of a preset."""
    if isinstance(node, ast.Name) and node.id in registry.presets():
        return Recipe.parse(node.id).policies
    return [_policy(node, text)]


def _policy(node: ast.expr, text: str) -> Policy:
    if isinstance(node, ast.Name):
        return _build(node.id, {}, text)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name = node.func.id
        rule = f"write {name}'s parameters as name=value"
        given = arguments(node, f"recipe {text!r}", rule, f" of {name}")
        return _build(name, given, text)
    raise ValueError(f"recipe {text!r}: {ast.unparse(node)!r} is not a policy")


def _build(name: str, given: dict[str, Any], text: str) -> Policy:
    known = registry.policies()
    if name not in known:
        names = [*known, *registry.presets()]
        raise ValueError(f"recipe {text!r}: unknown method {name!r}{hint(name, names)}")
    cls = known[name]
    parameters = [f.name for f in dataclasses.fields(cls)]
    for parameter in given:
        if parameter not in parameters:
            listed = ", ".join(parameters) or "no parameters"
            raise ValueError(
                f"recipe {text!r}: {name} has no parameter {parameter!r}"
                f"{hint(parameter, parameters)} (it has: {listed})"
            )
    try:
        return cls(**given)
    except TypeError as error:  # a parameter of the wrong type, met before its check
        written = ", ".join(f"{k}={v!r}" for k, v in given.items())
        raise ValueError(f"recipe {text!r}: {name}({written}): {error}") from None
