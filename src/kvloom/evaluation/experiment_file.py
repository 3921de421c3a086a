"""Experiments as TOML: grids of cells, what was claimed, what to draw; at three scales.

    title = "What int4 costs"
    [defaults]                        # of every grid
    model = "testbed"
    [quick]                           # replaces defaults with --quick: minutes
    tokens = 512
    [paper]                           # with --paper: the published models, texts and sizes
    model = "meta-llama/Llama-2-7b-hf"
    [[fallback]]                      # tried in turn when memory runs out
    prefill_chunk = 256
    [[grid]]
    name = "main"
    kind = "document"                 # perplexity, KL, bytes and time; or task, manifold, attention
    text = ["stdlib", "books.txt"]    # crossed with recipes and budgets
    recipes = ["int4", "strict: streaming_llm(sinks={4,16}, recent=60)"]  # a name, if one is wanted
    budgets = ["25%"]
    repeats = 3                       # other stretches of the text, other seeds
    quick = { repeats = 1 }           # replaces this grid's own; paper = { ... } likewise
    [[claim]]
    recipe = "int4"
    metric = "perplexity"
    value = 5.89
    where = "table 1, Llama-2-7B"
    [[figure]]
    kind = "table"
    grid = "main"
    columns = ["perplexity", "ratio"]

`{a,b}` within a recipe, a budget or a task stands for each of these; `{seed}` for the repeat's seed;
`${NAME}` and `${NAME:-default}` anywhere for a variable of the environment.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvloom.core.literals import hint
from kvloom.core.recipe import Recipe
from kvloom.evaluation import matching, tasks
from kvloom.evaluation.experiment import Claim, Experiment, Figure, Outcome, Spec
from kvloom.evaluation.metrics import METRICS
from kvloom.evaluation.settings import filled
from kvloom.evaluation.subjects import Cell, cells_of, parse

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OPTIONS: dict[str, dict[str, Any]] = {
    "document": {
        "tokens": 1024, "prefill": 512, "prefill_chunk": 0, "prefill_runs": 3, "needles": 0,
        "needle_tokens": 0, "equal_bytes": False,
    },
    "task": {"view": "blind", "prefill_chunk": 0, "filler": "stdlib", "equal_bytes": False},
    "manifold": {"layer": -1, "head": 0, "length": 1024, "chunk": 64, "topics": False, "passage": 128},
    "attention": {"layer": -1, "head": 0, "length": 1024, "chunk": 64},
}  # fmt: skip
SHARED: dict[str, Any] = {
    "model": "testbed", "dtype": "bfloat16", "device": "auto", "threads": 0, "seed": 0, "repeats": 1,
    "synthetic": False, "text": "stdlib", "task": "",
}  # fmt: skip
SCALES = ("testbed", "quick", "paper")
DTYPES = ("bfloat16", "float16", "float32")
_FALLBACK = {"model", "dtype", "device", "threads"}
_GRID = {"name", "kind", "phase", "recipes", "budgets", "quick", "paper"}
_TOP = {"title", "summary", "defaults", "quick", "paper", "fallback", "grid", "claim", "figure"}
_LISTS = ("model", "text", "task")  # crossed with recipes where they are lists
_NAMED = re.compile(r"([^'\"|(:]+):\s+(.+)")
_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")


def read(
    path: Path, scale: str = "testbed", model: str | None = None, phases: tuple[int, ...] = ()
) -> tuple[Experiment, list[dict[str, Any]]]:
    """The experiment of a file, nothing measured yet, and what to try when memory runs out.

    Args:
        scale: `"testbed"`, as it stands; `"quick"` or `"paper"`: with what these sections replace.
        model: instead of every model that the file names. phases: only grids of these; all if empty.

    Raises ValueError, naming the file and what is wrong, on anything that is not as above.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
        return _experiment(given, path, scale, model, phases)
    except OSError as error:
        raise ValueError(f"experiment {str(path)!r} cannot be read: {error}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"experiment {str(path)!r}: {error}") from None


def _experiment(
    given: dict[str, Any], path: Path, scale: str, model: str | None, phases: tuple[int, ...]
) -> tuple[Experiment, list[dict[str, Any]]]:
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r}: one of {', '.join(SCALES)}")
    known(given, _TOP, "the file")
    given = filled(_of(given, scale, phases))
    title = _text(given, "title")
    shared = given.get("defaults", {}) | given.get(scale, {})
    every = set(SHARED) | {name for own in OPTIONS.values() for name in own}
    known(shared, every, "defaults")
    specs: list[Spec] = []
    for grid in given.get("grid", []):
        specs += _specs(grid, shared | ({"model": model} if model else {}), model)
    if not specs:
        raise ValueError(f"no grid of phase {', '.join(map(str, phases))}" if phases else "no grid")
    fallbacks = given.get("fallback", [])
    for step in fallbacks:
        known(step, _FALLBACK | set(OPTIONS["document"]) | set(OPTIONS["task"]), "fallback")
        check_shared(step, "fallback", several=())
    if model:  # instead of every model that the file names
        fallbacks = [
            left for f in fallbacks if (left := {k: v for k, v in f.items() if k != "model"})
        ]
    experiment = Experiment(
        name=path.stem,
        title=title,
        summary=given.get("summary", ""),
        source=path.name,
        scale=scale,
        outcomes=[Outcome(spec) for spec in specs],
        claims=[_claim(c, {spec.name for spec in specs}) for c in given.get("claim", [])],
        figures=[_figure(f) for f in given.get("figure", [])],
    )
    return experiment, fallbacks


