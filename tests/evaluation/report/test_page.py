"""The page as written: what it holds, that its links lead somewhere, that it needs no network."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvloom.cli.main import app
from kvloom.evaluation.experiment import Claim, Figure, Outcome
from kvloom.evaluation.report import build, facts, html, rows
from kvloom.evaluation.report.blocks import Table
from tests.evaluation.report import made


class Reader(HTMLParser):
    """Ids, links, images and open tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {k: v or "" for k, v in attrs}
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        if tag == "a":
            self.links += given.get("data-rows", given["href"].removeprefix("#")).split()
        if tag == "img":
            self.images.append(given["src"])
        self.fetched += [v for k, v in given.items() if k in ("src", "href") and "://" in v]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    return reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write(made.experiment(), tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def written(folder: Path) -> build.Made:
    return build.build([folder], folder / "report")


def test_the_page_is_whole_and_every_link_leads_somewhere(written: build.Made) -> None:
    page = read(written.page)
    assert page.open == [] and len(page.ids) == len(set(page.ids))
    assert len(page.links) > 100 and set(page.links) <= set(page.ids)


def test_nothing_is_fetched(written: build.Made) -> None:
    text = written.page.read_text(encoding="utf-8")
    page = read(written.page)
    assert page.fetched == [] and all(x.startswith("data:image/") for x in page.images)
    assert "default-src &#x27;none&#x27;" in text and "@import" not in text and "fetch(" not in text


def test_every_figure_is_in_the_page_and_in_two_formats(written: build.Made) -> None:
    pngs = [p for p in written.figures if p.suffix == ".png"]
    assert {p.with_suffix(".svg") for p in pngs} == {
        p for p in written.figures if p.suffix == ".svg"
    }
    assert len(read(written.page).images) == len(pngs)
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in pngs)
    drawn = {re.match(r"made-\d+-([a-z]+)", p.name)[1] for p in pngs}  # type: ignore[index]
    assert drawn == {f.kind for f in made.FIGURES} - {"table", "energy"}


def test_what_is_missing_is_said_where_it_would_stand(written: build.Made) -> None:
    (reason,) = written.missing
    assert reason.startswith("Attention energy: ")
    text = written.page.read_text(encoding="utf-8")
    assert f"Not drawn: {html.text(reason.removeprefix('Attention energy: '))}." in text


def test_failures_and_fallbacks_are_listed_with_their_reasons(written: build.Made) -> None:
    text = written.page.read_text(encoding="utf-8")
    assert "failed: out of memory" in text and "prefill_chunk = 256" in text
    assert "1 failed, 1 fell back" in text


def test_claims_without_a_cell_are_shown_as_not_measured(written: build.Made) -> None:
    text = written.page.read_text(encoding="utf-8")
    line = next(x for x in re.split("<tr>", text) if "a paper, against offloading" in x)
    assert "29.00x" in line and "not measured" in line


def test_text_of_rows_is_text(written: build.Made) -> None:
    text = written.page.read_text(encoding="utf-8")
    assert "A made &lt;experiment&gt;" in text and "blue &lt;b&gt;" in text
    assert "A made <experiment>" not in text and "blue <b>" not in text


def test_every_row_is_in_the_page_once(written: build.Made) -> None:
    text = written.page.read_text(encoding="utf-8")
    for row in made.rows_of(made.experiment().outcomes):
        assert len(row.key) == 64
    ids = [i for i in read(written.page).ids if i.startswith("row-")]
    assert len(ids) == len(made.rows_of(made.experiment().outcomes))
    assert rows.anchor("f" * 64) == "row-" + "f" * 16 and "red &amp; green" in text


