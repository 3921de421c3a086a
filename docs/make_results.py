"""Fill the pages `docs/results/NAME.md` of experiments from their rows: `make docs`.

An experiment's record and rows lie in `docs/results/NAME/`; to measure anew, `kvloom run
experiments/NAME.toml` and copy them there from `results/NAME/`. What stands above and below the marked
part of a page is written by hand.
"""

from __future__ import annotations

from pathlib import Path

from _pages import filled

from kvloom.evaluation.experiment import NAME as RECORD
from kvloom.evaluation.experiment import Experiment
from kvloom.evaluation.report import build, folders, style
from kvloom.evaluation.report.blocks import Block, Note, Picture, Table
from kvloom.evaluation.report.page import Section

RESULTS = Path(__file__).parent / "results"
MARK = "made by docs/make_results.py"


def experiments() -> list[Path]:
    """Folders that hold an experiment."""
    return sorted(path.parent for path in RESULTS.glob(f"*/{RECORD}"))


def body(folder: Path) -> tuple[str, list[tuple[Section, Picture]]]:
    """What stands between the marks of a page, and the pictures that it shows."""
    experiment = folders.load(folder)
    chapter = build.chapter(experiment, folder)
    parts, pictures = [provenance(experiment)], []
    for section in chapter.sections:
        parts.append(f"## {section.title}")
        if section.missing:
            parts.append(f"Not drawn: {section.missing}.")
        for block in section.blocks:
            parts.append(spelled(block, folder.name, section))
            pictures += [(section, block)] if isinstance(block, Picture) else []
    return "\n\n".join(part for part in parts if part), pictures


def provenance(experiment: Experiment) -> str:
    """What was run, when and where, as far as it is the same for all rows."""
    rows = [o.row for o in experiment.outcomes if o.row is not None]
    models = sorted(
        {f"{r.model.name} ({r.model.parameters:,} parameters, {r.model.dtype})" for r in rows}
    )
    places = sorted({f"{r.environment.cpu}, {r.environment.threads} threads" for r in rows})
    versions = sorted({f"kvloom {r.environment.git}, torch {r.environment.torch}, transformers {r.environment.transformers}" for r in rows})  # fmt: skip
    days = sorted({r.measured_at[:10] for r in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    said = [
        f"{len(rows)} rows of {len(experiment.outcomes)} cells",
        *models,
        *places,
        *versions,
        when,
    ]
    return f"`kvloom run experiments/{experiment.source}`: {'; '.join(said)}."


def spelled(block: Block, name: str, section: Section) -> str:
    """A block as Markdown."""
    if isinstance(block, Table):
        return "" if block.folded else table(block)
    if isinstance(block, Picture):
        return f"![{block.alt}]({name}/{section.file(block)}.png)"
    return block.text if isinstance(block, Note) else block.words


def table(block: Table) -> str:
    """Its columns and entries; intervals behind their means."""
    rules = ["---" if i < block.words else "---:" for i in range(len(block.columns))]
    lines = [[c.replace("\n", " ") for c in block.columns], rules]
    for row in block.rows:
        texts = [f"{e.text} {e.detail}".strip().replace("|", "\\|") for e in row]
        codes = [f"`{t}`" if i == 1 and block.columns[1] == "recipe" else t for i, t in enumerate(texts)]  # fmt: skip
        lines.append(codes)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    for folder in experiments():
        text, pictures = body(folder)
        for section, picture in pictures:
            style.save(picture.figure, folder, section.file(picture), ("png",))
        page = folder.with_suffix(".md")
        page.write_text(filled(page.read_text(encoding="utf-8"), {MARK: text}), encoding="utf-8")


if __name__ == "__main__":
    main()
