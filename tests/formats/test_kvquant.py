"""KVQuant against the paper's equations in loops, one number at a time."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics

import pytest
import torch

from kvloom.core.format import PAGE, PageBatch, Place
from kvloom.core.policy import Policy
from kvloom.formats import _levels, _ranges, _sparse
from kvloom.formats._calibration import Calibration
from kvloom.formats.kvquant import KVQuant
from kvloom.hf.cache import CompressedCache
from kvloom.kernels.layout import TILE
from tests.core.test_pages import D as POOL_D
from tests.core.test_pages import Model
from tests.formats.reading import Cell, place_of, stored_page
from tests.models import build

D, E, HEADS = 20, 24, 2


def sorted_levels(*shape, seed):
    drawn = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return drawn.sort(-1).values


def made_up(layers=1, heads=HEADS, width=D, bits=4, share=0.01, seed=0) -> Calibration:
    """Ranges and levels of no model at all."""
    generator = torch.Generator().manual_seed(seed)
    offset = torch.randn(layers, heads, width, generator=generator).half()
    scale = (torch.rand(layers, heads, width, generator=generator) + 1.5).half()
    books = [sorted_levels(layers, 1 << bits, seed=seed + i) for i in range(4)]
    blocks = torch.arange(3)
    return Calibration(offset, scale, *books, blocks, {"bits": str(bits), "outliers": str(share)})


def saved(path, **given) -> str:
    made_up(**given).save(path)
    return str(path)


def pages(n=2, seed=1, key_dim=D, value_dim=E):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, PAGE, key_dim, generator=generator)
    values = torch.randn(n, PAGE, value_dim, generator=generator)
    keys[..., 3] = keys[..., 3] * 30 + 7  # a channel of its own kind
    keys[0, 5, 1], values[0, 9, 2], values[-1, 40, 0] = 50.0, -40.0, 25.0
    return keys, values


# -- the paper's arithmetic, in loops ------------------------------------------------------------


def one_page(fmt, keys, values):
    """What a page reads back as, `[64, D]` and `[64, E]`."""
    read = Cell(fmt, place_of(D, E)).read(keys, values)
    return read[0][0], read[1][0]


def half(x: float) -> float:
    return float(torch.tensor(x).half())


def low_median(numbers):
    return statistics.median_low(numbers)


def nearest(x, levels, read):
    best = min(range(len(levels)), key=lambda i: abs(x - levels[i]))
    return read[best]


def span(numbers):
    offset = half((min(numbers) + max(numbers)) / 2)
    return offset, half(max(max(numbers) - offset, offset - min(numbers), 1e-7))


def amount(share, of):
    return 0 if share == 0 else min(of - 1, max(1, round(share * of)))


def furthest(distances, n):
    """Keys of the n largest of a dict."""
    return set(sorted(distances, key=lambda place: -distances[place])[:n])


def naive_keys(page, share, levels, read, ranges=None):
    """A page's keys as they read back."""
    x, width = page.tolist(), page.shape[1]
    columns = [[row[c] for row in x] for c in range(width)]
    centres = [low_median(column) for column in columns]
    distance = {}
    for t, c in itertools.product(range(PAGE), range(width)):
        if ranges:
            distance[t, c] = abs(x[t][c] - ranges[0][c]) / ranges[1][c]
        else:
            spread = sum(abs(v - centres[c]) for v in columns[c]) / PAGE
            distance[t, c] = abs(x[t][c] - centres[c]) / spread
    exact = set()
    for first in (0, TILE):
        tile = {p: d for p, d in distance.items() if first <= p[0] < first + TILE}
        exact |= furthest(tile, amount(share, TILE * width))
    out = torch.zeros_like(page)
    for c in range(width):
        inside = [x[t][c] for t in range(PAGE) if (t, c) not in exact]
        offset, scale = (ranges[0][c], ranges[1][c]) if ranges else span(inside)
        for t in range(PAGE):
            coded = offset + scale * nearest((x[t][c] - offset) / scale, levels, read)
            out[t, c] = half(x[t][c]) if (t, c) in exact else coded
    return out


