"""`kvloom analyze`: what merging does to the keys of one head, and to the attention that they get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from kvloom.cli._console import console, one_line_errors

if TYPE_CHECKING:
    from torch import Tensor

    from kvloom.evaluation.analysis import Case
    from kvloom.evaluation.manifold import Manifold
    from kvloom.evaluation.spectrum import Spectrum

app = typer.Typer(no_args_is_help=True, help="Look into one head of a cache with centroids.")

PASSAGE = 128
RECIPE = "mp_kvm(window_size=64)"

Model = Annotated[str, typer.Option(help="A folder, a hub name, or 'testbed', the bundled model.")]
Layer = Annotated[
    int | None, typer.Option(help="From 0; default: the middle one of those compressed.")
]
Head = Annotated[int, typer.Option(help="The KV head, from 0.")]
Recipe = Annotated[
    str,
    typer.Option(help="One with a merger that keeps centroids."),
]
Budget = Annotated[str | None, typer.Option(help="Its budget: '25%', '1024tok' or '512MiB'.")]
Length = Annotated[int, typer.Option(min=16, help="Tokens of text.")]
Chunk = Annotated[int, typer.Option(min=1, help="Tokens per forward; 1: one by one.")]
Force = Annotated[bool, typer.Option("--force", help="Write into --out although it is not empty.")]
DrawOnly = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Draw the figures of finished results again; nothing is run."),
]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps; auto: an accelerator if there is one.")]


@dataclass
class Options:
    """What is asked for; see `kvloom analyze manifold --help`."""

    model: str
    texts: list[str]
    topics: bool
    passage: int
    layer: int | None
    head: int
    recipe: str
    budget: str | None
    length: int
    chunk: int
    out: Path
    dtype: str
    device: str
    force: bool


@app.command()
def manifold(
    model: Model = "testbed",
    text: Annotated[
        list[str] | None,
        typer.Option(help="As for compare; with --topics repeatable. Default: 'stdlib'."),
    ] = None,
    topics: Annotated[
        bool,
        typer.Option(
            "--topics",
            help="Passages of several texts in turn, coloured by text; without --text: 'code', "
            "'reference' and 'lists', which are bundled.",
        ),
    ] = False,
    passage: Annotated[int, typer.Option(min=2, help="Tokens of each, with --topics.")] = PASSAGE,
    layer: Layer = None,
    head: Head = 0,
    recipe: Recipe = RECIPE,
    budget: Budget = None,
    length: Length = 1024,
    chunk: Chunk = 64,
    out: Annotated[Path, typer.Option(help="Folder for row, data and figures.")] = Path(
        "results/manifold"
    ),
    dtype: Dtype = "float32",
    device: Device = "auto",
    force: Force = False,
    draw_only: DrawOnly = None,
) -> None:
    """Keys of one head before and after partition, by PCA and t-SNE (UMAP if installed)."""
    with one_line_errors():
        if draw_only is not None:
            draw_manifold(draw_only, console())
            return
        texts = text or ([] if topics else ["stdlib"])
        run_manifold(
            Options(
                model, texts, topics, passage, layer, head, recipe, budget, length, chunk, out,
                dtype, device, force,
            ),
            console(),
        )  # fmt: skip


@app.command()
def attention(
    model: Model = "testbed",
    text: Annotated[str, typer.Option(help="As for compare.")] = "stdlib",
    layer: Layer = None,
    head: Head = 0,
    recipe: Recipe = RECIPE,
    budget: Budget = None,
    length: Length = 1024,
    chunk: Chunk = 64,
    out: Annotated[Path, typer.Option(help="Folder for row, data and figure.")] = Path(
        "results/attention"
    ),
    dtype: Dtype = "float32",
    device: Device = "auto",
    force: Force = False,
    draw_only: DrawOnly = None,
) -> None:
    """Attention that centroids get with and without their mass, against a full cache."""
    with one_line_errors():
        if draw_only is not None:
            draw_attention(draw_only, console())
            return
        run_attention(
            Options(
                model, [text], False, PASSAGE, layer, head, recipe, budget, length, chunk, out,
                dtype, device, force,
            ),
            console(),
        )  # fmt: skip


def run_manifold(options: Options, out: Console) -> None:
    """Analyse, write, draw, tell. Raises ValueError or OSError on wrong input, before any work."""
    from kvloom.evaluation import analysis_rows, manifold, projection

    analysis_rows.check_folder(options.out, options.force)
    kinds = projection.available()
    row, tensors = manifold.analyze(_case(options), kinds)
    analysis_rows.save(row, tensors, options.out, manifold.NAME)
    draw_manifold(options.out, out)


def run_attention(options: Options, out: Console) -> None:
    """Analyse, write, draw, tell. Raises ValueError or OSError on wrong input, before any work."""
    from kvloom.evaluation import analysis_rows, spectrum

    analysis_rows.check_folder(options.out, options.force)
    row, tensors = spectrum.analyze(_case(options))
    analysis_rows.save(row, tensors, options.out, spectrum.NAME)
    draw_attention(options.out, out)


def _case(options: Options) -> Case:
    """What is asked for, loaded and checked."""
    from kvloom.evaluation import analysis, compare, topics

    if len(options.texts) > 1 and not options.topics:
        raise ValueError(f"texts {', '.join(options.texts)}: several need --topics")
    model, tokenizer = compare.load_model(options.model, options.dtype, options.device)
    if options.topics:
        names = options.texts or list(topics.SOURCES)
        text = topics.alternate(names, tokenizer, options.length, options.passage)
    else:
        text = topics.plain(options.texts[0], tokenizer, options.length)
    return analysis.prepare(
        model,
        options.model,
        options.recipe,
        options.budget,
        text,
        options.layer,
        options.head,
        options.chunk,
    )


def draw_manifold(folder: Path, out: Console) -> None:
    """Draw the figures of a folder's results, and tell what they hold."""
    from kvloom.evaluation import analysis_figures, manifold

    row, tensors = manifold.load(folder)
    out.print(_manifold_words(row), markup=False)
    _tell(folder, manifold.NAME, analysis_figures.draw_manifold, row, tensors, out)


