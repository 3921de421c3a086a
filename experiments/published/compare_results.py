"""Lazy StreamingLLM's `compare_results.py`: `--help`, and docs/from-the-papers.md."""

from kvloom.evaluation.published import main

if __name__ == "__main__":
    main(__file__)
