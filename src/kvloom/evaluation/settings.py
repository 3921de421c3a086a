"""Settings from the environment: `${NAME}` and `${NAME:-default}` in experiments, and `.env` files."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

_NAME = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


def load_dotenv(folder: Path) -> list[str]:
    """Set what `folder/.env` says and the environment does not; the names that were set."""
    from dotenv import dotenv_values

    set_now = []
    for name, value in dotenv_values(folder / ".env").items():
        if value is not None and name not in os.environ:
            os.environ[name] = value
            set_now.append(name)
    return set_now


def filled(value: Any) -> Any:
    """`value`, lists and tables included, with variables replaced in every text.

    A text that is one variable alone and reads as a whole number becomes one. Raises ValueError if a
    variable without a default is not set.
    """
    if isinstance(value, dict):
        return {k: filled(v) for k, v in value.items()}
    if isinstance(value, list):
        return [filled(v) for v in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    text = _NAME.sub(_value, value)
    return int(text) if _NAME.fullmatch(value) and text.isdecimal() else text


def _value(found: re.Match[str]) -> str:
    name, default = found.groups()
    value = os.environ.get(name, default)
    if value is None:
        raise ValueError(
            f"{found[0]}: {name} is not set; set it in the environment or in a .env file"
        )
    return value
