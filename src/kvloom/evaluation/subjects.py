"""What is compared: recipes, the baseline without a cache, and both at budgets; all of it as text."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvloom.core.budget import Budget
from kvloom.core.policy import Policy
from kvloom.core.recipe import Recipe
from kvloom.evaluation import identity, results
from kvloom.evaluation.recompute import Recompute

Subject = Recipe | Recompute


def parse(text: str) -> Subject:
    """A recipe, or the baseline's `recompute(window=..., positions=...)`. Raises ValueError."""
    if not text.strip().startswith("recompute"):
        return Recipe.parse(text)
    try:
        return Recompute(**_literal_arguments(text))
    except (SyntaxError, TypeError):
        raise ValueError(
            f"recipe {text!r}: write recompute(window=1020) or recompute(window=1020, positions=500)"
        ) from None


def _literal_arguments(text: str) -> dict[str, Any]:
    """The keywords of a call of `recompute`. Raises SyntaxError or TypeError if it is none."""
    call = ast.parse(text.strip(), mode="eval").body
    if not isinstance(call, ast.Call) or call.args or ast.unparse(call.func) != "recompute":
        raise TypeError
    if not all(isinstance(k.value, ast.Constant) for k in call.keywords):
        raise TypeError
    return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}


@dataclass(frozen=True)
class Cell:
    """One thing to measure: a recipe, or the baseline, at a budget.

    Attributes:
        equal_bytes: what the cache holds is matched to what the budget says (`matching`); without a budget
            there is nothing to match.
    """

    subject: Subject
    budget: Budget | None = None
    equal_bytes: bool = False

    @property
    def facts(self) -> results.Subject:
        """As it stands in a row."""
        return results.Subject(
            recipe=str(self.subject),
            full=spell_out(self.subject),
            budget=None if self.budget is None else str(self.budget),
            baseline=isinstance(self.subject, Recompute),
            evicts=not isinstance(self.subject, Recompute) and self.subject.evicts,
        )

    def parts(self, env: results.Environment) -> dict[str, Any]:
        """The parts of a cell's key that are the same whatever it is measured on (`identity.cell_key`)."""
        policies = [] if isinstance(self.subject, Recompute) else self.subject.policies
        matched = self.equal_bytes and self.budget is not None
        return {
            **({"equal_bytes": True} if matched else {}),
            "recipe": self.facts.full,
            "budget": self.facts.budget,
            "sources": [env.source_sha256, identity.foreign_sha256(policies)],
            "versions": [env.python, env.torch, env.transformers],
            "machine": [
                env.platform, env.cpu, env.capability, env.cores, env.threads, env.device, env.backend,
            ],
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{self.subject}" + (f" @ {self.budget}" if self.budget else "")


def spell_out(subject: Subject) -> str:
    """The text with every parameter, defaults and the default schedule included, and the sha256 of
    files in place of their paths.
    """
    if isinstance(subject, Recompute):
        return str(subject)
    chain = [*subject.policies]
    if subject.evicts and subject.schedule not in chain:
        chain.append(subject.schedule)
    return " | ".join(_spell_policy(p) for p in chain) or "none"


def _spell_policy(policy: Policy) -> str:
    given = [f"{f.name}={_spell_value(policy, f)!r}" for f in dataclasses.fields(policy)]
    return policy.name + (f"({', '.join(given)})" if given else "")


def _spell_value(policy: Policy, f: dataclasses.Field[Any]) -> Any:
    """A parameter; a file by what is in it, wherever it lies."""
    value = getattr(policy, f.name)
    return file_sha256(value) if value and f.metadata.get("file") else value


def files(recipe: Recipe) -> list[str]:
    """The files that a recipe names, as given: parameters with `metadata={"file": True}`."""
    named = (
        getattr(p, f.name)
        for p in recipe.policies
        for f in dataclasses.fields(p)
        if f.metadata.get("file")
    )
    return [path for path in named if path]


def file_sha256(path: str) -> str:
    """`"sha256:..."` of a file's bytes. Raises ValueError if it cannot be read."""
    try:
        return f"sha256:{hashlib.sha256(Path(path).read_bytes()).hexdigest()}"
    except OSError as error:
        raise ValueError(f"file {path!r} cannot be read: {error}") from None


def cells_of(recipes: Sequence[str], budgets: Sequence[str] = ()) -> list[Cell]:
    """The cells of a comparison, the full cache first, none twice.

    `"recipe @ budget"` stands for itself; a recipe that evicts and does not state its own size is
    crossed with `budgets`. Raises ValueError on an unknown method or parameter, or a bad budget.
    """
    found = [Cell(Recipe())]
    general = [Budget.parse(b) for b in budgets]
    for text in recipes:
        recipe, at, own = text.rpartition("@") if "@" in text else (text, "", "")
        subject = parse(recipe.strip())
        if at:
            found.append(Cell(subject, Budget.parse(own.strip())))
        elif general and takes_budget(subject):
            found += [Cell(subject, budget) for budget in general]
        else:
            found.append(Cell(subject))
    return list(dict.fromkeys(found))


def takes_budget(subject: Subject) -> bool:
    """Whether a subject evicts and leaves its size to a budget."""
    return not isinstance(subject, Recompute) and subject.takes_budget