def naive_values(page, share, levels, read):
    out = torch.zeros_like(page)
    for t, token in enumerate(page.tolist()):
        centre = low_median(token)
        distance = {c: abs(v - centre) for c, v in enumerate(token)}
        exact = furthest(distance, amount(share, len(token)))
        offset, scale = span([v for c, v in enumerate(token) if c not in exact])
        for c, v in enumerate(token):
            coded = offset + scale * nearest((v - offset) / scale, levels, read)
            out[t, c] = half(v) if c in exact else coded
    return out


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    ("bits", "share", "q_norm"),
    [(4, 0.01, None), (3, 0, None), (2, 0.05, None), (2, 0.01, False), (3, 0.01, True)],
)
def test_pages_read_back_as_the_paper_says(tmp_path, calibrated, bits, share, q_norm):
    path = saved(tmp_path / "c.safetensors", bits=bits, share=share) if calibrated else None
    fmt = KVQuant(bits, share, path, q_norm)
    found, ranges = (made_up(bits=bits, share=share), None) if calibrated else (None, None)
    books = found.levels(0) if found else [_levels.normal(bits)] * 2
    matched = bits == 2 if q_norm is None else q_norm
    (key_levels, key_read), (value_levels, value_read) = (
        (plain.tolist(), (normed if matched else plain).tolist()) for plain, normed in books
    )
    keys, values = pages()
    for head in range(HEADS):
        read = Cell(fmt, place_of(D, E, HEADS), head).read(keys, values)
        if found:
            ranges = (found.key_offset[0, head].tolist(), found.key_scale[0, head].tolist())
        for page, (k, v) in enumerate(zip(*read, strict=True)):
            want = naive_keys(keys[page], share, key_levels, key_read, ranges)
            torch.testing.assert_close(k, want, rtol=1e-5, atol=1e-5)
            want = naive_values(values[page], share, value_levels, value_read)
            torch.testing.assert_close(v, want, rtol=1e-5, atol=1e-5)


# -- outliers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outliers_of_16_bit_models_are_exact_and_cost_others_nothing(dtype):
    keys, values = (x.to(dtype) for x in pages(1))
    calm = one_page(KVQuant(3), keys, values)
    keys[0, 50, 2] = values[0, 50, 4] = 1e4
    got = one_page(KVQuant(3), keys, values)
    assert got[0][50, 2] == keys[0, 50, 2] and got[1][50, 4] == values[0, 50, 4]
    others = torch.arange(PAGE) != 50
    assert torch.equal(got[1][others], calm[1][others])
    error, before = ((g[others] - keys[0, others]).abs().max() for g in (got[0], calm[0]))
    assert error <= 1.5 * before  # one outlier that was stored exactly gave way


def test_outliers_are_counted_by_tile():
    keys, values = pages(1)
    for share, want in ((0.05, [[[32 + 32 * 1] * 2]]), (0, None)):
        cell = Cell(KVQuant(outliers=share), place_of(D, E))
        stored = stored_page(cell.encode(keys, values), 0, cell.tables, (D, E))
        found = cell.fmt.outlier_counts(stored)
        assert found is want if want is None else found.tolist() == want


def test_as_many_outliers_as_asked_and_never_all():
    assert [_sparse.count(0.01, n) for n in (64, 128, 256, 2048, 4096)] == [1, 1, 3, 20, 41]
    assert _sparse.count(0, 128) == 0
    assert [_sparse.count(0.4, n) for n in (1, 2, 3)] == [0, 1, 1]


def test_numbers_beyond_fp16_stay_finite_and_local():
    keys, values = (x.bfloat16() for x in pages(1))
    keys[0, 5, 1], values[0, 9, 2] = 1e30, -1e30
    keys[0, 6:9, 1] = 1e30  # more than are stored exactly
    got_keys, got_values = one_page(KVQuant(2), keys, values)
    assert torch.isfinite(got_keys).all() and torch.isfinite(got_values).all()
    assert got_values[9, 2] == values[0, 9, 2]


