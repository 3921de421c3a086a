"""Calibration against sorting, loops and exact clustering; texts that may not be evaluated on."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from kvloom.evaluation import calibrate, disjoint
from kvloom.evaluation.calibrate import calibrate as run
from kvloom.evaluation.subjects import Cell, parse
from kvloom.formats import _levels, _ranges
from kvloom.formats._calibration import Calibration
from kvloom.hf.cache import CompressedCache
from kvloom.hf.gradients import record
from tests.evaluation.tiny import bench
from tests.models import build, tokens

BITS, SHARE = 3, 0.1
FACTS = {"text": "words", "model": "tiny"}


def samples(n=3, length=22):
    return tokens(n * length, seed=9).view(n, length)


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture(scope="module")
def recorded(model):
    return [record(model, ids, gradients=True) for ids in samples()]


@pytest.fixture(scope="module")
def made(model) -> Calibration:
    return run(model, samples(), BITS, SHARE, FACTS)


def gathered(recorded, name):
    """`[layers, H, N, D]`: a field of all samples without their first tokens."""
    layers = [[getattr(layer, name)[:, 1:] for layer in one] for one in recorded]
    return torch.stack([torch.cat(parts, 1) for parts in zip(*layers, strict=True)])


def test_key_ranges_leave_half_the_share_out_at_either_end(recorded, made):
    keys = gathered(recorded, "keys")
    layers, heads, n, width = keys.shape
    beyond = math.floor(SHARE / 2 * n)
    assert beyond == 3 and made.shape == (layers, heads, width) == (3, 2, 16)
    for layer in range(layers):
        for head in range(heads):
            for channel in range(width):
                ordered = sorted(keys[layer, head, :, channel].tolist())[beyond : n - beyond]
                offset = float(made.key_offset[layer, head, channel])
                scale = float(made.key_scale[layer, head, channel])
                assert offset == pytest.approx((ordered[0] + ordered[-1]) / 2, abs=2e-3)
                assert offset + scale == pytest.approx(ordered[-1], abs=4e-3)
                assert offset - scale == pytest.approx(ordered[0], abs=4e-3)


def weighted_error(levels, x, weights):
    return float((weights * (x[:, None] - levels[None]).abs().amin(1) ** 2).sum())


def numbers(recorded, made, part, layer):
    """Normalised numbers of a layer that are no outliers, ascending, and their weights."""
    x, grads = gathered(recorded, f"{part}s")[layer], gathered(recorded, f"{part}_grads")[layer]
    if part == "key":
        offset, scale = (y[layer].float()[:, None] for y in (made.key_offset, made.key_scale))
        x = (x - offset) / scale
        inside = x.abs() <= 1
    else:
        ranged = _ranges.of_values(x, SHARE)
        x, scale, inside = ranged.x, ranged.scale.float(), ~ranged.outlier
    weights = (grads * scale) ** 2
    order = x[inside].argsort()
    return x[inside][order].double(), weights[inside][order].double()


@pytest.mark.parametrize("part", ["key", "value"])
def test_levels_minimise_the_error_that_the_loss_feels(recorded, made, part):
    x, weights = numbers(recorded, made, part, 2)
    best = weighted_error(_levels.kmeans(x, weights, 1 << BITS), x, weights)
    levels = getattr(made, f"{part}_levels")[2].double()
    assert (levels.diff() > 0).all()
    error = weighted_error(levels, x, weights)  # from 1,024 bins
    assert best * 0.999 <= error <= best * 1.01
    even = torch.linspace(-1, 1, 1 << BITS, dtype=torch.float64)
    assert error < weighted_error(even, x, weights)


@pytest.mark.parametrize("part", ["key", "value"])
def test_q_norm_is_of_all_numbers_alike(recorded, made, part):
    x, _ = numbers(recorded, made, part, 1)
    plain, matched = (getattr(made, f"{part}_{n}")[1].double() for n in ("levels", "matched"))
    coded = matched[torch.bucketize(x, (plain[1:] + plain[:-1]) / 2)]
    assert float(coded.mean()) == pytest.approx(float(x.mean()), abs=3e-3)
    assert float(coded.std()) == pytest.approx(float(x.std()), rel=5e-3)


def test_the_file_holds_all_of_it(made, tmp_path):
    made.save(tmp_path / "c.safetensors")
    read = Calibration.load(tmp_path / "c.safetensors")
    assert read.facts == {**FACTS, "bits": "3", "outliers": "0.1"} == made.facts
    assert (read.bits, read.outliers, read.shape) == (BITS, SHARE, (3, 2, 16))
    for name in ("key_offset", "key_scale", "key_levels", "value_matched", "text_blocks"):
        assert torch.equal(getattr(read, name), getattr(made, name))
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_cache_stores_by_the_calibration_of_its_model(model, made, tmp_path):
    """The keys that pages hold are those that were calibrated: before rotation, layer by layer."""
    made.save(tmp_path / "c.safetensors")
    path, ids = str(tmp_path / "c.safetensors"), tokens(129, seed=4)
    cache = CompressedCache(model, f"kvquant(bits=3, outliers=0.1, calibration={path!r})")
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    for layer, exact in zip(cache.compressed, record(model, ids[0]), strict=True):
        keys, values = layer.store.pool.decode_all()
        for got, want in ((keys[0], exact.keys[:, 1:]), (values[0], exact.values[:, 1:])):
            assert got.shape == want.shape
            assert float((got - want).norm() / want.norm()) < 0.2


def test_progress_is_told_twice_a_sample(model):
    steps = []
    run(model, samples(2, 12), 2, 0.0, {}, steps.append)
    assert steps == [1] * 4


def test_outliers_of_nothing_take_the_whole_range(model, recorded):
    made = run(model, samples(), 4, 0.0, {})
    keys = gathered(recorded, "keys")
    reach = (made.key_offset + made.key_scale).float()
    torch.testing.assert_close(reach, keys.amax(2), rtol=4e-3, atol=4e-3)


def test_weights_that_vanish_are_refused():
    model = copy.deepcopy(build("llama"))
    torch.nn.init.zeros_(model.lm_head.weight)
    with pytest.raises(ValueError, match=r"layer 0: the Fisher .* keys sums to 0.0 in float32"):
        run(model, samples(), BITS, SHARE, {})


@pytest.mark.parametrize("shape", [(0, 40), (3, 2)])
def test_too_little_text(model, shape):
    with pytest.raises(ValueError, match=f"{shape[0]} samples of {shape[1]} tokens"):
        run(model, torch.zeros(shape, dtype=torch.long), 4, 0.01, {})


# -- texts ---------------------------------------------------------------------------------------


def test_blocks_are_64_tokens_and_found_at_any_place():
    ids = tokens(200, seed=3)[0]
    known = set(disjoint.blocks(ids).tolist())
    assert len(known) == 3
    shifted = torch.cat([tokens(17, seed=8)[0], ids[:64]])
    assert len(known & set(disjoint._hashes(shifted, 1))) == 1
    assert not known & set(disjoint._hashes(tokens(300, seed=11)[0], 1))
    assert torch.equal(disjoint.blocks(ids.view(4, 50)), disjoint.blocks(ids))


@pytest.fixture
def recipe(made, tmp_path) -> str:
    made.save(tmp_path / "c.safetensors")
    return f"kvquant(bits=3, outliers=0.1, calibration={str(tmp_path / 'c.safetensors')!r})"


def test_a_text_that_was_calibrated_on_is_refused(model, recipe):
    other, same = bench(model=model, tokens=100), bench(model=model, tokens=100)
    other.check([Cell(parse(recipe))])
    same.document.ids[10:76] = samples().flatten()
    with pytest.raises(
        ValueError, match=r"text 'words' cannot judge recipe 'kvquant.*: 1 stretches"
    ):
        same.check([Cell(parse("none")), Cell(parse(recipe))])
    same.check([Cell(parse("kvquant(bits=3)")), Cell(parse("recompute(window=20)"))])


def test_the_filler_of_retrieval_tasks_counts_as_text(model, recipe):
    made = bench(tasks=1, model=model)
    made.needles[0].context[:64] = samples().flatten()[:64]
    with pytest.raises(ValueError, match="calibrated on"):
        made.check([Cell(parse(recipe))])


def test_rows_name_the_file_by_its_content(model, recipe, tmp_path):
    cell = Cell(parse(recipe))
    assert str(tmp_path) in cell.facts.recipe and str(tmp_path) not in cell.facts.full
    assert "calibration='sha256:" in cell.facts.full
    with_it = bench(model=model)
    before = with_it.key(cell)
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes((tmp_path / "c.safetensors").read_bytes())
    assert with_it.key(Cell(parse(recipe.replace("c.safe", "moved.safe")))) == before
    run(model, samples(2), BITS, SHARE, {}).save(tmp_path / "c.safetensors")
    assert with_it.key(cell) != before
    (tmp_path / "c.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        with_it.check([cell])
    with pytest.raises(ValueError, match="cannot be read"):
        with_it.key(cell)


def test_bins_hold_what_was_put_in():
    histogram = calibrate._Histogram()
    x = torch.tensor([-1.0, -0.2, -0.2, 0.7, 1.0])
    histogram.add(x, torch.tensor([1.0, 2.0, 4.0, 0.0, 3.0]))
    count, total, weight, weighted = histogram.sums.sum(1).tolist()
    assert (count, weight) == (5, 10)
    assert (total, weighted) == pytest.approx((0.3, -1 - 0.4 - 0.8 + 3))
    assert int((histogram.sums[0] > 0).sum()) == 4
