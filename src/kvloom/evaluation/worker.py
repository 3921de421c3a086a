"""A process that measures cells for a runner: `python -m kvloom.evaluation.worker`.

One JSON object per line comes in, `{"spec": {...}, "known": [keys]}`, and one goes out, a `Finished`.
Whatever else is printed goes to standard error. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys

from kvloom.evaluation.cells import Workplace
from kvloom.evaluation.experiment import Spec


def main() -> None:
    """Answer every line of standard input."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library that prints must not break the protocol
    place = Workplace()
    for line in sys.stdin:
        asked = json.loads(line)
        done = place.work(Spec(**asked["spec"]), frozenset(asked["known"]))
        answers.write(done.to_json() + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
