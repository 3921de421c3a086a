"""`kvloom`: what there is, what it does and what it costs. A longer command has its own module."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvloom.core import registry
from kvloom.core.policy import Policy

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Every way of shrinking an LLM's KV cache, in one cache.",
)
KINDS = ("scorer", "schedule", "allocator", "merger", "format")


def console() -> Console:
    """Standard output; wide enough for the tables when it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Wrong input ends the program with its message and status 2, without a traceback."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


@app.command()
def demo(
    recipe: Annotated[
        str | None, typer.Option(help="A recipe to add to the table, e.g. 'h2o | int4'.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Its budget: '25%', '1024tok' or '512MiB'.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=64, max=16384, help="Prompt length.")] = 2000,
    new_tokens: Annotated[int, typer.Option(min=2, max=1024, help="Tokens to generate.")] = 32,
) -> None:
    """Generate with a few compressed caches and show what each holds, in bytes. Runs offline."""
    with one_line_errors():
        if budget is not None and recipe is None:
            raise ValueError(f"--budget {budget!r} belongs to a --recipe, and none was given")
        from kvloom.cli.demo import run  # here: transformers takes seconds to import

        run(console(), prompt_tokens, new_tokens, [] if recipe is None else [(recipe, budget)])


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


@app.command()
def show(method: Annotated[str, typer.Argument(help="A method or a preset.")]) -> None:
    """A method's paper, equation, parameters and defaults."""
    with one_line_errors():
        out, known, presets = console(), registry.policies(), registry.presets()
        if method in presets:
            out.print(f"{method} = {presets[method]}", markup=False)
            return
        if method not in known:
            names = [*known, *presets]
            close = difflib.get_close_matches(method, names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "; see `kvloom list`"
            raise ValueError(f"unknown method {method!r}{hint}")
        _show(out, known[method])


def _show(out: Console, cls: type[Policy]) -> None:
    needs = f", needs {', '.join(sorted(cls.needs))}" if cls.needs else ""
    out.print(f"{cls.name}  ({cls.kind}{needs})\n", markup=False)
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


def _summary(cls: type[Policy]) -> str:
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
