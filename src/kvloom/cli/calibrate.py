"""`kvloom calibrate`: ranges and levels of `kvquant` for one model, from a text, as a safetensors file."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import typer
from rich import progress as bars
from rich.console import Console

from kvloom.evaluation import calibrate, compare, identity, texts
from kvloom.formats.kvquant import KVQuant

INTERRUPTED = 130


@dataclass
class Options:
    """What is asked for; see `kvloom calibrate --help`."""

    model: str
    text: str
    out: Path
    bits: int
    outliers: float
    samples: int
    length: int
    dtype: str
    device: str
    force: bool


def run(options: Options, out: Console) -> None:
    """Calibrate, write, say how to use it. Raises ValueError or OSError on wrong input."""
    recipe = KVQuant(options.bits, options.outliers, str(options.out))
    if options.out.exists() and not options.force:
        raise ValueError(f"{str(options.out)!r} exists; --force replaces it")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = compare.load_model(options.model, options.dtype, options.device)
    document = texts.load(options.text, tokenizer, options.samples * options.length)
    samples = document.ids.view(options.samples, options.length)
    facts = identity.calibration_facts(model, options.model, document.facts)
    facts["samples"], facts["length"] = str(options.samples), str(options.length)
    try:
        with _bar() as bar:
            task = bar.add_task("calibrating", total=2 * options.samples)
            made = calibrate.calibrate(
                model, samples, options.bits, options.outliers, facts,
                lambda steps: bar.advance(task, steps),
            )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was written", err=True)
        raise typer.Exit(INTERRUPTED) from None
    made.save(options.out)
    layers, heads, width = made.shape
    out.print(f"{layers} layers of {heads} KV heads, {width} wide; {document.ids.numel()} tokens")
    out.print(f"file    {options.out}", markup=False, soft_wrap=True)
    out.print(f"recipe  {recipe}", markup=False, soft_wrap=True)


def _bar() -> bars.Progress:
    return bars.Progress(
        bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(), console=Console(stderr=True), transient=True,
        disable=not sys.stderr.isatty(),
    )  # fmt: skip
