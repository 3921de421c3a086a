"""An experiment with its record and rows, made up so that every kind of figure has something to show."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

from kvloom.core.recipe import Recipe
from kvloom.evaluation.experiment import Claim, Experiment, Figure, Outcome, Spec
from kvloom.evaluation.ledger import Ledger
from kvloom.evaluation.metrics import AnyRow
from kvloom.evaluation.results import Counts, Subject
from kvloom.evaluation.task_results import Answer, Held, TaskFacts, TaskRow
from tests.evaluation.conftest import ROW, changed

DENSE = 1_000_000.0
SHARES = {"50%": 0.5, "25%": 0.25, "12.5%": 0.125}
HARM = {"none": 0.0, "streaming_llm": 0.3, "snapkv": 0.1, "snapkv | int4": 0.06}
_NUMBER = itertools.count()


def subject(recipe: str, budget: str | None) -> Subject:
    return Subject(recipe, recipe, budget, recipe.startswith("recompute"), recipe != "none")


def spec(recipe: str, budget: str | None = None, **more: Any) -> Spec:
    base = Spec("main", None, "document", recipe, budget, "testbed", "float32", "cpu", 1, "stdlib")
    return dataclasses.replace(base, **more)


def document(
    recipe: str, budget: str | None = None, harm: float = 0.0, share: float = 1.0, **parts: Any
) -> Outcome:
    """A cell that read a document; `parts`: of the row, or of the spec where they are named `spec`."""
    mean = DENSE * share
    given = {
        "key": f"{next(_NUMBER):04x}" * 16,
        "subject": subject(recipe, budget),
        "bytes": {
            "mean": mean, "peak": int(mean * 1.1), "dense_mean": DENSE,
            "allowed": mean if budget else None,
        },
        "quality": {"decode_perplexity": 10 * (1 + harm), "kl": harm, "needles": 0},
        "timing": {"tpot": 0.002 * (0.6 + 0.4 * share), "tpot_ratio": 0.6 + 0.4 * share},
        "counts": Counts(1, 2 if budget else 0),
    }  # fmt: skip
    own = parts.pop("spec", {})
    for name, value in parts.items():
        given[name] = {**given[name], **value} if isinstance(given.get(name), dict) else value  # type: ignore[dict-item]
    row = changed(ROW, **given)
    return Outcome(spec(recipe, budget, **own), row.key, row=row)


def task(
    recipe: str, budget: str | None, length: int, scores: dict[float, list[float]], share: float,
    grid: str = "needles", **own: Any,
) -> Outcome:  # fmt: skip
    """A cell that answered; `scores` by depth."""
    name = f"needle(length={length})"
    answers = [
        Answer(s, "blue <b>" if s else "red & green", ["blue"], length, depth)
        for depth, some in scores.items()
        for s in some
    ]
    facts = TaskFacts(name, "needle", "exact", f"sha-{length}", len(answers), length, "kvloom", "blind", 0)  # fmt: skip
    mean = DENSE * share
    held = Held(mean, 0.0, DENSE, mean if budget else None, 10, int(mean))
    row = TaskRow(
        f"{next(_NUMBER):04x}" * 16, ROW.measured_at, 1.0, ROW.model, subject(recipe, budget), facts,
        ROW.environment, held, Counts(1, 2 if budget else 0), answers,
    )  # fmt: skip
    at = spec(recipe, budget, grid=grid, kind="task", text=None, task=name, **own)
    return Outcome(at, row.key, row=row)


def main_grid() -> list[Outcome]:
    """Recipes at budgets, three repeats on stretches of a text, one cell failed, one fell back."""
    found = []
    for repeat in range(3):
        wobble = 1 + 0.04 * repeat
        text = {"text": {"sha256": f"t{repeat}"}, "spec": {"repeat": repeat, "seed": repeat}}
        found.append(document("none", **text))
        for recipe, budget in itertools.product(list(HARM)[1:], SHARES):
            harm = HARM[recipe] * wobble / SHARES[budget] / 4
            found.append(document(recipe, budget, harm, SHARES[budget], **text))
    found[-1] = dataclasses.replace(found[-1], row=None, key=None, failed="out of memory")
    found[-2].fallback = {"prefill_chunk": 256}
    return found


def needle_grid() -> list[Outcome]:
    found = []
    for recipe, length in itertools.product(("none", "snapkv", "streaming_llm"), (512, 1024, 2048)):
        budget, share = (None, 1.0) if recipe == "none" else ("25%", 0.25)
        late = {"none": 0.0, "snapkv": 0.4, "streaming_llm": 0.9}[recipe]
        scores = {d: [float(d >= late), 1.0 if recipe == "none" else 0.0] for d in (0.0, 0.25, 0.5, 0.75, 1.0)}  # fmt: skip
        found.append(task(recipe, budget, length, scores, share))
    return found


def sweep_grid() -> list[Outcome]:
    """`every` in a schedule, beside the full cache that every grid has."""
    found = [document("none", spec={"grid": "sweep"})]
    for every, slack in itertools.product((1, 16, 32, 64), (0, 16)):
        recipe = str(Recipe.parse(f"streaming_llm(recent=60) | lazy(every={every}, slack={slack})"))
        harm = 0.02 + 0.0005 * every - 0.0002 * slack
        name = f"R={every}, slack {slack}"
        found.append(
            document(
                recipe, None, harm, 0.2, spec={"grid": "sweep", "name": name},
                timing={"tpot": 0.002 + 0.001 / every},
            )
        )  # fmt: skip
    return found


def knorm_grid() -> list[Outcome]:
    found = []
    for text in ("wikitext", "pg19"):
        own = {"grid": "knorm", "text": text}
        found.append(document("none", spec=own, text={"name": text, "sha256": text}))
        for keep in (0.9, 0.8, 0.7):
            recipe = (
                f"knorm(mode='recurrent', keep_ratio={keep}, prune_after=512, skip_layers=(0,))"
            )
            parts = {"text": {"name": text, "sha256": text}, "timing": {"ttft": 0.101}}
            harm = 2 * math.exp(-2 * keep)
            found.append(document(recipe, None, harm, keep / 3, spec=own, **parts))
    return found


CLAIMS = [
    Claim("snapkv", "change", 0.01, "a paper, table 2, another model", "main", "25%"),
    Claim("snapkv", "speedup", 3.6, "a paper, its text", "main"),
    Claim("h2o", "ratio", 29.0, "a paper, against offloading"),
]
FIGURES = [
    Figure("table", "Main table", "main", {"columns": ["change", "kl", "retained"]}),
    Figure("pareto", "Quality against bytes", "main"),
    Figure("retention", "Falling quality", "main", {"y": ["kl", "decode_perplexity"]}),
    Figure("needles", "Needles", "needles"),
    Figure("ablation", "What it is worth", "main", {"reference": "streaming_llm", "metric": ["kl", "change"]}),
    Figure("sweep", "How often", "sweep", {"parameter": "every", "metrics": ["change", "tpot"]}),
    Figure("heat", "How often and how slack", "sweep", {"x": "every", "y": "slack", "metric": "change"}),
    Figure("efficiency", "Times", "main"),
    Figure("steps", "Over the document", "main"),
    Figure("knorm", "KnormPress", "knorm"),
    Figure("energy", "Attention energy"),
]  # fmt: skip


def experiment(outcomes: list[Outcome] | None = None, **parts: Any) -> Experiment:
    """All grids with their figures, or other outcomes."""
    if outcomes is None:
        outcomes = [*main_grid(), *needle_grid(), *sweep_grid(), *knorm_grid()]
    base = Experiment(
        "made", "A made <experiment>", "What it is for.", "made.toml", "testbed", outcomes,
        list(CLAIMS), list(FIGURES),
    )  # fmt: skip
    return dataclasses.replace(base, **parts)


def write(made: Experiment, folder: Path) -> Path:
    """Record and rows, as a runner leaves them."""
    ledger = Ledger(folder)
    for outcome in made.outcomes:
        if outcome.row is not None:
            ledger.append(outcome.row)
    made.save(folder)
    return folder


def rows_of(outcomes: list[Outcome]) -> list[AnyRow]:
    return [o.row for o in outcomes if o.row is not None]