def test_the_same_rows_give_the_same_files(tmp_path: Path) -> None:
    figures = [f for f in made.FIGURES if f.kind in ("table", "pareto")]
    small = made.experiment(made.main_grid(), figures=figures)
    folder = made.write(small, tmp_path / "rows")
    one, other = (build.build([folder], tmp_path / name) for name in ("a", "b"))
    assert one.page.read_bytes() == other.page.read_bytes()
    for first, second in zip(one.figures, other.figures, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name


def test_a_quick_version_says_so(tmp_path: Path) -> None:
    quick = dataclasses.replace(made.experiment([made.document("none")]), scale="quick", figures=[])
    page = build.build([made.write(quick, tmp_path / "q")], tmp_path / "out").page
    assert "its quick version" in page.read_text(encoding="utf-8")


def test_a_bad_figure_spoils_only_its_own_place(tmp_path: Path) -> None:
    figures = [
        Figure("pie", "A pie"), Figure("table", "", "main", {"colums": ["kl"]}),
        Figure("table", "Good", "main"), Figure("table", "Empty", "nothing"),
    ]  # fmt: skip
    bad = made.experiment([made.document("none")], figures=figures)
    found = build.build([made.write(bad, tmp_path / "x")], tmp_path / "out")
    assert [m.split(":")[0] for m in found.missing] == ["A pie", "Table of main", "Empty"]


def test_several_folders_make_one_page(tmp_path: Path) -> None:
    folder = made.write(made.experiment([made.document("none")], figures=[]), tmp_path / "a")
    other = dataclasses.replace(
        made.experiment([made.document("none")], figures=[]), name="other", title="Another"
    )
    page = build.build([folder, made.write(other, tmp_path / "b")], tmp_path / "out").page
    text = page.read_text(encoding="utf-8")
    assert "Another" in text and "A made" in text and read(page).open == []
    assert len(set(read(page).ids)) == len(read(page).ids)


def test_two_folders_of_one_experiment_keep_their_own_figures(tmp_path: Path) -> None:
    figures = [Figure("pareto", "Quality", "main", {"y": "kl"})]
    folders = []
    for name, harm in (("quick/runs", 0.1), ("runs", 0.9), ("other/runs", 0.4)):
        rows = [made.document("none"), made.document("h2o", "25%", harm, 0.25)]
        folders.append(made.write(made.experiment(rows, figures=figures), tmp_path / name))
    built = build.build(folders, tmp_path / "out")
    page = read(built.page)
    assert len(page.ids) == len(set(page.ids)) and set(page.links) <= set(page.ids)
    assert len(page.images) == len(set(page.images)) == 3  # none is shown for another
    assert len(built.figures) == len(set(built.figures)) == 6
    for folder, image in zip(folders, page.images, strict=True):
        alone = read(build.build([folder], tmp_path / "alone").page).images
        assert len(alone[0]) == pytest.approx(len(image), rel=0.1)
    assert "A made &lt;experiment&gt; (runs)" in built.page.read_text(encoding="utf-8")


def test_no_figure_is_written_over_another(tmp_path: Path) -> None:
    figures = [Figure("pareto", "Quality", "main", {"y": "kl"})]
    rows = [made.document("none"), made.document("h2o", "25%", 0.1, 0.25)]
    chapters = [build.chapter(made.experiment(rows, figures=figures), tmp_path)] * 2
    with pytest.raises(ValueError, match="two figures are called 'made-01-pareto'"):
        build.draw(chapters, tmp_path, ("svg",))


def claims_table(*outcomes: Outcome, **parts: Any) -> list[list[str]]:
    (found, *_) = facts.claims(made.experiment(list(outcomes), **parts))
    assert isinstance(found, Table)
    return [[e.text for e in row[3:4]] + [row[6].text, str(len(row[6].keys))] for row in found.rows]


CLAIM = Claim("snapkv", "kl", 0.5, "a paper")


def test_claims_count_each_row_once() -> None:
    one = made.document("snapkv", "25%", 0.1)
    again = dataclasses.replace(one, spec=made.spec("snapkv", "25%", repeat=1, seed=1))
    elsewhere = dataclasses.replace(one, spec=made.spec("snapkv", "25%", grid="other"))
    found = claims_table(one, again, elsewhere, claims=[CLAIM])
    assert found == [["25% · stdlib", "0.1000", "1"]]
    # a grid that shares the row is still what its claim is about
    of_grid = dataclasses.replace(CLAIM, grid="other")
    assert claims_table(one, elsewhere, claims=[of_grid]) == [["25% · stdlib", "0.1000", "1"]]


def test_claims_are_of_means_over_seeds_and_say_what_else_differs() -> None:
    seeds = [
        made.document(f"random(seed={s})", None, 0.1 * (s + 1), spec={"seed": s, "repeat": s, "name": "chance"})
        for s in range(3)
    ]  # fmt: skip
    chance = dataclasses.replace(CLAIM, recipe="chance")
    ((_, mean, keys),) = claims_table(*seeds, claims=[chance])
    assert mean.startswith("0.2000 ±") and keys == "3"
    long, short = (
        made.document("snapkv", None, 0.1, spec={"options": {"tokens": n}}) for n in (512, 64)
    )
    found = [row[0] for row in claims_table(long, short, claims=[CLAIM])]
    assert found == ["stdlib · tokens 512", "stdlib · tokens 64"]


def test_what_ran_with_another_model_stands_beside_no_claim() -> None:
    asked, smaller = made.document("snapkv", None, 0.1), made.document("snapkv", None, 0.3)
    smaller.fallback = {"model": "org/tiny"}
    assert claims_table(asked, smaller, claims=[CLAIM]) == [["stdlib", "0.1000", "1"]]
    assert claims_table(smaller, claims=[CLAIM]) == [["", "not measured", "0"]]
    asked.fallback = {"prefill_chunk": 64}
    assert claims_table(asked, claims=[CLAIM]) == [["stdlib · *prefill_chunk 64", "0.1000", "1"]]


def test_the_command_needs_rows(tmp_path: Path) -> None:
    run = CliRunner().invoke
    for path, words in (
        (tmp_path / "no", "no folder"),
        (tmp_path, "holds neither experiment.json"),
    ):
        result = run(app, ["report", str(path)])
        assert result.exit_code == 2 and words in result.stderr


def test_the_command_reports_rows_alone(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    demo = Path(__file__).parents[3] / "docs" / "results" / "demo.jsonl"
    (folder / "results.jsonl").write_bytes(demo.read_bytes())
    result = CliRunner().invoke(app, ["report", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    page = folder / "report" / "report.html"
    assert f"page    {page}" in result.output and "pareto.png" in result.output
    assert "Bytes, quality and time" in page.read_text(encoding="utf-8")


def test_claims_about_time_warn_of_a_busy_machine(tmp_path: Path) -> None:
    busy = made.document("snapkv", "25%", timing={"load": 9.0})
    for name, claims, warned in (("a", made.CLAIMS, True), ("b", made.CLAIMS[:1], False)):
        small = made.experiment([busy], figures=[], claims=claims)
        page = build.build([made.write(small, tmp_path / name)], tmp_path / f"{name}-out").page
        assert ("load up to 9.0" in page.read_text(encoding="utf-8")) == warned
