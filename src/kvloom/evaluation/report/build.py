"""Reads folders, makes every figure that their records ask for, and writes page and files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvloom.evaluation.experiment import Experiment, Figure
from kvloom.evaluation.report import facts, folders, kinds, latex, style
from kvloom.evaluation.report.blocks import Block, Note, Picture, Table
from kvloom.evaluation.report.data import MARK, MARKED, Data, Missing
from kvloom.evaluation.report.page import Chapter, Section, page, slug

NAME = "report.html"
FIGURES = "figures"
FORMATS = ("png", "svg")


@dataclass(frozen=True)
class Made:
    """What was written.

    Attributes:
        page: the HTML page. figures: all files of figures. missing: what could not be drawn, with the
            reason. tex, pdf: the LaTeX report, if it was asked for, and built. unbuilt: why it was not.
    """

    page: Path
    figures: list[Path]
    missing: list[str]
    tex: Path | None = None
    pdf: Path | None = None
    unbuilt: str = ""


def build(given: Sequence[Path], out: Path, tex: bool = False) -> Made:
    """Make the report of one or more folders in `out`; with `tex` as LaTeX besides.

    Raises ValueError if a folder holds no results, OSError if `out` cannot be written.
    """
    made = [(folders.load(folder), folder) for folder in given]
    chapters = [
        chapter(dataclasses.replace(experiment, title=title), folder, stem)
        for (experiment, folder), title, stem in zip(made, _titles(made), _stems(made), strict=True)
    ]
    out.mkdir(parents=True, exist_ok=True)
    figures = draw(chapters, out / FIGURES, FORMATS)
    titles = ", ".join(c.experiment.title for c in chapters)
    path = out / NAME
    path.write_text(page(titles, chapters, out / FIGURES), encoding="utf-8")
    missing = [f"{s.title}: {s.missing}" for c in chapters for s in c.sections if s.missing]
    written = Made(path, figures, missing)
    return _with_tex(written, titles, chapters, out) if tex else written


def _with_tex(made: Made, titles: str, chapters: Sequence[Chapter], out: Path) -> Made:
    figures = draw(chapters, out / FIGURES, ("pdf",))
    path = out / latex.NAME
    path.write_text(latex.document(titles, chapters, FIGURES), encoding="utf-8")
    pdf, unbuilt = latex.compiled(path)
    return dataclasses.replace(
        made, figures=[*made.figures, *figures], tex=path, pdf=pdf, unbuilt=unbuilt
    )


def _titles(made: Sequence[tuple[Experiment, Path]]) -> list[str]:
    """Titles, with the folder where several folders are of one title."""
    titles = [experiment.title for experiment, _ in made]
    return [
        f"{t} ({folder.resolve().name})" if titles.count(t) > 1 else t
        for t, (_, folder) in zip(titles, made, strict=True)
    ]


def _stems(made: Sequence[tuple[Experiment, Path]]) -> list[str]:
    """What files and ids of each chapter begin with: the experiment's name, with the folder's where several
    are of one name, and numbered where that is not enough.
    """
    names = [slug(experiment.name) for experiment, _ in made]
    found: list[str] = []
    for name, (_, folder) in zip(names, made, strict=True):
        stem = f"{name}-{slug(folder.resolve().name)}" if names.count(name) > 1 else name
        numbered = (f"{stem}-again-{n}" for n in range(2, len(made) + 2))
        found.append(next(s for s in (stem, *numbered) if s not in found))
    return found


def chapter(experiment: Experiment, folder: Path, stem: str = "") -> Chapter:
    """All figures of one experiment; what stands in its head comes from the same rows.

    Args:
        stem: what its files and ids begin with; its name by default.
    """
    stem = stem or slug(experiment.name)
    sections = [
        part
        for number, figure in enumerate(map(_titled, folders.with_analyses(experiment, folder)), 1)
        for part in _sections(
            experiment, figure, folder, f"{stem}-{number:02d}-{slug(figure.kind)}"
        )
    ]
    trouble, claims = facts.trouble(experiment), facts.claims(experiment)
    head: list[Block] = []
    if claims:
        head += [Note("Claimed and measured:"), *claims]
    if trouble:
        head += [Note("Cells that failed, are missing, or ran otherwise than asked:"), *trouble]
    return Chapter(experiment, sections, head)


def _titled(figure: Figure) -> Figure:
    """A figure without a title is called by its kind and grid."""
    name = f"{figure.kind.capitalize()}{f' of {figure.grid}' if figure.grid else ''}"
    return figure if figure.title else dataclasses.replace(figure, title=name)


def _sections(experiment: Experiment, figure: Figure, folder: Path, stem: str) -> list[Section]:
    try:
        kind = kinds.check(figure)
        data = Data.of(experiment, figure, folder)
        parts = [data] if getattr(kind, "TOGETHER", False) else data.by_model()
    except ValueError as error:
        return [Section(figure.title, stem, missing=str(error))]
    found = []
    for number, part in enumerate(parts):
        at = stem if len(parts) == 1 else f"{stem}-{number + 1}"
        try:
            found.append(Section(part.figure.title, at, _explained(kind.make(part))))
        except Missing as error:
            found.append(Section(part.figure.title, at, missing=str(error)))
        except ValueError as error:  # options that make no sense
            found.append(Section(part.figure.title, at, missing=f"{figure.kind}: {error}"))
    return found


def _explained(blocks: list[Block]) -> list[Block]:
    """With a sentence on what is marked, if something is."""
    tables = [block for block in blocks if isinstance(block, Table)]
    marked = any(e.text.startswith(MARK) for table in tables for row in table.rows for e in row)
    return [*blocks, Note(MARKED)] if marked else blocks


def draw(chapters: Sequence[Chapter], folder: Path, formats: Sequence[str]) -> list[Path]:
    """Write every picture into a folder, in each format, and none over another.

    Raises ValueError if two of them have one name.
    """
    made: list[Path] = []
    for section in (s for c in chapters for s in c.sections):
        for block in section.blocks:
            if isinstance(block, Picture):
                folder.mkdir(parents=True, exist_ok=True)
                saved = style.save(block.figure, folder, section.file(block), formats)
                if set(saved) & set(made):
                    raise ValueError(f"two figures are called {section.file(block)!r}")
                made += saved
    return made