def test_constant_channels_and_zeros():
    keys, values = pages(1)
    keys[..., 4], values[:, :7] = 1e4, 0.0
    got_keys, got_values = one_page(KVQuant(2), keys, values)
    assert (got_keys[:, 4] - 1e4).abs().max() <= 4.0  # half a step of fp16 at 1e4
    assert got_values[:7].abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [D, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_error_is_half_a_gap_of_levels(bits, width, dtype):
    keys, values = (x.to(dtype) for x in pages(1, key_dim=width, value_dim=width))
    levels, _ = _levels.normal(bits)
    ends = 1 - float(levels[-1]), 1 + float(levels[0])
    gap = (
        max(float(levels.diff().max() / 2), *ends) + 2.0**-11
    )  # rounded scales fall short of the ends
    got = Cell(KVQuant(bits, q_norm=False), place_of(width, width)).read(keys, values)
    ranges = (_ranges.of_keys(keys, 0.01), _ranges.of_values(values, 0.01))
    for ranged, x, back in zip(ranges, (keys[0], values[0]), got, strict=True):
        cast = torch.finfo(dtype).eps / 2 * back[0].float().abs()
        allowed = gap * ranged.scale[0].float() + 1e-5 + cast
        inside = ~ranged.outlier[0]
        assert ((back[0].float() - x.float()).abs() <= allowed)[inside].all()
        exact = x[~inside] if dtype != torch.float32 else x[~inside].half().float()
        assert torch.equal(back[0][~inside], exact)


# -- levels --------------------------------------------------------------------------------------


def best_split(points, weights, count):
    """The least weighted error over every way to cut sorted points into `count` runs."""
    best = (math.inf, [])
    for cuts in itertools.combinations(range(1, len(points)), count - 1):
        edges, error, levels = [0, *cuts, len(points)], 0.0, []
        for a, b in itertools.pairwise(edges):
            mass = sum(weights[a:b])
            mean = sum(w * x for w, x in zip(weights[a:b], points[a:b], strict=True)) / mass
            levels.append(mean)
            run = zip(weights[a:b], points[a:b], strict=True)
            error += sum(w * (x - mean) ** 2 for w, x in run)
        best = min(best, (error, levels))
    return best[1]


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_kmeans_is_the_optimum(count, seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(11, generator=generator).sort().values
    weights = torch.rand(11, generator=generator) ** 4
    want = best_split(points.double().tolist(), weights.double().tolist(), count)
    assert _levels.kmeans(points, weights, count).tolist() == pytest.approx(want, abs=1e-9)


def test_kmeans_leaves_out_points_without_weight_and_repeats_levels_if_points_are_few():
    points = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    weights = torch.tensor([1.0, 0.0, 3.0, 0.0, 2.0])
    assert _levels.kmeans(points, weights, 4).tolist() == [-1, 0, 1, 1]
    assert _levels.kmeans(points, weights, 2).tolist() == pytest.approx([-0.25, 1])
    assert _levels.kmeans(points, torch.zeros(5), 4).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_q_norm_matches_mean_and_deviation(bits):
    generator = torch.Generator().manual_seed(bits)
    points = torch.rand(200, generator=generator).sort().values * 2 - 1
    counts = torch.randint(1, 9, (200,), generator=generator)
    levels = _levels.kmeans(points, counts, 1 << bits)
    read = _levels.matched(levels, points, counts).tolist()
    x = [v for v, n in zip(points.tolist(), counts.tolist(), strict=True) for _ in range(n)]
    coded = [nearest(v, levels.tolist(), read) for v in x]
    assert statistics.fmean(coded) == pytest.approx(statistics.fmean(x), abs=1e-9)
    assert statistics.pstdev(coded) == pytest.approx(statistics.pstdev(x), rel=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_levels_are_the_means_of_their_cells(bits):
    levels, _ = _levels.normal(bits)
    assert len(levels) == 1 << bits
    torch.testing.assert_close(levels, -levels.flip(0), atol=1e-3, rtol=0)
    edges = [-1.0, *_levels.between(levels).tolist(), 1.0]
    sigma = _levels.NORMAL_SPREAD
    for level, (a, b) in zip(levels.tolist(), itertools.pairwise(edges), strict=True):
        steps = [a + (b - a) * (i + 0.5) / 500 for i in range(500)]
        weights = [math.exp(-((x / sigma) ** 2) / 2) for x in steps]
        mean = sum(w * x for w, x in zip(weights, steps, strict=True)) / sum(weights)
        assert level == pytest.approx(mean, abs=2e-3)


# -- bytes, and what a format promises -----------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "share", "key", "value"),
    [
        (4, 0.01, 4 + 8 * 41 * 4 / (32 * 128), 4 + 8 * (4 + 3) / 128),
        (3, 0, 3, 3 + 8 * 4 / 128),
        (2, 0.01, 2 + 8 * 41 * 4 / (32 * 128), 2 + 8 * (4 + 3) / 128),
    ],
)
def test_bits_with_all_metadata(bits, share, key, value):
    """Calibrated, at head_dim 128: the paper counts 4.33 bits for nuq4 with 1 % of outliers."""
    layout = KVQuant(bits, share, "c").layout(128, 128, torch.float16)
    assert (layout.bits("key", 128), layout.bits("value", 128)) == (key, value)
    own = KVQuant(bits, share).layout(128, 128, torch.float16)
    assert own.bits("key", 128) == key + 0.5


def test_entries_move_only_if_they_share_nothing():
    assert [f.movable for f in (KVQuant(), KVQuant(outliers=0), KVQuant(calibration="c"))] == [
        False, False, False,
    ]  # fmt: skip
    assert KVQuant(outliers=0, calibration="c").movable
    assert KVQuant().pre_rope and KVQuant().pinned == 1


@pytest.mark.parametrize("share", [0, 0.01])
def test_calibrated_pages_survive_eviction_and_compaction(tmp_path, share):
    path = saved(tmp_path / "c.safetensors", width=POOL_D, share=share)
    model = Model(KVQuant(4, share, path), 2, HEADS)
    model.seal([[3, 1], [2, 3]])
    dice = torch.Generator().manual_seed(3)
    for _ in range(3):
        lost = [
            [{e.name for e in model.live(b, h) if float(torch.rand(1, generator=dice)) < 0.3}
             for h in range(HEADS)] for b in range(2)
        ]  # fmt: skip
        model.evict(lost)
        model.compact()
        model.check()
    model.seal([[1, 1], [1, 1]])
    model.check()


@pytest.mark.parametrize("share", [0, 0.01])
def test_eviction_keeps_as_many_as_it_may_only_where_entries_move(tmp_path, share):
    path = saved(tmp_path / "c.safetensors", layers=3, heads=2, width=16, share=share)
    model, ids = build("llama"), torch.arange(2, 82).repeat(3)[None]
    cache = CompressedCache(
        model, f"h2o | kvquant(outliers={share}, calibration={path!r})", "150tok"
    )
    with torch.inference_mode():
        for chunk in ids.split(60, 1):
            model(chunk, past_key_values=cache)
            assert cache.nbytes <= cache.ceiling()
    kept = torch.stack([layer.store.stored for layer in cache.compressed])
    assert (kept == 150).all() if not share else ((kept >= 150 - 31) & (kept <= 150)).all()


def test_heads_have_their_own_ranges(tmp_path):
    """A batch of pages of both heads equals the heads one by one."""
    fmt = KVQuant(4, 0.01, saved(tmp_path / "c.safetensors"))
    place, (keys, values) = place_of(D, E, HEADS), pages(4)
    tables = fmt.tables(place, torch.device("cpu"))
    head = torch.tensor([0, 0, 1, 1])
    encoded = fmt.encode(PageBatch(keys, values, head * 0, head, 1, HEADS, tables), {})
    for page, h in enumerate(head.tolist()):
        own = {name: x[h : h + 1] for name, x in tables.items()}
        together = fmt.decode(stored_page(encoded, page, own, (D, E)), torch.float32)
        alone = Cell(fmt, place, h).read(keys[page : page + 1], values[page : page + 1])
        assert all(torch.equal(a[0], b) for a, b in zip(together, alone, strict=True))


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"bits": 8}, r"kvquant\(bits=8\): bits is 4, 3 or 2"),
        ({"outliers": 0.5}, "outliers is a share"),
        ({"outliers": True}, "outliers is a share"),
        ({"calibration": ""}, "calibration is a file's path, or None"),
        ({"calibration": 3}, "calibration is a file's path, or None"),
        ({"q_norm": 2}, "q_norm is True, False or None"),
        ({"q_norm": 0.0}, "q_norm is True, False or None"),
        ({"bits": 4.0}, r"kvquant\(bits=4.0\): bits is 4, 3 or 2"),
    ],
)
def test_wrong_parameters(given, rule):
    with pytest.raises(ValueError, match=rule):
        KVQuant(**given)