def _of(given: dict[str, Any], scale: str, phases: tuple[int, ...]) -> dict[str, Any]:
    """A file without what it says for other scales and phases: their variables may not be set."""
    others = {*SCALES} - {scale}

    def own(table: dict[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in table.items() if k not in others}
        return kept | kept.pop(scale, {})

    names = [grid.get("name") for grid in given.get("grid", [])]
    if len(set(names)) < len(names):
        raise ValueError(f"two grids of one name: {', '.join(map(str, names))}")
    made = {k: v for k, v in given.items() if k not in others}
    grids = [own(grid) for grid in given.get("grid", [])]
    made["grid"] = [g for g in grids if not phases or g.get("phase") in phases]
    made["claim"] = [own(claim) for claim in given.get("claim", [])]
    for part in ("claim", "figure"):
        for table in given.get(part, []):
            if table.get("grid") not in (None, *names):
                raise ValueError(f"{part} {table!r}: there is no grid {table['grid']!r}")
    return made


def _specs(grid: dict[str, Any], shared: dict[str, Any], model: str | None) -> Iterator[Spec]:
    """The cells of a grid, in the order of its lists, repeats innermost."""
    name, kind = _text(grid, "name"), grid.get("kind", "document")
    if kind in OPTIONS:
        known(grid, {*_GRID, *SHARED, *OPTIONS[kind]}, f"grid {name!r}")
    options = options_of(shared | grid, kind, f"grid {name!r}")
    made = SHARED | {k: v for k, v in (shared | grid).items() if k in SHARED}
    check_shared(made, f"grid {name!r}")
    if model:
        made["model"] = model
    unused = "text" if kind == "task" else "task"
    axes = [[""] if axis == unused else _expanded(made[axis]) for axis in _LISTS]
    if kind == "task":
        for task in axes[-1]:
            tasks.parse(task.replace("{seed}", "0"))
    for (m, text, task), repeat in itertools.product(itertools.product(*axes), range(made["repeats"])):  # fmt: skip
        seed = made["seed"] + repeat
        for cell, called in _cells(grid, seed, kind).items():
            if options.get("equal_bytes") and cell.budget is not None:
                matching.check(cell.budget)
            yield Spec(
                grid=name, phase=grid.get("phase"), kind=kind, recipe=str(cell.subject),
                budget=None if cell.budget is None else str(cell.budget), model=m,
                dtype=made["dtype"], device=made["device"], threads=made["threads"] or None,
                text=None if kind == "task" else text,
                task=task.replace("{seed}", str(seed)) if kind == "task" else None,
                seed=seed, repeat=repeat, synthetic=made["synthetic"], options=dict(options),
                name=called,
            )  # fmt: skip


def _cells(grid: dict[str, Any], seed: int, kind: str) -> dict[Cell, str]:
    """Cells with their names, the full cache first unless the kind needs none."""
    recipes, budgets = (_expanded(grid.get(k, [])) for k in ("recipes", "budgets"))
    found = {} if kind in ("manifold", "attention") else {Cell(Recipe()): ""}
    for text in recipes:
        called, recipe = _name(text.replace("{seed}", str(seed)))
        full, *cells = cells_of([recipe], budgets)
        found |= dict.fromkeys(cells or [full], called)
    return found


def _name(text: str) -> tuple[str, str]:
    """`"name: recipe"`, or a recipe alone."""
    found = _NAMED.fullmatch(text)
    return (found[1], found[2]) if found else ("", text)


def _expanded(given: str | list[str]) -> list[str]:
    """Each text of a list, or the one text, with every `{a,b}` replaced by each of its parts."""
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"{given!r}: a text, or a list of texts")
    return [one for text in texts for one in _braces(text)]


