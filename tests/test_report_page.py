"""`docs/report.md` lists the kinds of figures that there are, and its commands are those of the program."""

from __future__ import annotations

import re
from pathlib import Path

from typer.testing import CliRunner

from kvloom.cli.main import app
from kvloom.evaluation.experiment import Figure
from kvloom.evaluation.report import kinds
from tests.scripts import load

PAGE = Path(__file__).parents[1] / "docs" / "report.md"


def test_the_page_lists_every_kind_with_its_options() -> None:
    script = load(PAGE.parent / "make_report.py")
    page = PAGE.read_text(encoding="utf-8")
    assert script.filled(page, {"kinds": script.table()}) == page, (
        "run `make docs`, commit report.md"
    )
    for name, kind in kinds.found().items():
        assert f"| `{name}` |" in page and all(f"`{o}`: " in page for o in kind.OPTIONS)


def test_the_example_is_a_figure() -> None:
    page = PAGE.read_text(encoding="utf-8")
    block = page.partition("```toml\n")[2].partition("```")[0]
    given = dict(re.findall(r"^(\w+) = (\S.*?)(?:\s+#.*)?$", block, re.MULTILINE))
    kind = given.pop("kind").strip('"')
    options = {k: v for k, v in given.items() if k not in ("title", "grid")}
    assert kinds.check(Figure(kind, given["title"], options=options)) is kinds.found()["sweep"]


def test_the_options_of_the_commands_exist() -> None:
    page = PAGE.read_text(encoding="utf-8")
    used = re.findall(r"^kvloom (report|analyze tokens)(.*)$", page, re.MULTILINE)
    assert len(used) >= 4
    for command, rest in used:
        shown = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200"}).output
        assert all(option in shown for option in re.findall(r"--[a-z-]+", rest.partition("#")[0]))
