"""Recipes as text and as objects; every refusal restates the text and names the rule."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import Lazy, Recipe
from kvloom.core import registry
from kvloom.formats.dense import Dense
from kvloom.formats.int4 import Int4
from kvloom.formats.int8 import Int8
from kvloom.policies.allocate.weighted import Weighted
from kvloom.policies.evict.h2o import H2O
from kvloom.policies.evict.streaming_llm import StreamingLLM
from kvloom.policies.merge.mean_centroid import MeanCentroid

REFUSED = [
    ("h3o | int4", "unknown method 'h3o'; did you mean 'h2o'?"),
    ("zzz", "unknown method 'zzz'"),
    ("none | int4", "unknown method 'none'"),
    ("h2o(recnt=0.5)", "h2o has no parameter 'recnt'; did you mean 'recent'? (it has: recent, sinks)"),
    ("int4(bits=2)", "int4 has no parameter 'bits' (it has: value_bits, "),
    ("h2o(0.5)", "write h2o's parameters as name=value"),
    ("h2o(*a)", "write h2o's parameters as name=value"),
    ("h2o(recent=half)", "recent of h2o must be a literal, not 'half'"),
    ("h2o(recent=open('x'))", "must be a literal, not \"open('x')\""),
    ("h2o(recent=1 - 0.5)", "must be a literal"),
    ("int4 | dense", "a recipe has one format, but this one has 'int4' and 'dense'"),
    ("h2o | streaming_llm", "a recipe has one scorer"),
    ("h2o | lazy(every=2) | lazy(every=3)", "a recipe has one schedule"),
    ("weighted(heads=(1, 2)) | int4", "weighted (allocator) acts on evicted entries, but nothing"),
    ("mean_centroid", "mean_centroid (merger) acts on evicted entries, but nothing"),
    ("lazy(every=4) | int4", "lazy(every=4) schedules eviction without a scorer"),
    ("h2o(recent=2)", "h2o(recent=2): recent must be within 0..1"),
    ("h2o(sinks=-1)", "h2o(sinks=-1): sinks must be"),
    ("streaming_llm(positions='no')", "positions: in_cache or original"),
    ("weighted(heads=()) | h2o", "heads must be a tuple of numbers above 0"),
    ("weighted(heads=(1.0, -2.0)) | h2o", "heads must be a tuple of numbers above 0"),
    ("", "is not a chain of policies"),
    ("h2o |", "is not a chain of policies"),
    ("h2o(", "is not a chain of policies"),
    ("h2o, int4", "is not a policy"),
    ("h2o & int4", "is not a policy"),
    ("'h2o'", "is not a policy"),
    ("h2o.score", "is not a policy"),
    ("h2o()()", "is not a policy"),
    ("[h2o]", "is not a policy"),
    ("lambda: h2o", "is not a policy"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "rule"), REFUSED)
def test_refusals_restate_the_text_and_name_the_rule(text, rule):
    with pytest.raises(ValueError, match=re.escape(rule)) as error:
        Recipe.parse(text)
    assert str(error.value).startswith(f"recipe {text!r}")


def test_text_is_never_evaluated(tmp_path):
    target = tmp_path / "made"
    for text in (
        f"h2o(recent=open({str(target)!r}, 'w'))",
        f"open({str(target)!r}, 'w')",
        f"h2o | open(file={str(target)!r}, mode='w')",
    ):
        with pytest.raises(ValueError, match="recipe"):
            Recipe.parse(text)
    assert not target.exists()


@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("none", Recipe()),
        ("  none ", Recipe()),
        ("int4", Recipe(format=Int4())),
        ("int4()", Recipe(format=Int4())),
        ("h2o(recent=0.25, sinks=3)|int4", Recipe(H2O(0.25, 3), format=Int4())),
        ("int4 | h2o", Recipe(H2O(), format=Int4())),
        ("(h2o | int4)", Recipe(H2O(), format=Int4())),
        ("dense(rope='pre')", Recipe(format=Dense("pre"))),
        (
            "h2o | lazy(every=64, slack=16) | weighted(heads=(1, 2)) | mean_centroid | int8",
            Recipe(H2O(), Weighted(heads=(1, 2)), MeanCentroid(), Int8(), Lazy(64, 16)),
        ),
        ("h2o | lazy", Recipe(H2O())),
        ("h2o | lazy(every=1)", Recipe(H2O())),
    ],
)
def test_parsing(text, recipe):
    assert Recipe.parse(text) == recipe
    assert Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize("name", sorted(registry.policies()))
def test_every_registered_policy_round_trips(name):
    policy = registry.policies()[name]()
    chain = policy if policy.kind in ("scorer", "format") else H2O() | policy
    recipe = Recipe.parse(chain)
    assert Recipe.parse(str(recipe)) == recipe
    assert str(policy) == name  # defaults are left out


scorers = st.one_of(
    st.builds(H2O, st.floats(0, 1), st.integers(0, 9)),
    st.builds(
        StreamingLLM,
        st.integers(0, 9),
        st.none() | st.integers(1, 999),
        st.sampled_from(["in_cache", "original"]),
    ),
)
weights = st.lists(st.floats(0.001, 1e6), min_size=1, max_size=3).map(tuple)
recipes = st.builds(
    Recipe,
    scorers,
    st.none() | st.builds(Weighted, weights, weights),
    st.none() | st.just(MeanCentroid()),
    st.sampled_from([None, Int4(), Int8(), Dense(), Dense("pre")]),
    st.builds(Lazy, st.integers(0, 99), st.integers(0, 99), st.just(0) | st.integers(99, 200)),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(recipes)
def test_text_and_objects_are_one(recipe):
    text = str(recipe)
    assert Recipe.parse(text) == recipe
    assert str(Recipe.parse(text)) == text
    assert hash(Recipe.parse(text)) == hash(recipe)
    assert Recipe.of(*reversed(recipe.policies)) == recipe
    first, *rest = recipe.policies  # the scorer leads
    chain = Recipe.of(first)
    for policy in rest:
        chain = chain | policy
    assert chain == recipe


def test_objects_chain_in_any_order():
    want = Recipe(H2O(), format=Int4(), schedule=Lazy(4))
    assert H2O() | Int4() | Lazy(4) == want
    assert Int4() | H2O() | Lazy(4) == want
    assert H2O() | Recipe(format=Int4()) | Lazy(4) == want
    assert Recipe() | Int4() == Recipe(format=Int4())
    assert Recipe.parse(Int4()) == Recipe(format=Int4())
    recipe = H2O() | Int4()
    assert Recipe.parse(recipe) is recipe


def test_a_schedule_first_needs_its_scorer_next_to_it():
    with pytest.raises(ValueError, match="schedules eviction without a scorer"):
        _ = Recipe() | Lazy(4)
    with pytest.raises(ValueError, match="schedules eviction without a scorer"):
        _ = Lazy(4) | H2O()


@pytest.mark.parametrize("other", ["int4", 3, None, H2O])
def test_only_policies_can_be_chained(other):
    with pytest.raises(TypeError, match="chain policies with"):
        _ = H2O() | other
    if not isinstance(other, str):
        with pytest.raises(TypeError, match="give text, a policy or a Recipe"):
            Recipe.parse(other)


def test_two_of_a_kind_as_objects():
    with pytest.raises(ValueError, match=r"one format.*'int4' and 'dense'"):
        _ = Int4() | Dense()


def test_what_a_recipe_needs_and_whether_it_evicts():
    assert Recipe.parse("h2o | int4").needs == {"attention_mass"}
    assert Recipe.parse("h2o | mean_centroid").needs == {
        "attention_mass", "pre_rope_keys", "positions",
    }  # fmt: skip
    assert not Recipe.parse("int4").needs
    assert Recipe.parse("h2o").evicts
    assert not Recipe.parse("int4").evicts
    assert not Recipe.parse("h2o | lazy(every=0)").evicts


# -- presets -------------------------------------------------------------------------------------


@pytest.fixture
def no_presets(monkeypatch):
    monkeypatch.setattr(registry, "_PRESETS", {})


@pytest.mark.usefixtures("no_presets")
def test_presets_are_names_for_recipes():
    registry.preset("small", "h2o(recent=0.25) | int4")
    assert Recipe.parse("small") == Recipe.parse(" small ") == H2O(0.25) | Int4()
    assert registry.presets() == {"small": "h2o(recent=0.25) | int4"}
    registry.preset("small", "h2o(recent=0.25) | int4")  # the same again is no clash
    with pytest.raises(ValueError, match="preset 'small' is already 'h2o"):
        registry.preset("small", "int4")


def test_registered_presets_parse():
    for name, text in registry.presets().items():
        assert Recipe.parse(name) == Recipe.parse(text)
