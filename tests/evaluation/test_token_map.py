from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kvloom import CompressedCache
from kvloom.cli.main import app
from kvloom.core.recipe import Recipe
from kvloom.evaluation import analysis_rows, compare, texts, token_figures, token_map
from kvloom.evaluation.report import build
from kvloom.evaluation.report.kinds import tokens as kind
from kvloom.evaluation.token_map import DROPPED, MERGED, PACKED, SINK, TAIL
from kvloom.hf import load

LENGTH = 320


@pytest.fixture(scope="module")
def testbed() -> tuple[Any, Any, texts.Document]:
    model, tokenizer = compare.load_model("testbed", "float32", "cpu")
    return model, tokenizer, texts.load("stdlib", tokenizer, LENGTH)


def mapped(testbed: Any, recipe: str, budget: str | None = None, chunk: int = 64) -> Any:
    model, tokenizer, document = testbed
    return token_map.analyze(model, "testbed", tokenizer, recipe, budget, document, chunk)


def cache_of(testbed: Any, recipe: str, budget: str | None, chunk: int = 64) -> CompressedCache:
    """The same text through a cache that nobody looks into."""
    model, _, document = testbed
    cache = CompressedCache(model, recipe, budget, track_positions=True)
    with torch.inference_mode():
        for part in document.ids.split(chunk):
            load.forward(model, part[None], cache)
    return cache


RECIPES = [
    ("none", None),
    ("int4", None),
    ("snapkv | int4", "60%"),
    ("streaming_llm(sinks=4, recent=60) | lazy(every=32)", None),
    ("snapkv | ada | kivi(residual=32)", "70%"),
    ("mp_kvm(window_size=64)", None),
    ("h2o | mass_fold(weight='count')", "48tok"),
    ("h2o | cam", "48tok"),
    ("snapkv | d2o | int4", "50%"),
    ("streaming_llm(recent=48, positions='original') | mp_kvm(sample_stride=4)", None),
]


@pytest.mark.parametrize(("recipe", "budget"), RECIPES, ids=[r for r, _ in RECIPES])
def test_every_token_is_kept_merged_or_dropped_as_the_cache_counted(
    testbed: Any, recipe: str, budget: str | None
) -> None:
    row, tensors = mapped(testbed, recipe, budget)
    cache = cache_of(testbed, recipe, budget)
    stats = cache.stats()
    assert row.seen == LENGTH * 4 * 2 == row.kept + row.merged + row.dropped
    assert (row.merged, row.dropped) == (stats.merged, stats.evicted - stats.merged)
    assert row.kept == sum(int(x.store.stored.sum()) for x in cache.compressed)  # type: ignore[union-attr]
    tier = tensors["tier"]
    for index in range(4):
        for head, held in enumerate(cache.positions(index)[0]):
            found = (tier[index, head] > MERGED).nonzero().flatten().tolist()
            assert found == sorted(held)
    counts = [int((tier == t).sum()) for t in range(5)]
    assert counts[DROPPED] == row.dropped and counts[MERGED] == row.merged


def test_the_masses_of_a_counting_merger_add_up_to_the_tokens(testbed: Any) -> None:
    row, tensors = mapped(testbed, "h2o | mass_fold(weight='count')", "48tok")
    mass, tier = tensors["mass"], tensors["tier"]
    alive = (tier > DROPPED).sum(-1).float()  # merged ones live on in others
    torch.testing.assert_close(mass.sum(-1), alive, rtol=1e-4, atol=1e-2)
    assert bool((mass[tier <= MERGED] == 0).all()) and row.merged > 0
    assert max(x.heaviest for x in row.layers) == pytest.approx(float(mass.max()), abs=1e-3)


def test_centroids_stand_for_what_was_merged(testbed: Any) -> None:
    row, tensors = mapped(testbed, "mp_kvm(window_size=64)")
    cache = cache_of(testbed, "mp_kvm(window_size=64)", None)
    for i, layer in enumerate(cache.compressed):
        held = layer.store.centroids  # type: ignore[union-attr]
        n = held.longest  # type: ignore[union-attr]
        stand_for = held.meta["mass"][0, :, :n].exp().sum(-1)  # type: ignore[union-attr]
        merged = (tensors["tier"][i] == MERGED).sum(-1).float()
        torch.testing.assert_close(stand_for, merged, rtol=1e-4, atol=1e-2)
        assert row.layers[i].centroids == [n, n]


