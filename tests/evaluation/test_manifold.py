"""Where the keys of one head lie: what is recorded, projected and counted."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from kvloom import CompressedCache
from kvloom.evaluation import analysis, analysis_figures, analysis_rows, manifold, projection
from kvloom.evaluation.texts import Document
from kvloom.evaluation.topics import Labelled, alternate
from kvloom.hf.gradients import record
from kvloom.policies.merge.mp_kvm import MPKVM
from tests.evaluation.tiny import ByteTokenizer
from tests.models import build, tokens

RECIPE = "streaming_llm(sinks=2, positions='original') | mean_centroid"
N, KEPT = 60, 24
FP32 = torch.finfo(torch.float32).eps


def text(topics=1, n=N, passage=10):
    names = ["a", "b", "c"][:topics]
    return Labelled(Document("words", tokens(n)[0], ""), torch.arange(n) // passage % topics, names)


def case(recipe=RECIPE, budget=f"{KEPT}tok", layer=0, head=1, chunk=8, **kw):
    return analysis.prepare(build("llama"), "tiny", recipe, budget, text(**kw), layer, head, chunk)


# -- what is recorded ----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 8, 60])
def test_the_keys_are_the_models_own_before_rotation(chunk):
    """Layer 0 does not know of the cache, so its keys are those of a full cache, too."""
    observed = analysis.run(case(chunk=chunk))
    want = record(build("llama"), tokens(N)[0])[0].keys[1]
    assert observed.points.shape == want.shape
    # both round through the rotation, forth and back
    assert (observed.points - want).abs().max() <= 8 * FP32 * want.abs().max()


def test_what_left_is_what_the_centroids_stand_for():
    observed = analysis.run(case())
    setting = observed.setting
    assert int(observed.left.sum()) == setting.left == N - setting.exact
    assert sum(setting.masses) == pytest.approx(setting.left, rel=1e-4)
    assert not observed.left[:2].any() and not observed.left[-1]  # sinks and the newest
    mean = observed.points[observed.left].mean(0)
    assert (observed.state.keys[0] - mean).abs().max() <= 64 * FP32 * observed.points.abs().max()
    assert (setting.layer, setting.head, setting.chunk, setting.space) == (0, 1, 8, "pre-RoPE")
    assert setting.subject.budget == "24tok" and setting.text.tokens == N


def test_nearest_by_both_metrics():
    centroids = torch.tensor([[1.0, 0.0], [0.0, 10.0]])
    point = torch.tensor([[0.5, 1.0]])
    index, cosine = analysis.nearest(point, centroids, "cosine")
    assert index.tolist() == [1] and float(cosine) == pytest.approx(1 / 1.25**0.5)
    index, cosine = analysis.nearest(point, centroids, "euclidean")
    assert index.tolist() == [0] and float(cosine) == pytest.approx(0.5 / 1.25**0.5)


@pytest.mark.parametrize(("changes", "words"), [
    ({"recipe": "h2o"}, "recipe 'h2o' has no merger that keeps centroids.*mean_centroid"),
    ({"recipe": "h2o | mass_fold"}, "has no merger that keeps centroids"),
    ({"layer": 3}, "layer 3 is out of range: the model has layers 0 to 2"),
    ({"head": 2}, "head 2 is out of range: the model has KV heads 0 to 1"),
    ({"head": -1}, "head -1 is out of range"),
    ({"budget": None}, "budget"),
])  # fmt: skip
def test_bad_input_restates_itself(changes, words):
    with pytest.raises(ValueError, match=words):
        case(**changes)


def test_without_a_layer_it_is_the_middle_one():
    assert case(layer=None).layer == 1


def test_a_text_that_fits_is_too_short():
    with pytest.raises(ValueError, match=r"20 tokens is too short for recipe .* @ 24tok'"):
        analysis.run(case(n=20))


SHARED = "mp_kvm(window_size=20, max_centroids=5, per_head_clustering=False)"


@pytest.mark.parametrize("mean", [False, True])
def test_shared_clusters_are_told_apart_by_the_keys_of_all_heads(mean):
    recipe = SHARED.replace(")", f", head_mean={mean})")
    made = case(recipe=recipe, budget=None)
    row, tensors = manifold.analyze(made, ["pca"])
    setting = row.setting
    assert setting.compared == ("mean" if mean else "all heads")
    assert sum(setting.masses) == pytest.approx(setting.left, rel=1e-4)

    cache = CompressedCache(made.model, recipe)
    with torch.inference_mode():
        for chunk in tokens(N)[0].split(8):
            made.model(chunk[None], past_key_values=cache)
    held = cache.compressed[0].store.centroids.keys[0]
    points = record(build("llama"), tokens(N)[0])[0].keys
    both = [x.float().mean(0) if mean else torch.cat([x[0], x[1]], -1) for x in (points, held)]
    near, _ = analysis.nearest(*both, "cosine")
    alone, _ = analysis.nearest(points[1], held[1], "cosine")
    assert torch.equal(tensors["nearest"], near)
    assert not torch.equal(near, alone), "the head's own keys would have given the same"


def test_what_a_merger_drops_is_in_no_centroid():
    observed = analysis.run(case(recipe="mp_kvm(window_size=20, sample_stride=4)", budget=None))
    setting = observed.setting
    sampled = torch.arange(N) % 4 == 0
    assert torch.equal(observed.folded, observed.left & sampled)
    assert setting.dropped == int((observed.left & ~sampled).sum()) > 0
    assert sum(setting.masses) == pytest.approx(setting.left - setting.dropped, rel=1e-4)
    row, tensors = manifold.analyze(
        case(recipe="mp_kvm(window_size=20, sample_stride=4)", budget=None, topics=2), ["pca"]
    )
    folded = tensors["folded"]
    assert torch.equal(folded, observed.folded)
    assert row.purity == manifold.purity(tensors["nearest"][folded], tensors["topic"][folded])[0]


def test_a_merger_that_does_not_say_what_it_drops_is_refused(monkeypatch):
    monkeypatch.setattr(MPKVM, "takes", lambda self, losers: None)
    made = case(recipe="mp_kvm(window_size=20, sample_stride=4)", budget=None)
    with pytest.raises(ValueError, match=r"cannot be analysed.*stand for 9\.0 tokens.* 36 were"):
        analysis.run(made)


# -- planes --------------------------------------------------------------------------------------


def cloud(n=40, width=8, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def test_pca_of_a_plane_keeps_it():
    frame = torch.linalg.qr(cloud(8, 2)).Q.T
    flat = cloud(40, 2, seed=1) * torch.tensor([3.0, 1.0])
    keys = flat @ frame + 5
    places, plane = projection.project("pca", keys, keys.mean(0, keepdim=True), "cosine")
    assert plane.facts["explained_1"] + plane.facts["explained_2"] == pytest.approx(1)
    between = [torch.cdist(x.double(), x.double()) for x in (places[:40], flat)]
    assert (between[0] - between[1]).abs().max() < 32 * FP32 * keys.abs().max()
    assert places[40].abs().max() < 1e-5  # the mean
    variance = places[:40].var(0)
    assert variance[0] / variance.sum() == pytest.approx(plane.facts["explained_1"], rel=1e-4)


def test_tsne_places_centroids_among_their_keys():
    centres = torch.eye(8)[:3] * 20
    keys = (centres[:, None] + cloud(60).view(3, 20, 8)).flatten(0, 1)
    places, plane = projection.project("tsne", keys, centres, "euclidean")
    assert places.shape == (63, 2) and plane.facts["perplexity"] == pytest.approx(62 / 3)
    among = torch.cdist(places[60:], places[:60]).argmin(1) // 20
    assert among.tolist() == [0, 1, 2]
    again, _ = projection.project("tsne", keys, centres, "euclidean")
    assert torch.equal(places, again)


def test_a_missing_scikit_learn_is_named(monkeypatch):
    monkeypatch.setattr(projection.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"scikit-learn.*pip install 'kvloom\[analyze\]'"):
        projection.available()


def test_umap_is_a_third_plane_if_there_is_one(monkeypatch, tmp_path):
    class UMAP:
        def __init__(self, **given):
            assert given["metric"] == "cosine" and given["n_neighbors"] == 15

        def fit_transform(self, points):
            return points[:, :2]

    module = ModuleType("umap")
    module.__spec__ = ModuleSpec("umap", None)
    module.UMAP = UMAP
    monkeypatch.setitem(sys.modules, "umap", module)
    assert projection.available() == ["pca", "tsne", "umap"]
    row, tensors = manifold.analyze(case(), ["pca", "umap"])
    assert tensors["umap_keys"].shape == (N, 2) and tensors["umap_centroids"].shape == (1, 2)
    drawn = analysis_figures.draw_manifold(row, tensors, tmp_path)
    assert [p.name for p in drawn] == ["manifold.png"] and drawn[0].stat().st_size > 5000


# -- topics --------------------------------------------------------------------------------------


def test_purity_of_a_clustering_by_hand():
    nearest = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    topic = torch.tensor([0, 0, 1, 1, 1, 0, 1, 2])
    assert manifold.purity(nearest, topic) == (5 / 8, 4 / 8)
    assert manifold.purity(topic, topic) == (1, 4 / 8)
    assert manifold.purity(torch.zeros(8, dtype=torch.int64), topic) == (4 / 8, 4 / 8)


def test_transitions_by_hand():
    made = text(topics=2, n=16, passage=8)
    nearest = torch.tensor([3, 3, 3, 3, 3, 3, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    (found,) = manifold.transitions(nearest, made)
    assert (found.position, found.before, found.after, found.around) == (8, "a", "b", 4)
    assert found.shift == pytest.approx(0.5)  # 0 0 3 3 and 0 0 1 1
    assert [t.position for t in manifold.within(nearest, made)] == [4, 12]
    assert [t.shift for t in manifold.within(nearest, made)] == [0.5, 0.5]


def test_a_row_with_topics_adds_up_and_survives_the_disk(tmp_path):
    row, tensors = manifold.analyze(case(topics=3), ["pca"])
    assert [t.tokens for t in row.topics] == [20, 20, 20]
    assert row.purity == row.purity_of_one  # there is only one centroid
    assert [t.position for t in row.transitions] == [10, 20, 30, 40, 50]
    assert row.shift == row.shift_within == 0
    assert -1 <= row.similarity <= 1
    written = analysis_rows.save(row, tensors, tmp_path / "new", manifold.NAME)
    read, back = manifold.load(tmp_path / "new")
    assert read == written and read.data.startswith("sha256:")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_a_row_and_the_numbers_of_another_run_do_not_mix(tmp_path):
    for folder, layer in (("a", 0), ("b", 1)):
        row, tensors = manifold.analyze(case(layer=layer), ["pca"])
        analysis_rows.save(row, tensors, tmp_path / folder, manifold.NAME)
    (tmp_path / "a/manifold.safetensors").replace(tmp_path / "b/manifold.safetensors")
    with pytest.raises(ValueError, match=r"manifold\.safetensors .* is not what .* was made from"):
        manifold.load(tmp_path / "b")
    with pytest.raises(ValueError, match="holds no results of this analysis"):
        manifold.load(tmp_path / "c")


def test_texts_in_turn_go_on_where_they_stopped(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(chr(ord(name) + i % 20) for i in range(99)))
    names = [str(tmp_path / f"{name}.txt") for name in "ab"]
    made = alternate(names, ByteTokenizer(), 40, 10)
    assert made.topic.tolist() == ([0] * 10 + [1] * 10) * 2
    encode = ByteTokenizer()
    for i, name in enumerate(names):
        read = encode((tmp_path / name).read_text())["input_ids"]
        assert made.document.ids[made.topic == i].tolist() == read[:20]


@pytest.mark.parametrize(("names", "n", "words"), [
    (["code"], 40, "topics code: at least two different texts"),
    (["code", "code"], 40, "at least two different texts"),
    (["code", "lists"], 19, "19 tokens are too few for one passage of 10 of each of 2 topics"),
    (["code", "no/such.txt"], 40, "no such file"),
])  # fmt: skip
def test_topics_that_cannot_be(names, n, words):
    with pytest.raises(ValueError, match=words):
        alternate(names, ByteTokenizer(), n, 10)


def test_the_bundled_topics_are_there():
    made = alternate(["code", "reference", "lists"], ByteTokenizer(), 300, 50)
    assert torch.bincount(made.topic).tolist() == [100, 100, 100]
    assert len(made.document.ids) == 300
