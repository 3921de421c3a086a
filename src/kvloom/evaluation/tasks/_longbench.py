"""LongBench's 16 English tasks: how each is answered and scored, and our own wording of their prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvloom.evaluation.tasks import scoring


@dataclass(frozen=True)
class Kind:
    """How a task is answered and scored.

    Attributes:
        metric: its name. score: of (generated, answer); None: classification, which needs the classes.
        new_tokens: of an answer at most. first_line: only this counts.
    """

    metric: str
    score: Callable[[str, str], float]
    new_tokens: int
    first_line: bool = False


def _classified(generated: str, answer: str) -> float:
    raise TypeError("a classification is scored with its classes")


def _f1(new_tokens: int, first_line: bool = False) -> Kind:
    return Kind("qa_f1", scoring.qa_f1, new_tokens, first_line)


def _rouge(new_tokens: int, first_line: bool = False) -> Kind:
    return Kind("rouge_l", scoring.rouge_l, new_tokens, first_line)


KINDS: dict[str, Kind] = {
    "narrativeqa": _f1(128),
    "qasper": _f1(128),
    "multifieldqa_en": _f1(64),
    "hotpotqa": _f1(32),
    "2wikimqa": _f1(32),
    "musique": _f1(32),
    "gov_report": _rouge(512),
    "qmsum": _rouge(512),
    "multi_news": _rouge(512),
    "trec": Kind("classification", _classified, 64, first_line=True),
    "triviaqa": _f1(32, first_line=True),
    "samsum": _rouge(128, first_line=True),
    "passage_count": Kind("count", scoring.count, 32),
    "passage_retrieval_en": Kind("retrieval", scoring.retrieval, 32),
    "lcc": Kind("code_similarity", scoring.code_similarity, 64),
    "repobench-p": Kind("code_similarity", scoring.code_similarity, 64),
}

_PASSAGES = (
    "The passages below hold the answer to a question. Reply with the answer alone.\n\n{context}\n\n"
    "By the passages above, answer this question, with the answer alone.\n\nQuestion: {input}\nAnswer:"
)
# "{context}" is compressed, with what stands before it; "{input}" is LongBench's field, empty for some
PROMPTS: dict[str, str] = {
    "narrativeqa": (
        "Below is a story, a novel or the script of a film; a question about it follows.\n\nStory: "
        "{context}\n\nAnswer the question about the story in as few words as will do, without an "
        "explanation.\n\nQuestion: {input}\n\nAnswer:"
    ),
    "qasper": (
        "Below is a scientific article; a question about it follows.\n\nArticle: {context}\n\nAnswer the "
        "question about the article in a phrase or a sentence, without an explanation. To a question of yes "
        'or no, reply "yes" or "no"; if the article does not tell, reply "unanswerable".\n\nQuestion: '
        "{input}\n\nAnswer:"
    ),
    "multifieldqa_en": (
        "Read this text; a question about it follows.\n\n{context}\n\nAnswer the question about the text "
        "briefly, with the answer alone.\n\nQuestion: {input}\nAnswer:"
    ),
    "hotpotqa": _PASSAGES,
    "2wikimqa": _PASSAGES,
    "musique": _PASSAGES,
    "gov_report": (
        "Below is a report of a government agency.\n\nReport:\n{context}\n\nSummarize the report on one "
        "page.\n\nSummary:"
    ),
    "qmsum": (
        "Below is the transcript of a meeting; a query about it follows.\n\nTranscript:\n{context}\n\nAnswer "
        "the query about the meeting in one or a few sentences.\n\nQuery: {input}\nAnswer:"
    ),
    "multi_news": (
        "Below are several news reports.\n\nNews:\n{context}\n\nSummarize all of them together on one page."
        "\n\nSummary:"
    ),
    "trec": "Say of what type a question is. Examples:\n\n{context}\n{input}",
    "triviaqa": (
        "Answer each question by its passage, with the answer alone. Examples:\n\n{context}\n\n{input}"
    ),
    "samsum": "Summarize each dialogue in a few short sentences. Examples:\n\n{context}\n\n{input}",
    "passage_count": (
        "Below are paragraphs from Wikipedia, some of which may be there more than once. How many different "
        "ones are there?\n\n{context}\n\nReply with the number of different paragraphs alone, each counted "
        "once.\n\nThe number is: "
    ),
    "passage_retrieval_en": (
        "Below are 30 paragraphs from Wikipedia. Which of them does an abstract belong to?\n\n{context}\n\n"
        'This is the abstract.\n\n{input}\n\nReply with the number of its paragraph, like "Paragraph 1" or '
        '"Paragraph 2".\n\nThe answer is: '
    ),
    "lcc": "Continue the code below.\n{context}Next line of code:\n",
    "repobench-p": "Continue the code below.\n{context}{input}Next line of code:\n",
}