@pytest.mark.parametrize(
    ("made", "rule"),
    [
        ({"bits": 3}, r"kvquant\(.*\): the calibration was made with bits=3"),
        ({"share": 0.02}, "was made with outliers=0.02"),
        ({"layers": 2}, "is of 2 layers of 2 KV heads, 16 wide; this model has 3 layers of 2"),
        ({"heads": 1}, "is of 3 layers of 1 KV heads"),
        ({"width": 8}, "of 2 KV heads, 8 wide"),
    ],
)
def test_a_calibration_for_something_else_is_refused_before_the_first_token(tmp_path, made, rule):
    path = saved(tmp_path / "c.safetensors", **{"layers": 3, "heads": 2, "width": 16, **made})
    with pytest.raises(ValueError, match=rule):
        CompressedCache(build("llama"), KVQuant(calibration=path))


def test_a_calibration_of_the_model_is_taken_and_counted(tmp_path):
    path = saved(tmp_path / "c.safetensors", layers=3, heads=2, width=16)
    place = Place(2, 3, 2, 16, 16)
    tables = KVQuant(calibration=path).tables(place, torch.device("cpu"))
    found = made_up(layers=3, heads=2, width=16)
    assert torch.equal(tables["key_offset"], found.key_offset[2])
    assert torch.equal(tables["key_levels"], found.key_levels[2].expand(2, -1))
    assert all(len(x) == place.heads for x in tables.values())
    model, ids = build("llama"), torch.arange(2, 82)[None]
    cache = CompressedCache(model, f"kvquant(calibration={path!r})")
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    held = [x for layer in cache.compressed for x in layer.store.pool.tables.values()]
    assert len(held) == 3 * 6 and cache.nbytes > sum(x.nbytes for x in held)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (None, r"calibration '.*c.safetensors' cannot be read.*kvloom calibrate"),
        (b"not one", "cannot be read"),
        ({"x": torch.zeros(2)}, "is not a file of kind"),
    ],
)
def test_other_files_are_refused(tmp_path, content, rule):
    from safetensors.torch import save_file

    path = tmp_path / "c.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file(content, path)
    with pytest.raises(ValueError, match=rule):
        CompressedCache(build("llama"), KVQuant(calibration=str(path)))


