"""How answers are scored, each 0 to 1.

What LongBench (arXiv:2308.14508) scores with comes out as its `metrics.py` has it, with the behaviour of the
packages that it calls: `rouge` 1.0.1, and `fuzzywuzzy` 0.18 with python-Levenshtein. No such package is
needed here.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from kvloom.testbed.tasks import answers

X = TypeVar("X")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"(?<![\d.])-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def exact(generated: str, answer: str) -> float:
    """Whether the answer comes first and does not run on."""
    return float(answers(generated, answer))


def contained(generated: str, wanted: Sequence[str]) -> float:
    """Share of the wanted strings that occur, whatever their case (RULER's `string_match_all`)."""
    said = generated.lower()
    return sum(w.lower() in said for w in wanted) / len(wanted)


def numbers(text: str) -> list[float]:
    """The numbers in a text, `"1,250.50"` as 1250.5; a minus behind a digit subtracts."""
    return [float(found.replace(",", "")) for found in _NUMBER.findall(text)]


def first_line(text: str) -> str:
    """The first line that is not empty."""
    return text.lstrip("\n").split("\n")[0]


# -- question answering --------------------------------------------------------------------------


def normalize(text: str) -> str:
    """SQuAD's: lower case, no ASCII punctuation, no articles, single spaces."""
    plain = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return " ".join(plain.split())


def qa_f1(generated: str, answer: str) -> float:
    """F1 of the words in common, as multisets, both normalized."""
    said, wanted = normalize(generated).split(), normalize(answer).split()
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


# -- summaries -----------------------------------------------------------------------------------


def rouge_l(generated: str, answer: str) -> float:
    """ROUGE-L F of summaries (Lin, "ROUGE", 2004), as the package `rouge` has it.

    Sentences end with a full stop; words are what spaces separate, case and punctuation included. Of the
    longest common subsequence of each pair of sentences the *distinct* words count: precision is their
    number / distinct words said, recall / distinct words of the answer.

    Deviation: the package fails on sentences of about a thousand words, which LongBench scores 0.
    """
    said, wanted = _sentences(generated), _sentences(answer)
    if not said or not wanted:
        return 0.0
    common = {word for w in wanted for s in said for word in _common(w, s)}
    precision = len(common) / len({word for s in said for word in s})
    recall = len(common) / len({word for w in wanted for word in w})
    return 2 * precision * recall / (precision + recall + 1e-8)


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(s.split()).split(" ") for s in text.split(".") if s]


def _common(x: Sequence[X], y: Sequence[X]) -> list[X]:
    """A longest common subsequence, last element first; of several, the one that `rouge` finds."""
    table = _lengths(x, y)
    i, j, found = len(x), len(y), []
    while i and j:
        if x[i - 1] == y[j - 1]:
            found.append(x[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def _lengths(x: Sequence[X], y: Sequence[X]) -> list[list[int]]:
    """`[i][j]`: length of the longest common subsequence of `x[:i]` and `y[:j]`."""
    table = [[0] * (len(y) + 1)]
    for a in x:
        above, row = table[-1], [0]
        for j, b in enumerate(y):
            row.append(above[j] + 1 if a == b else max(above[j + 1], row[j]))
        table.append(row)
    return table


# -- classes, numbers, code ----------------------------------------------------------------------


def classification(generated: str, answer: str, classes: Sequence[str]) -> float:
    """1 / number of classes that are named, if the answer is one of them.

    A class whose name is part of the answer's does not count; as in LongBench's loop, the one after a class
    left out so is never looked at.
    """
    named = [c for c in classes if c in generated]
    i = 0
    while i < len(named):
        if named[i] in answer and named[i] != answer:
            del named[i]
        i += 1
    return 1 / len(named) if answer in named else 0.0


def count(generated: str, answer: str) -> float:
    """Share of the numbers said that are the answer."""
    said = re.findall(r"\d+", generated)
    return said.count(answer) / len(said) if said else 0.0


def retrieval(generated: str, answer: str) -> float:
    """`count` of the number in an answer such as `"Paragraph 7"`."""
    return count(generated, re.findall(r"Paragraph (\d+)", answer)[0])


def code_similarity(generated: str, answer: str) -> float:
    """`fuzz.ratio` of the first line that is code: 2 LCS / characters of both, in whole per cent.

    A line with a backtick, `#` or `//` is no code. LongBench leaves it to what is installed how similar
    lines are: this is python-Levenshtein's way (and rapidfuzz's, which does not round); Python's `difflib`
    may find less in common.
    """
    lines = generated.lstrip("\n").split("\n")
    said = next((line for line in lines if not any(m in line for m in ("`", "#", "//"))), "")
    if said == answer:
        return 1.0
    common = _lengths(said, answer)[-1][-1]
    return round(200 * common / (len(said) + len(answer))) / 100