def _braces(text: str) -> Iterator[str]:
    found = _BRACES.search(text)
    if not found:
        yield text
        return
    for part in found[1].split(","):
        yield from _braces(text[: found.start()] + part.strip() + text[found.end() :])


def _claim(given: dict[str, Any], names: set[str]) -> Claim:
    """A claim; its recipe as cells spell it, unless it is one of their names."""
    claim = Claim(**given)
    if claim.metric not in METRICS:
        raise ValueError(f"claim: metric {claim.metric!r}: one of {', '.join(METRICS)}")
    recipe = claim.recipe if claim.recipe in names else _canonical(claim.recipe)
    return Claim(**(given | {"recipe": recipe, "value": float(claim.value)}))


def _canonical(recipe: str) -> str:
    """A recipe's own text; the name of a cell that this scale does not have, as it is."""
    try:
        return str(parse(recipe))
    except ValueError:
        return recipe


def _figure(given: dict[str, Any]) -> Figure:
    own = dict(given)
    kind, title, grid = own.pop("kind", ""), own.pop("title", ""), own.pop("grid", None)
    if not kind:
        raise ValueError(f"figure {given!r}: it needs a kind")
    return Figure(kind=kind, title=title, grid=grid, options=own)


def _text(given: dict[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name!r} must be a text, not {value!r}")
    return value


def check_shared(given: dict[str, Any], where: str, several: tuple[str, ...] = _LISTS) -> None:
    """Raise ValueError if a value of `SHARED` is of another type than its default; `several`: which of
    them may be lists.
    """
    for name, value in given.items():
        if name not in SHARED or (name in several and isinstance(value, list)):
            continue
        wanted = type(SHARED[name])
        if type(value) is not wanted:
            raise ValueError(f"{where}: {name} is {value!r}, not of type {wanted.__name__}")
    if given.get("dtype", "float32") not in DTYPES:
        raise ValueError(f"{where}: dtype {given['dtype']!r}: one of {', '.join(DTYPES)}")
    if given.get("repeats", 1) < 1:
        raise ValueError(f"{where}: repeats {given['repeats']!r}: at least 1")


def options_of(given: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    """The options of a kind of cell, those given and defaults. Raises ValueError on an unknown kind or a
    value of another type.
    """
    if kind not in OPTIONS:
        raise ValueError(f"{where}: kind {kind!r}: one of {', '.join(OPTIONS)}")
    options = OPTIONS[kind] | {k: v for k, v in given.items() if k in OPTIONS[kind]}
    for name, value in options.items():
        wanted = type(OPTIONS[kind][name])
        if type(value) is not wanted:
            raise ValueError(f"{where}: {name} is {value!r}, not of type {wanted.__name__}")
    return options


def known(given: dict[str, Any], names: set[str], where: str) -> None:
    """Raise ValueError if a table has a name that is not one of these."""
    for name in given:
        if name not in names:
            likely = hint(name, names) or f": {', '.join(sorted(names))}"
            raise ValueError(f"{where} has no {name!r}{likely}")
