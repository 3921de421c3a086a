"""`kvloom analyze`: what merging does to keys and attention of one head, and what became of each token."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console

from kvloom.cli._console import console, one_line_errors

if TYPE_CHECKING:
    from torch import Tensor

    from kvloom.evaluation.analysis import Case
    from kvloom.evaluation.manifold import Manifold
    from kvloom.evaluation.spectrum import Spectrum

app = typer.Typer(no_args_is_help=True, help="Look into a compressed cache.")


@dataclass(frozen=True)
class Options:
    """What manifold and attention are asked for: every field is an option of each."""

    model: Annotated[
        str, typer.Option(help="A folder, a hub name, or 'testbed', the bundled model.")
    ] = "testbed"
    layer: Annotated[
        int | None, typer.Option(help="From 0; default: the middle one of those compressed.")
    ] = None
    head: Annotated[int, typer.Option(help="The KV head, from 0.")] = 0
    recipe: Annotated[str, typer.Option(help="One with a merger that keeps centroids.")] = (
        "mp_kvm(window_size=64)"
    )
    budget: Annotated[
        str | None, typer.Option(help="Its budget: '25%', '1024tok' or '512MiB'.")
    ] = None
    length: Annotated[int, typer.Option(min=16, help="Tokens of text.")] = 1024
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward; 1: one by one.")] = 64
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "float32"
    device: Annotated[
        str, typer.Option(help="cpu, cuda, mps; auto: an accelerator if there is one.")
    ] = "auto"
    force: Annotated[
        bool, typer.Option("--force", help="Write into --out although it is not empty.")
    ] = False
    draw_only: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Draw the figures of finished results again; nothing is run."
        ),
    ] = None


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command(options, ...)` as typer is to see it: with the fields of `Options` among its options.

    Wrong input ends it in one line.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    hints = get_type_hints(Options, include_extras=True)
    shared = [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name]
        )
        for f in dataclasses.fields(Options)
    ]

    def called(**given: Any) -> None:
        options = Options(**{p.name: given.pop(p.name) for p in shared})
        with one_line_errors():
            command(options, **given)

    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
    return called


@app.command()
@with_options
def manifold(
    options: Options,
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
    passage: Annotated[int, typer.Option(min=2, help="Tokens of each, with --topics.")] = 128,
    out: Annotated[Path, typer.Option(help="Folder for row, data and figures.")] = Path(
        "results/manifold"
    ),
) -> None:
    """Keys of one head before and after partition, by PCA and t-SNE (UMAP if installed)."""
    from kvloom.evaluation import analysis_rows, manifold, projection

    if options.draw_only is not None:
        draw_manifold(options.draw_only, console())
        return
    analysis_rows.check_folder(out, options.force)
    kinds = projection.available()
    names = text or ([] if topics else ["stdlib"])
    row, tensors = manifold.analyze(_case(options, names, passage if topics else None), kinds)
    analysis_rows.save(row, tensors, out, manifold.NAME)
    draw_manifold(out, console())


@app.command()
@with_options
def attention(
    options: Options,
    text: Annotated[str, typer.Option(help="As for compare.")] = "stdlib",
    out: Annotated[Path, typer.Option(help="Folder for row, data and figure.")] = Path(
        "results/attention"
    ),
) -> None:
    """Attention that centroids get with and without their mass, against a full cache."""
    from kvloom.evaluation import analysis_rows, spectrum

    if options.draw_only is not None:
        draw_attention(options.draw_only, console())
        return
    analysis_rows.check_folder(out, options.force)
    row, tensors = spectrum.analyze(_case(options, [text], None))
    analysis_rows.save(row, tensors, out, spectrum.NAME)
    draw_attention(out, console())


@app.command()
def tokens(
    model: Annotated[
        str, typer.Option(help="A folder, a hub name, or 'testbed', the bundled model.")
    ] = "testbed",
    recipe: Annotated[
        str, typer.Option(help="Any recipe, e.g. 'snapkv | int4'.")
    ] = "snapkv | int4",
    budget: Annotated[
        str | None, typer.Option(help="Its budget: '25%', '1024tok' or '512MiB'.")
    ] = None,
    text: Annotated[str, typer.Option(help="As for compare.")] = "stdlib",
    length: Annotated[int, typer.Option(min=1, help="Tokens of text.")] = 1024,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward; 1: one by one.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder for row, data and figure.")] = Path(
        "results/tokens"
    ),
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, mps; auto: an accelerator if there is one.")
    ] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Write into --out although it is not empty.")
    ] = False,
    draw_only: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Draw the figure of finished results again."),
    ] = None,
) -> None:
    """Which tokens each head kept, merged or dropped, and at which precision it holds them."""
    with one_line_errors():
        from kvloom.evaluation import analysis_rows, compare, texts, token_map

        if draw_only is None:
            analysis_rows.check_folder(out, force)
            loaded, tokenizer = compare.load_model(model, dtype, device)
            document = texts.load(text, tokenizer, length)
            row, tensors = token_map.analyze(
                loaded, model, tokenizer, recipe, budget, document, chunk
            )
            analysis_rows.save(row, tensors, out, token_map.NAME)
        draw_tokens(draw_only or out, console())


def _case(options: Options, texts: list[str], passage: int | None) -> Case:
    """What is asked for, loaded and checked; `passage`: tokens of each text in turn, if they are topics."""
    from kvloom.evaluation import analysis, compare, topics

    if len(texts) > 1 and passage is None:
        raise ValueError(f"texts {', '.join(texts)}: several need --topics")
    model, tokenizer = compare.load_model(options.model, options.dtype, options.device)
    if passage is None:
        text = topics.plain(texts[0], tokenizer, options.length)
    else:
        names = texts or list(topics.SOURCES)
        text = topics.alternate(names, tokenizer, options.length, passage)
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


def draw_tokens(folder: Path, out: Console) -> None:
    """Draw the figure of a folder's token map, and tell what it holds."""
    from kvloom.evaluation import token_figures, token_map

    row, tensors = token_map.load_map(folder)
    out.print(
        f"{row.text.tokens} tokens in {len(row.layers)} layers of {row.heads} KV heads: {row.kept} kept, "
        f"{row.merged} merged, {row.dropped} dropped",
        markup=False,
    )
    _tell(folder, token_map.NAME, token_figures.draw, row, tensors, out)


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
        f"layer {setting.layer}, KV head {setting.head}: {setting.left - setting.dropped} of "
        f"{setting.text.tokens} tokens in {len(setting.masses)} centroids, {setting.exact} exact"
        f"{f', {setting.dropped} dropped' if setting.dropped else ''}; mean cosine to the nearest centroid "
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
