"""MP-KVM's `run_complete_experiment.py`: `--help`, and docs/from-the-papers.md."""

from kvloom.evaluation.published import main

if __name__ == "__main__":
    main(__file__)
