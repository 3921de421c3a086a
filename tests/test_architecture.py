"""The shape of the package: who may import whom, what is forbidden, how large things may get."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "kvloom"
FILES = sorted(SOURCE.rglob("*.py"))

# What each room may import of kvloom, besides itself. Left out: `kvloom/__init__.py`, the facade,
# which no room may import. `core.registry` finds policies and formats by walking the packages at
# run time, so there is no import upward.
KERNELS = {"kernels", "positions"}
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "positions": set(),
    "core": KERNELS,
    "formats": KERNELS | {"core"},
    "policies": KERNELS | {"core", "formats"},
    "hf": KERNELS | {"core", "formats", "policies"},
    "testbed": set(),
    "evaluation": KERNELS | {"core", "formats", "policies", "hf", "testbed"},
    "cli": KERNELS | {"core", "formats", "policies", "hf", "testbed", "evaluation"},
}
TORCH_ONLY = {"kernels", "positions", "core", "formats", "policies"}
ALSO = {"formats": {"safetensors"}, "kernels": {"triton"}}  # calibrations; kernels for GPUs
MAY_IMPORT_TRANSFORMERS = ("hf/",)
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def room_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else ""


def imports(tree: ast.AST, path: Path) -> list[str]:
    """Full dotted names of all that a file imports, wherever it stands in the file."""
    found = []
    package = ("kvloom", *path.relative_to(SOURCE).parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def import_error(imported: str, path: Path) -> str | None:
    """The rule that this import breaks, or None."""
    room, parts = room_of(path), imported.split(".")
    top = parts[0]
    if top in UNSAFE_MODULES or imported == "torch.load":
        return f"{imported} runs code from data"
    if top == "kvloom":
        target = parts[1] if len(parts) > 1 else ""
        if room == "" or target == room:
            return None
        if target not in ALLOWED:
            return f"{room} imports the facade ({imported})"
        return None if target in ALLOWED[room] else f"{room} must not import {target}"
    if top == "transformers" and not name_of(path).startswith(MAY_IMPORT_TRANSFORMERS):
        return "only hf imports transformers"
    known = {"torch", *sys.stdlib_module_names, *ALSO.get(room, ())}
    if room in TORCH_ONLY and top not in known:
        return f"{room} needs nothing but torch and the standard library, not {top}"
    return None


def unsafe_call(node: ast.AST) -> str | None:
    if not isinstance(node, ast.Call):
        return None
    called = ast.unparse(node.func)
    return called if called in ("eval", "exec", "compile", "__import__", "torch.load") else None


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_flow_one_way(path: Path) -> None:
    assert room_of(path) in {"", *ALLOWED}, "a new room: say in ALLOWED what it may import"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    errors = [e for name in imports(tree, path) if (e := import_error(name, path))]
    assert errors == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_runs_code_from_data(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [f"line {n.lineno}: {c}" for n in ast.walk(tree) if (c := unsafe_call(n))]  # type: ignore[attr-defined]
    assert found == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.count("\n")
    one_method = room_of(path) in ("formats", "policies") and not path.name.startswith("_")
    assert lines < (120 if one_method else 450)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, functions):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 < 60, f"{node.name} is too long"


@pytest.mark.parametrize(
    ("room", "code", "rule"),
    [
        ("core", "from kvloom.hf.cache import CompressedCache", "core must not import hf"),
        ("core", "def f():\n    import transformers", "only hf imports transformers"),
        ("evaluation", "from transformers import AutoModel", "only hf imports transformers"),
        ("kernels", "from kvloom import core", "kernels must not import core"),
        ("kernels", "from ..core import block", "kernels must not import core"),
        ("hf", "from kvloom import CompressedCache", "hf imports the facade"),
        ("formats", "import numpy as np", "not numpy"),
        ("core", "import safetensors", "not safetensors"),
        ("formats", "from safetensors import safe_open", None),
        ("testbed", "import kvloom.hf", "testbed must not import hf"),
        ("hf", "from torch import load", "runs code from data"),
        ("cli", "import pickle", "runs code from data"),
        ("policies", "from kvloom.core.policy import Scorer", None),
        ("policies", "from kvloom.policies.evict import h2o", None),
        ("cli", "from kvloom import testbed", None),
        ("hf", "import transformers", None),
    ],
)
def test_the_rules_themselves(room: str, code: str, rule: str | None) -> None:
    path = SOURCE / room / "made_up.py"
    errors = [e for name in imports(ast.parse(code), path) if (e := import_error(name, path))]
    assert errors == [] if rule is None else len(errors) == 1 and rule in errors[0]


@pytest.mark.parametrize("code", ["eval('1')", "exec(x)", "torch.load(f)", "__import__(x)"])
def test_unsafe_calls_are_seen(code: str) -> None:
    assert any(unsafe_call(node) for node in ast.walk(ast.parse(code)))
    assert not any(unsafe_call(node) for node in ast.walk(ast.parse("model.eval()")))
