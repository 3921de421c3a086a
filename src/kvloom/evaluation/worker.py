"""A process that measures cells for a runner: `python -m kvloom.evaluation.worker`.

One JSON object per line comes in, `{"spec": {...}, "known": [keys]}`, and one goes out, a `Finished`.
Whatever else is printed goes to standard error. It ends with its input, at once: a runner that was killed
leaves nobody behind who measures on beside the next one.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading

from kvloom.evaluation.cells import Workplace
from kvloom.evaluation.experiment import Spec


def main() -> None:
    """Answer every line of standard input."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library that prints must not break the protocol
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    place = Workplace()
    while True:
        asked = json.loads(lines.get())
        done = place.work(Spec(**asked["spec"]), frozenset(asked["known"]))
        answers.write(done.to_json() + "\n")
        answers.flush()


def _read(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
