"""Attention to centroids with and without mass, against what their tokens get in a full cache."""

from __future__ import annotations

import pytest
import torch

from kvloom import Budget, Recipe
from kvloom.core.attend import Call
from kvloom.core.plan import LayerPlan
from kvloom.core.store import LayerStore
from kvloom.evaluation import analysis, analysis_figures, analysis_rows, spectrum
from kvloom.evaluation.analysis import Recorder
from kvloom.evaluation.spectrum import Spectrograph
from kvloom.formats.dense import Dense
from kvloom.hf.rope import rope_of
from kvloom.positions import RopeSpec
from tests.evaluation.test_manifold import KEPT, RECIPE, N, case
from tests.models import build, tokens

FP32 = torch.finfo(torch.float32).eps
D = 8
STILL = RopeSpec(torch.zeros(D // 2), D)  # a rotation by nothing: positions do not matter


def layer():
    recipe = Recipe.parse("streaming_llm(sinks=0, positions='original') | mean_centroid")
    plan = LayerPlan(
        recipe, Budget.parse("17tok"), Dense(), 0, 1, 1, D, D, torch.float32, rope=STILL
    )
    return LayerStore(plan, torch.zeros(1, 1, 0, D), torch.zeros(1, 1, 0, D))


def feed(store, recorder, keys, query, start):
    positions = torch.arange(start, start + keys.shape[2])[None]
    call = Call(query, D**-0.5)
    if keys.shape[2] == 1:
        _, forward = store.forward_token(keys, keys, call, positions)
    else:
        _, forward = store.forward(keys, keys, call, None, positions)
    recorder(store, forward)
    store.commit(forward)


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("same", [24, 300])
def test_identical_members_get_what_they_would_get_in_a_full_cache(same, new):
    generator = torch.Generator().manual_seed(4)
    one = torch.randn(D, generator=generator).expand(1, 1, same, D)
    others = torch.randn(1, 1, 16 + new, D, generator=generator)
    query = torch.randn(1, 1, 2, new, D, generator=generator)
    store, graph = layer(), Spectrograph(0, 0, "cosine")
    recorder = Recorder(0, graph)
    first = torch.cat([one, others[:, :, :16]], 2)
    feed(store, recorder, first, torch.zeros(1, 1, 1, same + 16, D), 0)
    assert not graph.mass  # no centroid was there to be seen
    feed(store, recorder, others[:, :, 16:], query, same + 16)

    (with_mass,), (without,), (full,) = (graph.energy[kind] for kind in spectrum.KINDS)
    assert with_mass.shape == (2, new) and 0.01 < float(full.min()) < float(full.max()) < 0.99
    largest = float(query.norm(dim=-1).max() * first.norm(dim=-1).max())
    slack = 16 * FP32 * (largest + torch.tensor(float(same)).log())
    assert (with_mass - full).abs().max() <= slack
    odds = [x / (1 - x) for x in (with_mass, without)]
    assert (odds[0] / odds[1] / same - 1).abs().max() <= 2 * slack / float(full.min())
    assert (graph.weights["full"][0].sum() - full.mean()).abs() <= slack
    assert float(graph.mass[0]) == pytest.approx(same, rel=1e-4) and graph.biased


def brute(observed_at, recorder, queries, rope):
    """Energies of one forward from all keys of the run, in float64: with, without, full; `[4, G, Q]`,
    the largest logit last.
    """
    keys, left, start = recorder.points().double(), observed_at, len(recorder.points())
    start -= queries.shape[1]
    places = torch.arange(len(keys))
    turned = rope.rotate(keys, places).double()
    middle = rope.rotate(keys[left].mean(0)[None], places[left].double().mean()[None]).double()
    out = []
    for i in range(queries.shape[1]):
        q = queries[:, i].double() * keys.shape[1] ** -0.5
        logits = q @ turned[: start + i + 1].T
        seen = left[: start + i + 1]
        rest = logits[:, ~seen].logsumexp(-1)
        centroid = (q @ middle.T)[:, 0]
        log_mass = left.sum().double().log()
        out.append([torch.sigmoid(x - rest) for x in
                    (centroid + log_mass, centroid, logits[:, seen].logsumexp(-1))])  # fmt: skip
        out[-1].append(logits.abs().amax(-1))
    return [torch.stack(x, -1) for x in zip(*out, strict=True)]


@pytest.mark.parametrize("chunk", [1, 8])
@pytest.mark.parametrize("model_layer", [0, 2])
def test_a_models_layer_by_hand(chunk, model_layer):
    """Mean key at the mean position, log mass, exact keys: all worked out again from the keys."""
    made = case(chunk=chunk, layer=model_layer)
    graph, half, wanted = Spectrograph(1, N // 2, "cosine"), N // 2, []

    def see(recorder, store, forward):
        if int(forward.positions[0, -1]) >= half:
            left = analysis.left_out(len(recorder.keys()), analysis.state_of(store, 1))
            left[len(left) - forward.call.query.shape[3] :] = False
            rope = rope_of(made.model, model_layer)
            wanted.append(brute(left, recorder, forward.call.query[0, 1], rope))
        graph(recorder, store, forward)

    analysis.run(made, half, see)
    assert len(wanted) == len(graph.mass) == -(-half // chunk)
    largest = float(max(w[3].max() for w in wanted))
    for i, kind in enumerate(spectrum.KINDS):
        got, want = torch.cat(graph.energy[kind], -1), torch.cat([w[i] for w in wanted], -1)
        assert got.shape == want.shape == (2, half)
        # a logit is wrong by a few roundings of its size (rotation, mean, product), a share by a
        # quarter of the difference of two
        assert (got - want).abs().max() <= 8 * FP32 * largest


def test_the_full_energy_is_the_models_own_attention():
    """In layer 0, whose queries and keys no cache has changed, against transformers' own weights."""
    row, tensors = spectrum.analyze(case(chunk=1))
    with torch.inference_mode():
        weights = build("llama", attention="eager")(tokens(N), output_attentions=True).attentions[0]
    want = []
    for at in range(N // 2, N):
        gone = range(2, at - (KEPT - 1) + 2)  # 2 sinks, the query's own token and the newest before
        want.append(weights[0, 2:4, at, gone].sum(-1))
    assert (tensors["energy_full"] - torch.stack(want, -1)).abs().max() <= 100 * FP32
    assert row.queries == N // 2 and row.group == 2
    assert row.energy.full == pytest.approx(float(torch.stack(want).mean()), rel=1e-4)
    assert row.energy.with_mass > row.energy.without_mass > 0


def test_only_what_was_taken_in_counts_as_the_centroids_tokens():
    """The same, where only every fourth token was folded and the others are gone."""
    recipe = "mp_kvm(window_size=20, max_centroids=8, sample_stride=4)"
    row, tensors = spectrum.analyze(case(recipe=recipe, budget=None, chunk=1))
    with torch.inference_mode():
        weights = build("llama", attention="eager")(tokens(N), output_attentions=True).attentions[0]
    want = []
    for at in range(N // 2, N):
        gone = [p for p in range(4, at - 20) if p % 4 == 0]  # 4 sinks, a window of 20, the new one
        want.append(weights[0, 2:4, at, gone].sum(-1))
    assert (tensors["energy_full"] - torch.stack(want, -1)).abs().max() <= 100 * FP32
    assert row.setting.dropped == 27
    each, together = tensors["weight_full"].sum(), tensors["energy_full"].mean(0).sum()
    assert float(each) == pytest.approx(float(together), rel=1e-4)


def test_formats_and_other_heads_are_read_as_the_layer_holds_them():
    made = case(recipe=f"{RECIPE} | int8", budget="100tok", n=300, chunk=32, head=0)
    row, tensors = spectrum.analyze(made)
    exact, _ = spectrum.analyze(case(budget="100tok", n=300, chunk=32, head=0))
    assert made.recipe.format is not None
    for kind in spectrum.KINDS:
        assert ((tensors[f"energy_{kind}"] >= 0) & (tensors[f"energy_{kind}"] <= 1)).all()
    assert row.energy.full == pytest.approx(exact.energy.full, rel=1e-4)  # layer 0: the same keys
    assert row.energy.with_mass == pytest.approx(exact.energy.with_mass, rel=0.05)


def test_bins_by_hand():
    mass = torch.tensor([1.0, 1.0, 3.0, 3.9999998, 4.0, 17.0])
    weight = torch.tensor([1.0, 3.0, 5.0, 6.0, 8.0, 9.0])
    found = spectrum.bins(
        {"mass": mass, "weight_with": weight, "weight_without": weight * 2, "weight_full": -weight}
    )
    assert [(b.least, b.most, b.seen) for b in found] == [
        (1, 1, 2),
        (2, 3, 1),
        (4, 7, 2),
        (16, 31, 1),
    ]
    assert [b.with_mass for b in found] == [2, 5, 7, 9]
    assert [b.without_mass for b in found] == [4, 10, 14, 18]
    assert found[2].full == -7 and found[2].mass == pytest.approx(4.0)


def test_the_row_survives_the_disk_and_is_drawn(tmp_path):
    row, tensors = spectrum.analyze(case())
    written = analysis_rows.save(row, tensors, tmp_path, spectrum.NAME)
    read, back = spectrum.load(tmp_path)
    assert read == written
    (path,) = analysis_figures.draw_attention(read, back, tmp_path)
    assert path.name == "attention.png" and path.stat().st_size > 5000


def test_nothing_was_merged_when_the_queries_came():
    with pytest.raises(ValueError, match="26 tokens is too short"):
        spectrum.analyze(case(n=26, chunk=26))
