"""GSM8K: grade-school word problems, solved in words.

Source: Cobbe et al., "Training verifiers to solve math word problems" (arXiv:2110.14168). The problems are
read from where the user has them; wording and solved examples are our own. The last number of an answer
counts. What is compressed are the instruction and the solved examples: with few of them, little.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvloom.evaluation.tasks import _records, scoring
from kvloom.evaluation.tasks.base import Example, Measure, Task, parameter

INTRO = "Solve the problems step by step. End each solution with the words: The answer is, and the number.\n"
SOLVED = (
    ("A baker fills 4 trays with 12 rolls each and sells 30 of them. How many rolls are left?",
     "4 trays of 12 rolls are 4 * 12 = 48 rolls. After 30 are sold, 48 - 30 = 18 are left. The answer is 18."),
    ("Nora reads 15 pages a day. Her book has 240 pages, and she has read 60. How many days does she still need?",
     "240 - 60 = 180 pages are left. At 15 a day that takes 180 / 15 = 12 days. The answer is 12."),
    ("A shirt costs $25 and trousers cost twice as much. What do two shirts and one pair of trousers cost?",
     "The trousers cost 2 * 25 = 50 dollars, two shirts 2 * 25 = 50. Together 50 + 50 = 100. The answer is 100."),
    ("A tank holds 90 litres and is a third full. A pump adds 6 litres a minute. After how many minutes is it full?",
     "A third of 90 is 90 / 3 = 30 litres, so 90 - 30 = 60 are missing. 60 / 6 = 10 minutes. The answer is 10."),
    ("Of 40 pupils, 60% cycle to school and half of the others walk. How many walk?",
     "60% of 40 is 40 * 0.6 = 24. 40 - 24 = 16 do not cycle, and half of them is 16 / 2 = 8. The answer is 8."),
    ("Sam earns $9 an hour and $4 more for each hour after the eighth. What does he earn in 10 hours?",
     "10 hours bring 10 * 9 = 90 dollars. The 2 hours after the eighth bring 2 * 4 = 8 more, 90 + 8 = 98. "
     "The answer is 98."),
    ("Ivy has 3 boxes of 8 pencils. She gives 5 pencils to each of 4 friends. How many does she keep?",
     "3 boxes of 8 are 3 * 8 = 24 pencils. She gives away 4 * 5 = 20, and keeps 24 - 20 = 4. The answer is 4."),
    ("A train covers 150 km in 2 hours and then 90 km in one hour. What is its mean speed in km per hour?",
     "It covers 150 + 90 = 240 km in 2 + 1 = 3 hours. 240 / 3 = 80 km per hour. The answer is 80."),
)  # fmt: skip


@dataclass(frozen=True)
class Gsm8k(Task):
    """The test set, e.g. `gsm8k(path='test.jsonl', shots=8, examples=100)`.

    Attributes:
        path: a `.jsonl` (or `.xz`, `.gz`) of objects with `question` and `answer`, or a dataset of the hub
            (`"openai/gsm8k"`). shots: solved examples before each problem; 0: the instruction alone. With
            some, an answer ends with its line, as theirs do. new_tokens: of an answer at most. examples: how
            many; None: all. seed: of which, if not all.
    """

    name = "gsm8k"
    family = "gsm8k"
    metric = "last number"

    path: str
    shots: int = parameter(8, most=len(SOLVED))
    new_tokens: int = parameter(256, least=1)
    examples: int | None = parameter(None, least=1)
    seed: int = parameter(0, least=0)

    def make(self, measure: Measure, filler: str) -> list[Example]:
        """See `Task`."""
        local = _records.is_local(self.path)
        records = _records.read(self.path) if local else _records.hub(self.path, "main")
        shown = "".join(f"\nProblem: {q}\nSolution: {a}\n" for q, a in SOLVED[: self.shots])

        def example(record: _records.Record) -> Example:
            problem = str(_records.field(record, "question", self.path))
            answer = str(_records.field(record, "answer", self.path)).rpartition("####")[2].strip()
            if len(scoring.numbers(answer)) != 1:
                raise ValueError(
                    f"data {self.path!r}: an answer does not end with '#### ' and a number: {answer[-40:]!r}"
                )
            return Example(
                INTRO + shown, f"\nProblem: {problem}\nSolution:", (answer,), self.new_tokens,
                stop="line" if self.shots else None,
            )  # fmt: skip

        return _records.choose(records, self.examples, self.seed, example)

    def score(self, example: Example, generated: str) -> float:
        """See `Task`."""
        text = scoring.first_line(generated) if example.stop == "line" else generated
        said = scoring.numbers(text)
        return float(bool(said) and said[-1:] == scoring.numbers(example.answers[0]))
