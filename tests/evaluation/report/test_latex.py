from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvloom.cli.main import app
from kvloom.evaluation.experiment import Figure
from kvloom.evaluation.report import build, latex
from kvloom.evaluation.report.blocks import Entry, Table
from tests.evaluation.report import made

FIGURES = [Figure("table", "Main & only", "main", {"columns": ["change", "kl", "retained", "tpot", "ttft", "peak", "bits"]}),
           Figure("pareto", "Quality", "main", {"y": "kl"}), Figure("energy", "Energy")]  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> build.Made:
    root = tmp_path_factory.mktemp("latex")
    small = made.experiment(made.main_grid(), figures=FIGURES)
    return build.build([made.write(small, root / "rows")], root / "out", tex=True)


def test_the_text_holds_tables_figures_and_what_is_missing(written: build.Made) -> None:
    assert written.tex is not None
    text = written.tex.read_text(encoding="utf-8")
    assert text.count(r"\toprule") == text.count(r"\bottomrule") >= 3
    assert r"\subsection{Main \& only}" in text and r"\texttt{snapkv}" in text
    pictures = [p for p in written.figures if p.suffix == ".pdf"]
    assert len(pictures) == 1 and f"{{figures/{pictures[0].name}}}" in text
    assert pictures[0].read_bytes()[:5] == b"%PDF-" and "Not drawn: " in text
    assert r"streaming\_\allowbreak{}llm" in text and "out of memory" in text


def test_wide_tables_go_on_below() -> None:
    heads = ["recipe", *(f"n{i}" for i in range(7))]
    row = [Entry("a"), *(Entry(str(i), value=float(i)) for i in range(7))]
    lines = "\n".join(latex._table(Table(heads, [row])))
    assert lines.count(r"\toprule") == 2 and lines.count(r"\texttt{a}") == 2
    assert all(lines.count(rf"\textbf{{n{i}}}") == 1 for i in range(7))


def test_text_has_no_meaning_for_tex() -> None:
    given = r"\input{/etc/passwd} 50% $x_1^2$ #1 & ~ <a|b> ± é"
    assert latex.text(given) == (
        r"\textbackslash{}input\{/etc/passwd\} 50\% \$x\_1\textasciicircum{}2\$ \#1 \& "
        r"\textasciitilde{} $<$a$|$b$>$ $\pm$ ?"
    )


def test_no_row_begins_as_an_option_of_the_row_before() -> None:
    rows = [[Entry(x), Entry("1", value=1.0)] for x in ("[x]", "*y", "[3cm]")]
    lines = [x for x in latex._table(Table(["name", "n"], rows)) if x.endswith(r"& 1 \\")]
    assert [x.split(" &")[0] for x in lines] == ["{[}x]", "{*}y", "{[}3cm]"]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="TeX is not installed")
def test_it_builds(written: build.Made) -> None:
    assert written.unbuilt == ""
    assert written.pdf is not None and written.pdf.read_bytes()[:5] == b"%PDF-"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="TeX is not installed")
def test_an_error_of_tex_is_told(tmp_path: Path) -> None:
    path = tmp_path / "report.tex"
    path.write_text(r"\documentclass{article}\begin{document}\nonsense\end{document}")
    pdf, reason = latex.compiled(path)
    assert pdf is None and "Undefined control sequence" in reason


def test_without_tex_a_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latex.shutil, "which", lambda name: None)  # type: ignore[attr-defined]
    small = made.experiment([made.document("none")], figures=[])
    folder = made.write(small, tmp_path / "rows")
    result = CliRunner().invoke(app, ["report", str(folder), "--latex"], catch_exceptions=False)
    assert result.exit_code == 0 and "there is no pdflatex here" in result.output
    assert (folder / "report" / "report.tex").exists()
