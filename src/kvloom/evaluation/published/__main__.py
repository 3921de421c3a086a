"""`python -m kvloom.evaluation.published NAME ...`: the shell scripts among the published commands."""

from __future__ import annotations

import sys

from kvloom.evaluation.published import SCRIPTS, main

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in SCRIPTS:
        print(f"error: name one of {', '.join(SCRIPTS)}", file=sys.stderr)
        raise SystemExit(2)
    main(sys.argv[1], sys.argv[2:])
