"""`kvloom`: what there is, what it does and what it costs. A longer command has its own module."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvloom.cli import analyze
from kvloom.cli._console import console, one_line_errors
from kvloom.core import registry
from kvloom.core.literals import hint
from kvloom.evaluation import settings
from kvloom.evaluation.recompute import Recompute
from kvloom.evaluation.results import Protocol

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Every way of shrinking an LLM's KV cache, in one cache.",
)
app.add_typer(analyze.app, name="analyze")
KINDS = ("scorer", "schedule", "allocator", "merger", "format")


BASELINES: dict[str, type[Any]] = {"recompute": Recompute}
_TESTBED = Protocol(tokens=1024, prefill=512, needles=6)

Recipes = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe",
        help="A recipe, or 'recipe @ budget'; repeatable. 'recompute(window=1020)' is the baseline "
        "without a cache. The full cache always comes first. Without any, those of the demo, at its "
        "budgets unless others are given.",
    ),
]
Model = Annotated[str, typer.Option(help="A folder, a hub name, or 'testbed', the bundled model.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps; auto: an accelerator if there is one.")]


@app.command()
def compare(
    model: Model = "testbed",
    text: Annotated[
        str,
        typer.Option(
            help="'stdlib' (bundled), a file, folder or .jsonl(.xz), or a hub dataset "
            "'owner/name[:config[:split]]'."
        ),
    ] = "stdlib",
    recipe: Recipes = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="'25%', '1024tok' or '512MiB'; repeatable, crossed with every recipe that evicts "
            "and names no budget of its own."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=3, help="Length of the text.")] = _TESTBED.tokens,
    prefill: Annotated[
        int, typer.Option(min=1, help="Tokens of it that go in at once; the others one by one.")
    ] = _TESTBED.prefill,
    prefill_chunk: Annotated[
        int, typer.Option(min=0, help="Tokens per forward of the prefill; 0: one forward.")
    ] = 0,
    needles: Annotated[
        int, typer.Option(min=0, help="Retrieval tasks per recipe; 0: none.")
    ] = _TESTBED.needles,
    needle_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of a retrieval task; default: --tokens.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for rows and figures; finished rows are used again.")
    ] = Path("results/compare"),
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the retrieval tasks.")] = 0,
    again: Annotated[bool, typer.Option(help="Measure even what was measured before.")] = False,
) -> None:
    """Compare recipes: quality, bytes and time, measured through the cache; tables and figures."""
    with one_line_errors():
        from kvloom.cli import compare as command  # here: transformers takes seconds to import

        recipes, budgets = recipe or [], budget or []
        if not recipes:
            recipes, budgets = command.demo_recipes(), budgets or list(command.DEMO_BUDGETS)
        length = (needle_tokens or tokens) if needles else 0
        protocol = Protocol(
            tokens, prefill, prefill_chunk, needles=needles, needle_tokens=length, seed=seed
        )
        command.run(
            command.Options(
                model, text, recipes, budgets, protocol, out, dtype, device, threads, again
            )
        )


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Option(help="The text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Or a file that holds it.")] = None,
    model: Model = "testbed",
    recipe: Annotated[str, typer.Option(help="A recipe, e.g. 'h2o | int4'.")] = "none",
    budget: Annotated[
        str | None, typer.Option(help="Its budget: '25%', '1024tok' or '512MiB'.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
) -> None:
    """Continue a prompt with a compressed cache, and show what the cache held."""
    with one_line_errors():
        from kvloom.cli import generate as command

        options = command.Options(
            model, prompt, prompt_file, recipe, budget, max_new_tokens, temperature, seed, dtype,
            device,
        )  # fmt: skip
        command.run(options, console())


@app.command()
def calibrate(
    model: Annotated[
        str, typer.Argument(help="A folder, a hub name, or 'testbed', the bundled model.")
    ],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    text: Annotated[
        str,
        typer.Option(
            help="As for compare; it cannot be compared on afterwards. 'stdlib_train': the modules "
            "that 'stdlib' leaves out."
        ),
    ] = "stdlib_train",
    bits: Annotated[int, typer.Option(help="4, 3 or 2, as the recipe will have them.")] = 4,
    outliers: Annotated[
        float, typer.Option(help="Share stored exactly, as the recipe will have it; 0: none.")
    ] = 0.01,
    samples: Annotated[int, typer.Option(min=1, help="Pieces of the text.")] = 16,
    length: Annotated[int, typer.Option(min=3, help="Tokens of each.")] = 2048,
    dtype: Dtype = "float32",
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Find kvquant's ranges and levels for a model: two passes over a text, one with gradients."""
    with one_line_errors():
        from kvloom.cli import calibrate as command

        options = command.Options(
            model, text, out, bits, outliers, samples, length, dtype, device, force
        )
        command.run(options, console())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for rows and figures.")] = Path("results/demo"),
    again: Annotated[bool, typer.Option(help="Measure even what was measured before.")] = False,
) -> None:
    """A small comparison on the bundled model: one to three minutes, offline, ends with a figure."""
    with one_line_errors():
        from kvloom.cli import compare as command

        options = command.demo_options(out)
        options.again = again
        command.run(options)


