"""One HTML page that needs nothing beside it: images, style and script are in it, and nothing is fetched."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvloom.evaluation.experiment import Experiment
from kvloom.evaluation.metrics import AnyRow
from kvloom.evaluation.report import facts, rows
from kvloom.evaluation.report.blocks import Block, Entry, Markup, Note, Picture, Table
from kvloom.evaluation.report.html import Html, join, single, tag

HEAVY = 600_000  # bytes of SVG above which the page holds a PNG instead
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class Section:
    """One figure of an experiment as it was made. `missing`: why it was not."""

    title: str
    stem: str
    blocks: Sequence[Block] = ()
    missing: str = ""

    def file(self, picture: Picture) -> str:
        """A picture's file, without folder and format."""
        return f"{self.stem}-{slug(picture.name)}" if picture.name else self.stem


@dataclass(frozen=True)
class Chapter:
    """One experiment. `others`: figures of analyses that its folder holds besides."""

    experiment: Experiment
    sections: Sequence[Section]
    facts: Sequence[Block] = field(default=())


def page(title: str, chapters: Sequence[Chapter], figures: Path) -> Html:
    """The whole page. `figures`: the folder where every picture was written as SVG and PNG."""
    here = Path(__file__).parent
    style_, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    head = tag(
        "head",
        single("meta", charset="utf-8"),
        single("meta", http_equiv="Content-Security-Policy", content=POLICY),
        single("meta", name="viewport", content="width=device-width, initial-scale=1"),
        single("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Html(style_)),
    )
    body = [tag("h1", title), _contents(chapters)]
    for number, chapter in enumerate(chapters):
        body += _chapter(number, chapter, figures)
    held: list[AnyRow] = [
        o.row for c in chapters for o in c.experiment.outcomes if o.row is not None
    ]
    body += [
        tag("h2", "Rows", id="rows"),
        tag(
            "p",
            "What every number above comes from. A number leads to its row, or to all that it is a mean of.",
        ),
        rows.section(held),
        tag("script", Html(script)),
    ]
    whole = tag("html", head, tag("body", join(*body)), lang="en")
    return Html(f"<!doctype html>\n{whole}\n")


def _contents(chapters: Sequence[Chapter]) -> Html:
    links = []
    for number, chapter in enumerate(chapters):
        links.append(tag("a", chapter.experiment.title, href=f"#part-{number}"))
        links += [
            tag("a", section.title, href=f"#{section.stem}", class_="deeper")
            for section in chapter.sections
        ]
    return tag("nav", *links, tag("a", "Rows", href="#rows"))


def _chapter(number: int, chapter: Chapter, figures: Path) -> list[Html]:
    experiment = chapter.experiment
    made = [tag("h2", experiment.title, id=f"part-{number}")]
    made += [tag("p", text) for text in facts.sentences(experiment)]
    made += [block(b) for b in chapter.facts]
    for section in chapter.sections:
        made.append(tag("h3", section.title, id=section.stem))
        if section.missing:
            made.append(tag("p", f"Not drawn: {section.missing}.", class_="absent"))
        for given in section.blocks:
            if isinstance(given, Picture):
                image = inline(figures / section.file(given))
                made.append(tag("figure", single("img", src=image, alt=given.alt)))
            else:
                made.append(block(given))
    return made


def block(given: Block) -> Html:
    """A table or sentence as HTML."""
    if isinstance(given, Table):
        return _table(given)
    if isinstance(given, Markup):
        return Html(given.html)
    assert isinstance(given, Note)
    return tag("p", given.text, class_="note")


def inline(stem: Path) -> str:
    """A picture as a `data:` address: SVG, or PNG where that would be heavy."""
    path, kind = stem.with_name(f"{stem.name}.svg"), "svg+xml"
    if path.stat().st_size > HEAVY:
        path, kind = stem.with_name(f"{stem.name}.png"), "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def slug(name: str) -> str:
    """A name as part of a file's name or an id."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "report"


def _table(table: Table) -> Html:
    heads = [
        tag(
            "th",
            name,
            scope="col",
            tabindex="0",
            class_="sorts" + (" number" if i >= table.words else ""),
        )
        for i, name in enumerate(table.columns)
    ]
    lines = [
        tag(
            "tr",
            *(_entry(entry, i >= table.words, table.columns[i]) for i, entry in enumerate(line)),
        )
        for line in table.rows
    ]
    inside = tag("table", tag("thead", tag("tr", *heads)), tag("tbody", *lines))
    whole = tag("div", inside, class_="wide")
    return tag("details", tag("summary", "The numbers"), whole) if table.folded else whole


def _entry(entry: Entry, number: bool, column: str) -> Html:
    shown: str = tag("code", entry.text) if column == "recipe" else entry.text
    if entry.keys:
        ids = [rows.anchor(key) for key in entry.keys]
        several = " ".join(ids) if len(ids) > 1 else None
        shown = tag("a", entry.text, href=f"#{ids[0]}", data_rows=several)
    detail = [tag("small", entry.detail)] if entry.detail else []
    value = None if entry.value is None or entry.value != entry.value else f"{entry.value:.12g}"
    if value in ("inf", "-inf"):
        value = value.replace("inf", "Infinity")
    return tag("td", shown, *detail, class_="number" if number else None, data_value=value)