def test_files_whose_parts_disagree_are_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    for change in ({"bits": "3"}, {"bits": "many"}, {"outliers": "2"}):
        made = made_up()
        made.facts.update(change)
        made.save(path)
        with pytest.raises(ValueError, match="do not agree"):
            Calibration.load(path)
    for change in ({"key_offset": torch.zeros(())}, {"key_levels": torch.zeros(1, 8)}):
        dataclasses.replace(made_up(), **change).save(path)
        with pytest.raises(ValueError, match=r"do not agree: \{'bits': '4'.*key_levels \("):
            Calibration.load(path)


@pytest.mark.parametrize(
    ("name", "change", "rule"),
    [
        (
            "key_levels",
            lambda x: x.flip(-1),
            r"key_levels of layer 0 are \[.*\], and levels are finite",
        ),
        (
            "value_matched",
            lambda x: x * float("nan"),
            r"value_matched of layer 0 are \[nan, .* ascend",
        ),
        ("key_offset", lambda x: x / 0, "key_offset lies between -inf and inf"),
        ("key_scale", lambda x: x * 0, "key_scale lies between 0.0 and 0.0, .* scales above 0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(tmp_path, name, change, rule):
    made, path = made_up(), tmp_path / "c.safetensors"
    dataclasses.replace(made, **{name: change(getattr(made, name))}).save(path)
    with pytest.raises(ValueError, match=rule):
        Calibration.load(path)


def test_recipe_text_names_the_file():
    recipe = KVQuant(3, calibration="a/b.safetensors")
    assert str(recipe) == "kvquant(bits=3, calibration='a/b.safetensors')"
    assert isinstance(recipe, Policy)