def test_tiers_and_bits_are_those_of_the_store(testbed: Any) -> None:
    row, tensors = mapped(testbed, "streaming_llm(sinks=4, recent=200) | int4")
    tier = tensors["tier"]
    assert bool((tier[:, :, :4] == SINK).all()) and bool((tier == PACKED).any())
    assert bool((tier[:, :, -1] == TAIL).all())
    layer = row.layers[0]
    assert layer.exact_bits == 32
    assert layer.key_bits == pytest.approx(
        4.5, abs=0.2
    )  # codes, and a scale and zero per 64 channels
    whole, _ = mapped(testbed, "streaming_llm(sinks=4, recent=200)")
    exact = cache_of(testbed, "streaming_llm(sinks=4, recent=200) | int4", None).stats()
    assert exact.avg_key_bits < 32 and whole.kept == row.kept
    mean = sum(
        (n_packed * row.layers[i].key_bits + (n_kept - n_packed) * 32) / n_kept
        for i in range(4)
        if (n_kept := int((tier[i] > MERGED).sum()))
        and (n_packed := int((tier[i] == PACKED).sum())) is not None
    ) / 4  # fmt: skip
    assert mean == pytest.approx(exact.avg_key_bits, rel=1e-3)


def test_the_chunks_do_not_change_the_map_of_a_window(testbed: Any) -> None:
    recipe = "streaming_llm(sinks=4, recent=60)"
    maps = [mapped(testbed, recipe, chunk=n)[1]["tier"] for n in (1, 64)]
    assert torch.equal(maps[0] > MERGED, maps[1] > MERGED)


def test_the_merger_is_left_as_it_was(testbed: Any) -> None:
    recipe = Recipe.parse("h2o | mass_fold(weight='count')")
    before = vars(recipe.merger).copy()
    mapped(testbed, str(recipe), "48tok")
    assert vars(recipe.merger) == before and "merge" not in vars(Recipe.parse(str(recipe)).merger)


def test_the_map_is_drawn_and_shown_over_its_words(testbed: Any, tmp_path: Path) -> None:
    row, tensors = mapped(testbed, "snapkv | d2o | int4", "50%")
    assert "".join(row.words).strip() and len(row.words) == LENGTH
    figure = token_figures.figure(row, tensors)
    image = figure.axes[0].images[0].get_array()
    assert image is not None and image.shape == (8, LENGTH)
    assert image.flatten().tolist() == tensors["tier"].flatten().tolist()
    html = kind.strip(row, tensors)
    assert html.count('title="token ') == LENGTH and html.count("data-tiers=") == 8
    folder = tmp_path / "map"
    analysis_rows.save(row, tensors, folder, token_map.NAME)
    back, held = token_map.load_map(folder)
    assert back.words == row.words and torch.equal(held["tier"], tensors["tier"])
    page = build.build([folder], tmp_path / "out").page.read_text(encoding="utf-8")
    assert 'class="tokens"' in page and page.count("<img") == 1


def test_the_command_writes_row_data_and_figure(tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    args = ["analyze", "tokens", "--recipe", "snapkv", "--budget", "48tok", "--length", "128", "--out", str(out), "--device", "cpu"]  # fmt: skip
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in out.iterdir()) == [
        "tokens.jsonl",
        "tokens.png",
        "tokens.safetensors",
    ]
    assert "128 tokens in 4 layers of 2 KV heads" in result.output
    drawn = (out / "tokens.png").read_bytes()
    again = CliRunner().invoke(app, ["analyze", "tokens", "--draw-only", str(out)])
    assert again.exit_code == 0 and (out / "tokens.png").read_bytes() == drawn
    refused = CliRunner().invoke(app, args)
    assert refused.exit_code == 2 and "--force" in refused.stderr
