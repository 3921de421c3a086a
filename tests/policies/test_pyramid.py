"""Layer budgets of PyramidKV, against the paper's own arithmetic; and uniform ones."""

from __future__ import annotations

import pytest
import torch

from kvloom import CompressedCache
from kvloom.policies.allocate.pyramid import Pyramid
from kvloom.policies.allocate.uniform import Uniform
from tests.models import build, tokens


def published(average, beta, layers):
    """`min_num`, `max_num` and `steps` of the authors' code, before it rounds."""
    least = average / beta
    most = 2 * average - least
    step = (most - least) / (layers - 1)
    return [most - layer * step for layer in range(layers)]


@pytest.mark.parametrize("beta", [1, 2.5, 20, 1000])
@pytest.mark.parametrize("layers", [2, 3, 32])
def test_budgets_are_the_published_ones(beta, layers):
    shares = Pyramid(beta).shares(layers, 4)
    assert shares.dtype == torch.float64
    want = torch.tensor(published(512, beta, layers), dtype=torch.float64)
    torch.testing.assert_close(shares * 512, want[:, None].expand(layers, 4))
    assert float(shares.mean()) == pytest.approx(1)


def test_one_layer_gets_everything():
    assert Pyramid().shares(1, 3).tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.parametrize("fmt", ["dense(unpaged=0)", "int4"])
@pytest.mark.parametrize(
    ("beta", "want"), [(20, [117, 60, 3]), (3, [100, 60, 20]), (1, [60, 60, 60])]
)
def test_layers_hold_their_budgets(beta, want, fmt):
    model = build("llama")
    cache = CompressedCache(
        model, f"h2o | pyramid(beta={beta}) | {fmt}", "60tok", track_positions=True
    )
    model(tokens(200), past_key_values=cache)
    for i in range(5):
        model(tokens(1, seed=i), past_key_values=cache)
        assert cache.nbytes <= cache.ceiling()
    kept = [[len(head) for head in cache.positions(layer)[0]] for layer in range(3)]
    assert kept == [[n, n] for n in want]


@pytest.mark.parametrize("budget", ["60tok", "40%", 60_000])
def test_uniform_is_what_happens_without_an_allocator(budget):
    kept = []
    for recipe in ("h2o | int4", "h2o | uniform | int4"):
        model = build("llama")
        cache = CompressedCache(model, recipe, budget, track_positions=True)
        model(tokens(300), past_key_values=cache)
        kept.append([cache.positions(layer) for layer in range(3)])
        assert cache.nbytes <= cache.ceiling()
    assert kept[0] == kept[1]
    assert torch.equal(Uniform().shares(3, 2), torch.ones(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("bad", [0.5, 0, -3, float("inf"), float("nan"), "x", None])
def test_bad_parameters_are_restated(bad):
    with pytest.raises(ValueError, match=r"pyramid\(beta=.*: beta must be a number of at least 1"):
        Pyramid(beta=bad)
