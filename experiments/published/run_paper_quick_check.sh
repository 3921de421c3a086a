#!/bin/sh
# Lazy StreamingLLM's `run_paper_quick_check.sh`: `--help`, and docs/from-the-papers.md.
[ -n "$PYTHON_BIN" ] || PYTHON_BIN=$(sed -n 's/^PYTHON_BIN=//p' .env 2>/dev/null | tail -n 1)
exec "${PYTHON_BIN:-python3}" -m kvloom.evaluation.published run_paper_quick_check "$@"
