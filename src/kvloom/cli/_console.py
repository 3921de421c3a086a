"""What every command shares: where it prints, and how wrong input ends it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console


def console() -> Console:
    """Standard output; wide enough for the tables when it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 130, highlight=False)


INTERRUPTED = 130


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Wrong input ends the program with its message and status 2, without a traceback; Ctrl-C with
    a word and status 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