@app.command()
def run(
    experiment: Annotated[Path, typer.Argument(help="A file like those in experiments/.")],
    quick: Annotated[bool, typer.Option("--quick", help="Its quick version: minutes.")] = False,
    paper: Annotated[
        bool, typer.Option("--paper", help="The published models, texts and sizes.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Instead of every model that the file names.")
    ] = None,
    phase: Annotated[
        list[int] | None, typer.Option(help="Only grids of this phase; repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for rows and record; default: results/NAME.")
    ] = None,
    executor: Annotated[
        str, typer.Option(help="inline; process: in others on this machine; ray: on a cluster.")
    ] = "inline",
    workers: Annotated[
        int | None, typer.Option(min=1, help="At most so many cells at once.")
    ] = None,
    again: Annotated[bool, typer.Option(help="Measure even what was measured before.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only say which cells there are.")] = False,
) -> None:
    """Run an experiment: every cell that has no row yet; an interrupted one goes on."""
    with one_line_errors():
        settings.load_dotenv(Path.cwd())  # before transformers reads the environment
        from kvloom.cli import run as command

        if quick and paper:
            raise ValueError("--quick and --paper: choose one of them")
        scale = "quick" if quick else "paper" if paper else "testbed"
        command.run(
            command.Options(
                experiment, out, scale, model, tuple(phase or ()), executor, workers, again, dry_run
            )
        )


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders with experiment.json, or with rows alone.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where to; default: 'report' in the only folder.")
    ] = None,
    latex: Annotated[
        bool,
        typer.Option("--latex", help="Write a LaTeX report besides, and build it if TeX is here."),
    ] = False,
) -> None:
    """Figures, tables and one HTML page from the rows of experiments; nothing is measured."""
    with one_line_errors():
        from kvloom.cli import report as command

        command.run(folders, out, latex, console())


@app.command()
def tune(
    search: Annotated[Path, typer.Argument(help="A file like those in experiments/tune/.")],
    trials: Annotated[
        int, typer.Option(min=1, help="Candidates in all, those of earlier runs included.")
    ] = 40,
    quick: Annotated[bool, typer.Option("--quick", help="Its quick version.")] = False,
    model: Annotated[str | None, typer.Option(help="Instead of the file's.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for study, rows and table; default: results/tune-NAME."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the search.")] = 0,
) -> None:
    """Search recipes: the smallest cache within a quality limit, or the best one within so many bytes."""
    with one_line_errors():
        settings.load_dotenv(Path.cwd())
        from kvloom.cli import tune as command

        command.run(search, trials, quick, model, out, seed, console())


@app.command("list")
def list_policies() -> None:
    """Everything that can stand in a recipe, by kind, and the presets."""
    with one_line_errors():
        out = console()
        for kind in KINDS:
            found = registry.policies(kind)
            if found:
                out.print(_table(kind, {n: _summary(c) for n, c in found.items()}))
        if registry.presets():
            out.print(_table("preset", registry.presets()))
        summaries = {n: _summary(c) for n, c in BASELINES.items()}
        out.print(_table("baseline, for `kvloom compare` only", summaries))


@app.command()
def show(method: Annotated[str, typer.Argument(help="A method or a preset.")]) -> None:
    """A method's paper, equation, parameters and defaults."""
    with one_line_errors():
        out, known, presets = console(), registry.policies(), registry.presets()
        if method in presets:
            out.print(f"{method} = {presets[method]}", markup=False)
            return
        if method in BASELINES:
            _show(out, BASELINES[method], f"{method}  (baseline, for `kvloom compare` only)")
            return
        if method not in known:
            names = [*known, *presets, *BASELINES]
            likely = hint(method, names) or "; see `kvloom list`"
            raise ValueError(f"unknown method {method!r}{likely}")
        cls = known[method]
        needed = (
            cls.needs if isinstance(cls.needs, frozenset) else cls().needs
        )  # of its default base
        needs = f", needs {', '.join(sorted(needed))}" if needed else ""
        _show(out, cls, f"{cls.name}  ({cls.kind}{needs})")


def _show(out: Console, cls: type[Any], title: str) -> None:
    out.print(f"{title}\n", markup=False)
    module = inspect.getdoc(sys.modules[cls.__module__])
    for text in (module, inspect.getdoc(cls)):
        if text:
            out.print(text + "\n", markup=False)
    fields = dataclasses.fields(cls)
    if not fields:
        out.print("no parameters")
        return
    table = Table("parameter", "type", "default", box=None, padding=(0, 2, 0, 0))
    for f in fields:
        table.add_row(f.name, str(f.type), _default(f))
    out.print(table)


def _default(f: dataclasses.Field[Any]) -> str:
    return "required" if f.default is dataclasses.MISSING else repr(f.default)


def _summary(cls: type[Any]) -> str:
    lines = (inspect.getdoc(cls) or "").splitlines()
    return lines[0] if lines else ""


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True, min_width=18)
    table.add_column()
    table.add_row(f"[bold]{title}[/bold]", "")
    for name, text in rows.items():
        table.add_row(f"  {name}", text.replace("[", r"\["))
    return table


if __name__ == "__main__":
    app()
