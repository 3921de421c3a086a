"""The same report as LaTeX: booktabs tables, figures as PDF, built where TeX is installed.

Debian: texlive-latex-base and texlive-latex-recommended are enough. Text of rows is escaped, and nothing
of it can run a command; shell escape is off besides.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvloom.evaluation.report import facts
from kvloom.evaluation.report.blocks import Block, Entry, Markup, Note, Picture, Table
from kvloom.evaluation.report.page import Chapter, Section

NAME = "report.tex"
ACROSS = 5  # columns of numbers beside each other; wider tables go on below
WIDEST = 10.5  # inches of a figure that fills the line
SECONDS = 300  # that a build may take
PREAMBLE = r"""\documentclass[10pt,a4paper]{article}
\usepackage[utf8]{inputenc}
\usepackage[margin=2cm]{geometry}
\usepackage{booktabs,longtable,array,graphicx}
\usepackage[hidelinks]{hyperref}
\setlength{\parindent}{0pt}\setlength{\parskip}{4pt}
\setlength{\tabcolsep}{4pt}
\newcolumntype{W}[1]{>{\raggedright\arraybackslash}p{#1}}
\newcolumntype{N}[1]{>{\raggedleft\arraybackslash}p{#1}}
\begin{document}
"""
# What has a meaning of its own, if only behind the end of a row, or is no character of TeX's own fonts.
SPELLED = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#",
    "$": r"\$", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": "$<$", ">": "$>$",
    "[": "{[}", "*": "{*}", "|": "$|$", "±": r"$\pm$", "·": r"$\cdot$", '"': "''", "\n": " ", "\t": " ",
}  # fmt: skip
BREAKS = ("_", ",", "(", "=", "|", "/", ".", ";")  # a long recipe may go on in the next line here


def text(given: str, breaks: bool = False) -> str:
    """Text that TeX shows as it is; what its fonts do not have becomes a question mark."""
    made = []
    for character in given:
        shown = SPELLED.get(character, character if " " <= character <= "~" else "?")
        made.append(shown + (r"\allowbreak{}" if breaks and character in BREAKS else ""))
    return "".join(made)


def document(title: str, chapters: Sequence[Chapter], figures: str) -> str:
    """The whole text; `figures`: the folder of the pictures, from where the text lies."""
    lines = [PREAMBLE, rf"\title{{{text(title)}}}", r"\date{}", r"\maketitle", r"\tableofcontents"]
    for chapter in chapters:
        lines.append(rf"\section{{{text(chapter.experiment.title)}}}")
        lines += [text(sentence) + "\n" for sentence in facts.sentences(chapter.experiment)]
        lines += [part for block in chapter.facts for part in _block(block)]
        for section in chapter.sections:
            lines += _section(section, figures)
    return "\n".join([*lines, r"\end{document}", ""])


def _section(section: Section, figures: str) -> Iterator[str]:
    yield rf"\subsection{{{text(section.title)}}}"
    if section.missing:
        yield rf"\emph{{Not drawn: {text(section.missing)}.}}" + "\n"
    for block in section.blocks:
        if isinstance(block, Picture):
            path = f"{figures}/{section.file(block)}.pdf"
            yield r"\begin{center}"
            share = min(1.0, block.figure.get_figwidth() / WIDEST)
            size = rf"width={share:.2f}\linewidth,height=0.8\textheight,keepaspectratio"
            yield rf"\includegraphics[{size}]{{{path}}}"
            yield r"\end{center}"
        else:
            yield from _block(block)


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, Table):
        yield from _table(block)
    elif isinstance(block, Note):
        yield rf"{{\small {text(block.text)}}}" + "\n"
    elif isinstance(block, Markup):
        yield rf"{{\small {text(block.words)} (as a strip over the words on the page only)}}" + "\n"


def _table(table: Table) -> Iterator[str]:
    """One or more tables, each with the words on the left; columns of words without a word are left out."""
    words = [i for i in range(table.words) if any(row[i].text for row in table.rows)]
    numbers = list(range(table.words, len(table.columns)))
    for start in range(0, max(1, len(numbers)), ACROSS):
        yield from _part(table, words, numbers[start : start + ACROSS])


def _part(table: Table, words: Sequence[int], numbers: Sequence[int]) -> Iterator[str]:
    """Widths are shares of the line: what holds long words gets more."""
    each = 0.8 * 0.7 / max(1, len(numbers)) if numbers else 0.0
    left = 0.9 - each * len(numbers)
    weight = [_weight(table, i) for i in words]
    widths = [left * w / max(1, sum(weight)) for w in weight]
    columns = "".join(rf"W{{{w:.3f}\linewidth}}" for w in widths)
    columns += "".join(rf"N{{{each:.3f}\linewidth}}" for _ in numbers)
    yield rf"{{\footnotesize\begin{{longtable}}{{@{{}}{columns}@{{}}}}\toprule"
    chosen = [*words, *numbers]
    head = " & ".join(rf"\textbf{{{text(table.columns[i])}}}" for i in chosen)
    yield head + r" \\\midrule\endhead"
    for row in table.rows:
        yield (
            " & ".join(_entry(row[i], table.columns[i], i < table.words) for i in chosen) + r" \\"
        )
    yield r"\bottomrule\end{longtable}}"


def _weight(table: Table, column: int) -> int:
    """How wide a column of words wants to be, in characters."""
    longest = max([len(row[column].text) for row in table.rows] or [0])
    return min(40, max(8, len(table.columns[column]), longest))


def _entry(entry: Entry, column: str, words: bool) -> str:
    shown = text(entry.text, breaks=words)
    if column == "recipe" and shown:
        shown = rf"\texttt{{{shown}}}"
    return shown + (rf"\newline{{\scriptsize {text(entry.detail)}}}" if entry.detail else "")


def compiled(path: Path) -> tuple[Path | None, str]:
    """Build a text where it lies: the PDF, or why there is none."""
    tool = shutil.which("latexmk") or shutil.which("pdflatex")
    if tool is None or shutil.which("pdflatex") is None:
        return None, (
            f"{path} was written and not built: there is no pdflatex here (Debian: texlive-latex-base and "
            "texlive-latex-recommended)"
        )
    how = ["-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", path.name]
    runs = [[tool, "-pdf", *how]] if Path(tool).name == "latexmk" else [[tool, *how]] * 2
    for command in runs:
        try:
            done = subprocess.run(
                command, cwd=path.parent, capture_output=True, check=False, timeout=SECONDS,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None, f"{path} was not built within {SECONDS} seconds"
        if done.returncode:
            return None, f"{path} could not be built: {_complaint(path)}"
    return path.with_suffix(".pdf"), ""


def _complaint(path: Path) -> str:
    """The first error in TeX's log."""
    log = path.with_suffix(".log")
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return next((x for x in lines if x.startswith("!")), "see its log")
