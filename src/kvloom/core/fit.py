"""Whether a recipe and a budget fit each other; everything that can be said before the first token."""

from __future__ import annotations

from kvloom.core.plan import LayerPlan
from kvloom.core.policy import Scorer
from kvloom.core.schedule import Lazy


def check(plan: LayerPlan) -> None:
    """Raise ValueError if recipe, budget and the model's layers do not fit each other."""
    plan.format.fit(plan.place)
    recipe, budget = plan.recipe, plan.budget
    scorer = recipe.scorer
    if scorer is None or not recipe.evicts:
        if budget is not None:
            raise ValueError(
                f"budget {str(budget)!r} with recipe '{recipe}': nothing in the recipe evicts, so "
                "its bytes follow from its format; add a scorer or drop the budget"
            )
        return
    if recipe.merger is not None:
        recipe.merger.fit(plan)
    if plan.fullest.centroids and scorer.in_cache:
        raise ValueError(
            f"recipe '{recipe}': a centroid keeps its members' original positions, which in-cache "
            "positions leave behind; say positions='original'"
        )
    _check_own_rules(plan, scorer)
    if budget is None:
        if recipe.takes_budget:
            raise ValueError(
                f"recipe '{recipe}': {scorer.name} evicts down to a budget and none was given; say "
                "budget='1024tok', '25%' or '512MiB'"
            )
        return
    if scorer.capacity is not None:
        raise ValueError(
            f"budget {str(budget)!r} with recipe '{recipe}': {scorer} states its own size "
            f"({scorer.capacity} entries); leave one of the two out"
        )
    if not recipe.schedule.bounded:
        raise ValueError(
            f"budget {str(budget)!r} with recipe '{recipe}': this schedule has no bound"
        )
    _check_floor(plan.fullest)


def _check_own_rules(plan: LayerPlan, scorer: Scorer) -> None:
    """What goes together with a scorer that sets its target or exempts layers."""
    recipe, budget = plan.recipe, plan.budget
    given = [str(p) for p in (recipe.allocator, recipe.schedule) if p and p != Lazy()]
    given += [] if budget is None else [f"budget {str(budget)!r}"]
    if scorer.sets_target and given:
        raise ValueError(
            f"recipe '{recipe}': {scorer} says itself when to evict and how many entries stay; "
            f"leave out {', '.join(given)}"
        )
    beyond = [i for i in scorer.exempt_layers if i >= plan.layers]
    if beyond:
        raise ValueError(
            f"recipe '{recipe}': {scorer} exempts layers {beyond}, but {plan.layers} are "
            "compressed, counted from 0"
        )
    if scorer.exempt_layers and budget is not None and not plan.counts_entries:
        raise ValueError(
            f"budget {str(budget)!r} with recipe '{recipe}': exempt layers grow with the text, so "
            "no number of bytes holds; say '512tok', for the other layers"
        )


def _check_floor(plan: LayerPlan) -> None:
    budget = plan.budget
    assert budget is not None
    if budget.kind == "bytes" and budget.amount < plan.floor():
        raise ValueError(
            f"budget {str(budget)!r} is below the floor of recipe '{plan.recipe}' for this model: "
            f"{plan.floor()} bytes per row"
        )
    if budget.kind == "tokens" and budget.amount < plan.sinks + plan.centroids + 1:
        centroids = f", {plan.centroids} centroids" if plan.centroids else ""
        raise ValueError(
            f"budget {str(budget)!r} is below the floor of recipe '{plan.recipe}': {plan.sinks} "
            f"sinks{centroids} and 1 entry"
        )


def check_rows(plan: LayerPlan, rows: int) -> None:
    """Raise ValueError if a budget in bytes is below the floor of this many rows."""
    budget = plan.budget
    if budget is None or budget.kind != "bytes" or not plan.evicts:
        return
    if budget.amount < rows * plan.floor():
        raise ValueError(
            f"budget {str(budget)!r} is below the floor of recipe '{plan.recipe}' for this model: "
            f"{plan.floor()} bytes per row, and the batch has {rows}"
        )
