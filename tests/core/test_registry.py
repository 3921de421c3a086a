"""Discovery, registration by hand, and entry points of other packages."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest

from kvloom import Recipe
from kvloom.core import registry
from kvloom.core.policy import Policy, Scorer, camel_to_snake
from kvloom.formats.int4 import Int4
from kvloom.policies.evict.h2o import H2O


@dataclass(frozen=True)
class Foreign(Scorer):
    """Stands for a scorer of another package."""

    name: ClassVar[str] = "foreign_for_tests"
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    size: int = 3


@dataclass(frozen=True)
class Impostor(Scorer):
    """Takes a name that is taken."""

    name: ClassVar[str] = "h2o"


def entry(cls):
    return SimpleNamespace(load=lambda: cls, name="x")


@pytest.fixture
def clean():
    """A registry of its own, so that nothing leaks into other tests."""
    before = dict(registry._discover())
    yield
    registry._discover().clear()
    registry._discover().update(before)


def test_own_files_are_found_by_name():
    found = registry.policies()
    assert found["h2o"] is H2O
    assert found["int4"] is Int4
    assert list(found) == sorted(found)
    kinds = ("scorer", "allocator", "merger", "format", "schedule")
    parts = [registry.policies(kind) for kind in kinds]
    assert all(parts)
    assert {n: c for part in parts for n, c in part.items()} == found
    assert all(cls.kind == kind for kind in kinds for cls in registry.policies(kind).values())
    assert all(cls.name == name for name, cls in found.items())


def test_base_classes_are_not_methods():
    assert not {"policy", "scorer", "allocator", "merger", "page_format"} & set(registry.policies())


def test_the_answer_is_a_copy():
    registry.policies().clear()
    assert registry.policies()


@pytest.mark.usefixtures("clean")
def test_register_by_hand():
    assert "foreign_for_tests" not in registry.policies()
    assert registry.register(Foreign) is Foreign
    assert registry.register(Foreign) is Foreign  # again is no clash
    assert registry.policies("scorer")["foreign_for_tests"] is Foreign
    assert Recipe.parse("foreign_for_tests(size=5)").scorer == Foreign(5)
    assert str(Recipe.parse("foreign_for_tests(size=5)")) == "foreign_for_tests(size=5)"


@pytest.mark.usefixtures("clean")
def test_one_name_one_class():
    with pytest.raises(ValueError, match="two policies are called 'h2o'"):
        registry.register(Impostor)
    assert registry.policies()["h2o"] is H2O


def discover_with(monkeypatch, *classes):
    asked = []

    def entry_points(group):
        asked.append(group)
        return [entry(cls) for cls in classes]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    found = registry._discover.__wrapped__()
    assert asked == ["kvloom.policies"]
    return found


def test_entry_points_add_methods(monkeypatch):
    found = discover_with(monkeypatch, Foreign)
    assert found["foreign_for_tests"] is Foreign
    assert found["h2o"] is H2O


def test_an_entry_point_may_not_take_a_name(monkeypatch):
    with pytest.raises(ValueError, match="two policies are called 'h2o'"):
        discover_with(monkeypatch, Impostor)


@pytest.mark.parametrize("thing", [dict, 3, H2O()])
def test_an_entry_point_must_be_a_policy_class(monkeypatch, thing):
    with pytest.raises(TypeError, match=r"entry point of 'kvloom.policies' is .* not a Policy"):
        discover_with(monkeypatch, thing)


def test_an_entry_point_to_an_own_class_is_no_clash(monkeypatch):
    assert discover_with(monkeypatch, H2O)["h2o"] is H2O


@pytest.mark.parametrize(
    ("camel", "snake"),
    [("StreamingLLM", "streaming_llm"), ("H2O", "h2o"), ("Int4", "int4"), ("MeanCentroid", "mean_centroid"),
     ("Lazy", "lazy"), ("PageFormat", "page_format")],
)  # fmt: skip
def test_names_come_from_class_names(camel, snake):
    assert camel_to_snake(camel) == snake


def test_unknown_needs_are_refused_when_the_class_is_made():
    with pytest.raises(TypeError, match=r"Greedy.needs has \['everything'\]; known: .*'keys'"):

        class Greedy(Policy):
            needs: ClassVar[frozenset[str]] = frozenset({"everything"})
