"""The published commands of four systems under their own names and flags, measured by the runner.

    python experiments/published/eval_streaming_llm.py --n-sink 4 --window-size 124 --quick

A command makes an experiment of its flags, runs it like any other (so a killed one goes on, and nothing is
measured twice), and writes the published files from its rows. `docs/from-the-papers.md` lists commands,
flags, files and variables, and what differs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from kvloom.evaluation import settings

SCRIPTS = {
    "run_complete_experiment": "mp_kvm",
    "run_phase_by_phase": "mp_kvm",
    "generate_paper_figures": "mp_kvm",
    "run_compression_experiment": "streaming_kvquant",
    "ablation_study": "streaming_kvquant",
    "hyperparameter_tuning": "streaming_kvquant",
    "baseline_test": "knormpress",
    "optimized_test": "knormpress",
    "visualize_results": "knormpress",
    "eval_streaming_llm": "streaming",
    "run_decode_perplexity": "streaming",
    "run_paper_quick_check": "streaming_paper",
    "run_paper_experiments": "streaming_paper",
    "compare_results": "streaming_paper",
    "generate_summary": "streaming_paper",
}


def main(script: str, argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        script: its name, or the path of a file of that name. argv: its arguments; None: the program's.

    Exits with status 2 and one line on wrong input, with 1 if cells failed.
    """
    settings.load_dotenv(Path.cwd())  # before transformers reads the environment
    name = Path(script).stem
    module = importlib.import_module(f"{__name__}.{SCRIPTS[name]}")
    try:
        failed = getattr(module, name)(argv)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    if failed:
        raise SystemExit(1)
