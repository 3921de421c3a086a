from __future__ import annotations

import dataclasses

import pytest
from typer.testing import CliRunner, Result

from kvloom.cli.main import KINDS, app
from kvloom.core import registry


def kvloom(*args: str) -> Result:
    return CliRunner().invoke(app, list(args), catch_exceptions=False)


def test_list_names_every_policy_and_preset_with_its_kind() -> None:
    out = kvloom("list").output
    words = set(out.split())
    assert {cls.kind for cls in registry.policies().values()} <= words & set(KINDS)
    assert set(registry.policies()) | set(registry.presets()) <= words


@pytest.mark.parametrize("name", list(registry.policies()))
def test_show_states_every_parameter_and_its_default(name: str) -> None:
    result = kvloom("show", name)
    assert result.exit_code == 0
    table = [line.split() for line in result.output.splitlines()]
    for f in dataclasses.fields(registry.policies()[name]):
        assert any(row[:1] == [f.name] and repr(f.default) in " ".join(row) for row in table)


def test_the_baseline_is_listed_and_shown() -> None:
    assert "recompute" in kvloom("list").output.split()
    out = kvloom("show", "recompute").output
    assert "window" in out and "positions" in out and "required" in out and "500" in out
    assert "model(t_{i-W+1} .. t_i)" in out and "2309.17453" in out


def test_show_writes_out_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._PRESETS, "test_preset", "h2o | int4")
    assert kvloom("show", "test_preset").output == "test_preset = h2o | int4\n"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("show", "h3o"), ("'h3o'", "did you mean 'h2o'?")),
        (("show", "zzzzzz"), ("'zzzzzz'", "kvloom list")),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    args: tuple[str, ...], words: tuple[str, ...]
) -> None:
    result = kvloom(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words)
