"""One small language model that kvloom trained itself, and texts and tasks to measure it on.

    model = AutoModelForCausalLM.from_pretrained(kvloom.testbed.path())

``weights/MODEL_CARD.md`` says what it was trained on, what it can do and what it cannot.
"""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def path() -> Path:
    """The folder that ``from_pretrained`` loads model and tokenizer from.

    Raises FileNotFoundError if the weights are missing.
    """
    missing = [n for n in ("config.json", "model.safetensors") if not (WEIGHTS / n).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the testbed model is incomplete: {WEIGHTS} lacks {', '.join(missing)}; "
            "reinstall kvloom, or make the weights with training/ (see training/README.md)"
        )
    return WEIGHTS