def draw_attention(folder: Path, out: Console) -> None:
    """Draw the figure of a folder's results, and tell what they hold."""
    from kvloom.evaluation import analysis_figures, spectrum

    row, tensors = spectrum.load(folder)
    out.print(_attention_words(row), markup=False)
    _tell(folder, spectrum.NAME, analysis_figures.draw_attention, row, tensors, out)


def _tell(
    folder: Path, name: str, draw: Callable[[Any, dict[str, Tensor], Path], list[Path]],
    row: Any, tensors: dict[str, Tensor], out: Console,
) -> None:  # fmt: skip
    drawn = draw(row, tensors, folder)
    out.print(f"row     {folder / name}.jsonl", markup=False, soft_wrap=True)
    out.print(f"data    {folder / name}.safetensors", markup=False, soft_wrap=True)
    for path in drawn:
        out.print(f"figure  {path}", markup=False, soft_wrap=True)


def _manifold_words(row: Manifold) -> str:
    setting = row.setting
    words = [
        f"layer {setting.layer}, KV head {setting.head}: {setting.left} of {setting.text.tokens} tokens in "
        f"{len(setting.masses)} centroids, {setting.exact} exact; mean cosine to the nearest centroid "
        f"{row.similarity:.3f}"
    ]
    if row.purity is not None:
        words.append(f"purity {row.purity:.1%}; one centroid for all: {row.purity_of_one:.1%}")
    if row.shift is not None and row.shift_within is not None:
        words.append(
            f"from half a passage to the next, centroids shift by {row.shift:.1%} at "
            f"{len(row.transitions)} boundaries, by {row.shift_within:.1%} within passages"
        )
    return "\n".join(words)


def _attention_words(row: Spectrum) -> str:
    e, setting = row.energy, row.setting
    return (
        f"layer {setting.layer}, KV head {setting.head}: {row.queries} queries give "
        f"{len(setting.masses)} centroids {e.with_mass:.1%} of their attention with log mass, "
        f"{e.without_mass:.1%} without; a full cache gives their tokens {e.full:.1%}\n"
        f"mean difference to the full cache, query by query: {e.error_with:.1%} with, "
        f"{e.error_without:.1%} without"
    )
