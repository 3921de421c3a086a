"""Every registered format: byte arithmetic, purity, independence of cells, batches of runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvloom.core import registry
from kvloom.core.format import PAGE, TILES, Encoded, PageBatch, PageFormat, Stored
from kvloom.core.recipe import Recipe
from kvloom.kernels.layout import TILE
from kvloom.positions.rope import RopeSpec
from tests.contract.recipes import registered
from tests.formats.reading import place_of, stored_page, tensors

FORMATS = {text: Recipe.parse(text).format for text in registered("format")}
MOVABLE = [text for text, fmt in FORMATS.items() if fmt.movable]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEY, VALUE, HEADS = 16, 32, 2
ROPE = RopeSpec(torch.tensor([1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005]), KEY)
PLACE = place_of(KEY, VALUE, HEADS, ROPE)


def tables_of(fmt: PageFormat) -> dict[str, torch.Tensor]:
    return fmt.tables(PLACE, torch.device("cpu"))


def pages(fmt, cells=((0, 0),), each=2, dtype=torch.float32, seed=0) -> PageBatch:
    """`each` pages of every (row, head) of `cells`, in this order."""
    generator = torch.Generator().manual_seed(seed)
    n = len(cells) * each
    keys = torch.randn(n, PAGE, KEY, generator=generator).to(dtype)
    values = torch.randn(n, PAGE, VALUE, generator=generator).to(dtype)
    owner = torch.tensor(cells).repeat_interleave(each, 0)
    return PageBatch(keys, values, owner[:, 0], owner[:, 1], 2, HEADS, tables_of(fmt))


def read(fmt, encoded, batch, page, dtype=torch.float32):
    """One page as a pool reads it: keys `[64, D]`, values `[64, E]`."""
    head = int(batch.head[page])
    tables = {name: x[head : head + 1] for name, x in batch.tables.items()}
    keys, values = fmt.decode(stored_page(encoded, page, tables, (KEY, VALUE)), dtype)
    return keys[0, 0], values[0, 0]


# -- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_stored_is_what_the_layout_says(text, dtype):
    fmt, n = FORMATS[text], 4
    layout = fmt.layout(KEY, VALUE, dtype)
    encoded = fmt.encode(pages(fmt, each=n, dtype=dtype), {})
    assert set(encoded.sets) == set(layout.sets)
    places = [(layout.slot, encoded.slot, (n, PAGE)), (layout.tile, encoded.tile, (n, TILES))]
    for family, sets in encoded.sets.items():
        of = torch.as_tensor(sets.of)
        assert of.shape in ((n,), (n, TILES))
        many = {x.shape[0] for x in sets.fields.values()}
        assert len(many) == 1 and int(of.min()) >= -1 and int(of.max()) < min(many)
        places.append((layout.sets[family], sets.fields, (*many,)))
    for described, made, lead in places:
        assert set(described) == set(made)
        for name, x in made.items():
            assert x.dtype == described[name].dtype, name
            assert tuple(x.shape) == (*lead, *described[name].shape), name


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_and_bits_are_those_of_the_tensors(text, dtype):
    """Of a page alone; where pages share sets, they can only be fewer."""
    fmt = FORMATS[text]
    layout = fmt.layout(KEY, VALUE, dtype)
    encoded = fmt.encode(pages(fmt, each=1, dtype=dtype), {})
    held = [(layout.slot, encoded.slot), (layout.tile, encoded.tile)]
    held += [(layout.sets[family], sets.fields) for family, sets in encoded.sets.items()]
    stored = {"key": 0, "value": 0}
    for fields, made in held:
        for name, x in made.items():
            stored[fields[name].part] += x.numel() * x.itemsize
    ids = TILES * 4 * len(layout.sets)
    most = layout.page_nbytes() - ids
    full = all(
        sets.fields and len(next(iter(sets.fields.values()))) for sets in encoded.sets.values()
    )
    if full:
        assert sum(stored.values()) == most
        assert layout.bits("key", KEY) == 8 * stored["key"] / (PAGE * KEY)
        assert layout.bits("value", VALUE) == 8 * stored["value"] / (PAGE * VALUE)
    else:  # a family of which this page needs no set
        assert sum(stored.values()) < most


@pytest.mark.parametrize(
    ("text", "width", "key", "value"),
    [
        ("int4", 128, 4.25, 4.25),
        ("int4", 64, 4.5, 4.5),
        ("rotated_int4", 128, 4.25, 4.25),
        ("rotated_int4", 64, 4.5, 4.5),
        ("int4(symmetric=True)", 128, 4.125, 4.125),
        ("k8v4", 128, 8.25, 4.25),
        ("int4_channel", 128, 4.5, 4.25),
        ("int4_channel", 64, 4.5, 4.5),
        ("int3", 128, 3.25, 3.25),
        ("int2", 64, 2.5, 2.5),
        ("int2(value_bits=3)", 80, 2.4, 3.4),
        ("int4(channels=32)", 128, 5.0, 5.0),
        ("dense", 64, 16, 16),
    ],
)
def test_published_bits(text, width, key, value):
    layout = Recipe.parse(text).format.layout(width, width, torch.float16)
    assert layout.bits("key", width) == key
    assert layout.bits("value", width) == value


@pytest.mark.parametrize("text", MOVABLE)
def test_slots_of_movable_formats_can_be_taken_apart(text):
    layout = FORMATS[text].layout(KEY, VALUE, torch.float32)
    assert not layout.sets
    assert all(f.codec is not None for f in layout.tile.values())


# -- encoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMATS)
def test_encode_is_pure_and_deterministic(text):
    fmt = FORMATS[text]
    batch, same = (pages(fmt, [(0, 0), (0, 1), (1, 0)]) for _ in range(2))
    first, second = fmt.encode(batch, {}), fmt.encode(batch, {})
    assert torch.equal(batch.keys, same.keys) and torch.equal(batch.values, same.values)
    for (name, x), y in zip(tensors(first).items(), tensors(second).values(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("text", FORMATS)
def test_cells_are_encoded_independently(text):
    """What a (row, head) reads back does not depend on its neighbours: neither rows nor heads."""
    fmt, cells = FORMATS[text], [(0, 0), (0, 1), (1, 0), (1, 1)]
    calm, loud = pages(fmt, cells), pages(fmt, cells)
    loud.keys[2:4] *= 1000  # (0, 1)
    loud.values[2:4] *= 1000
    alone = dataclasses.replace(
        calm, keys=calm.keys[6:], values=calm.values[6:], row=torch.zeros(2).long(), head=calm.head[6:]
    )  # fmt: skip
    together, other, single = (fmt.encode(b, {}) for b in (calm, loud, alone))
    for page in (0, 1, 4, 5, 6, 7):
        want = read(fmt, together, calm, page)
        for got, x in zip(read(fmt, other, loud, page), want, strict=True):
            assert torch.equal(got, x)
    for page in (0, 1):
        want = read(fmt, together, calm, 6 + page)
        for got, x in zip(read(fmt, single, alone, page), want, strict=True):
            assert torch.equal(got, x)


@pytest.mark.parametrize("text", FORMATS)
def test_order_within_a_cell_is_all_that_counts(text):
    """Heads differ at most by their tables: the same pages under another head read back alike."""
    fmt = FORMATS[text]
    batch = pages(fmt, [(0, 1)])
    moved = dataclasses.replace(batch, row=batch.row + 1)
    for page in (0, 1):
        want = read(fmt, fmt.encode(batch, {}), batch, page)
        for got, x in zip(read(fmt, fmt.encode(moved, {}), moved, page), want, strict=True):
            assert torch.equal(got, x)


# -- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_gives_the_models_dtype_and_shape(text, dtype):
    fmt = FORMATS[text]
    batch = pages(fmt, dtype=dtype)
    keys, values = read(fmt, fmt.encode(batch, {}), batch, 1, dtype)
    assert keys.dtype == values.dtype == dtype
    assert keys.shape == (PAGE, KEY) and values.shape == (PAGE, VALUE)
    spread = batch.keys[1].float().std()
    assert (keys.float() - batch.keys[1].float()).std() < 0.5 * spread


def run_of(encoded: Encoded, tables, rows: int, heads: int) -> Stored:
    """All pages as one run `[rows, heads, S]`."""

    def grid(x, per_page):
        return x.reshape(rows, heads, -1, *x.shape[2:]) if per_page else x

    sets, has = {}, {}
    for family, own in encoded.sets.items():
        of = torch.as_tensor(own.of)
        of = of if of.ndim == 2 else of[:, None].expand(-1, TILES)
        of = of.reshape(rows, heads, -1)
        if len(next(iter(own.fields.values()))):
            sets[family] = {n: x[of.clamp_min(0).long()] for n, x in own.fields.items()}
            has[family] = of >= 0
    slot = {n: grid(x, True) for n, x in encoded.slot.items()}
    tile = {n: grid(x, True) for n, x in encoded.tile.items()}
    return Stored(KEY, VALUE, slot, tile, sets, has, tables)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("method", ["decode", "read"])
def test_batches_of_runs_equal_page_by_page(text, method):
    fmt, cells = FORMATS[text], [(0, 0), (0, 1), (1, 0), (1, 1)]
    batch = pages(fmt, cells)
    encoded = fmt.encode(batch, {})
    keys, values = getattr(fmt, method)(run_of(encoded, batch.tables, 2, 2), torch.float32)
    assert keys.shape == (2, 2, 2 * PAGE, KEY) and values.shape == (2, 2, 2 * PAGE, VALUE)
    for i in range(8):
        head = int(batch.head[i])
        tables = {n: x[head : head + 1] for n, x in batch.tables.items()}
        page = stored_page(encoded, i, tables, (KEY, VALUE))
        k, v = getattr(fmt, method)(page, torch.float32)
        row, head, at = int(batch.row[i]), int(batch.head[i]), i % 2 * PAGE
        # a product with the rotation may be summed in another order
        torch.testing.assert_close(keys[row, head, at : at + PAGE], k[0, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(values[row, head, at : at + PAGE], v[0, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", FORMATS)
def test_single_tiles_can_be_read(text):
    """A run may start at any tile, as where a window has moved on."""
    fmt = FORMATS[text]
    batch = pages(fmt)
    encoded = fmt.encode(batch, {})
    tables = {n: x[:1] for n, x in batch.tables.items()}
    page = stored_page(encoded, 1, tables, (KEY, VALUE))
    half = dataclasses.replace(
        page,
        slot={n: x[:, :, TILE:] for n, x in page.slot.items()},
        tile={n: x[:, :, 1:] for n, x in page.tile.items()},
        sets={f: {n: x[:, :, 1:] for n, x in fields.items()} for f, fields in page.sets.items()},
        has={f: x[:, :, 1:] for f, x in page.has.items()},
    )
    for got, want in zip(
        fmt.decode(half, torch.float32), fmt.decode(page, torch.float32), strict=True
    ):
        torch.testing.assert_close(got, want[:, :, TILE:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", MOVABLE)
def test_slots_of_movable_formats_decode_in_any_order(text):
    """Slots of one cell may change places, through the codecs, over the borders of tiles and pages."""
    fmt = FORMATS[text]
    layout, batch = fmt.layout(KEY, VALUE, torch.float32), pages(fmt)
    encoded = fmt.encode(batch, {})
    n = len(batch.keys)
    order = torch.randperm(n * PAGE, generator=torch.Generator().manual_seed(4))

    def moved(x, codec):
        if codec is None:
            return x.flatten(0, 1)[order].view_as(x)
        slots = codec.unpack(x.flatten(0, 1))
        return codec.pack(slots.flatten(0, 1)[order].view_as(slots)).view_as(x)

    slot = {name: moved(x, None) for name, x in encoded.slot.items()}
    tile = {name: moved(x, layout.tile[name].codec) for name, x in encoded.tile.items()}
    mixed = Encoded(slot, tile)
    plain = [
        torch.cat(x)[order]
        for x in zip(*(read(fmt, encoded, batch, i) for i in range(n)), strict=True)
    ]
    other = [
        torch.cat(x) for x in zip(*(read(fmt, mixed, batch, i) for i in range(n)), strict=True)
    ]
    for got, want in zip(other, plain, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", MOVABLE)
def test_codecs_invert_each_other_bit_by_bit(text):
    fmt = FORMATS[text]
    encoded = fmt.encode(pages(fmt), {})
    for name, field in fmt.layout(KEY, VALUE, torch.float32).tile.items():
        x = encoded.tile[name].flatten(0, 1)
        slots = field.codec.unpack(x)
        assert slots.shape[:2] == (len(x), TILE)
        assert torch.equal(field.codec.pack(slots), x), name
        assert field.codec.unpack(x[:0]).shape == (0, *slots.shape[1:])
        assert field.codec.pack(slots[:0]).shape == x[:0].shape


# -- dense ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rope", ["pre", "post"])
def test_dense_is_bitwise(dtype, rope):
    fmt = Recipe.parse(f"dense(rope='{rope}')").format
    batch = pages(fmt, dtype=dtype)
    keys, values = read(fmt, fmt.encode(batch, {}), batch, 1, dtype)
    assert torch.equal(keys, batch.keys[1])
    assert torch.equal(values, batch.values[1])
    assert fmt.pre_rope == (rope == "pre")


def test_dense_takes_odd_widths_and_refuses_other_rotations():
    dense = registry.policies("format")["dense"]
    assert dense().layout(7, 3, torch.float32).page_nbytes() == PAGE * 10 * 4
    with pytest.raises(ValueError, match=r"dense\(rope='mid'\).*'post' or 'pre'"):
        dense(rope="mid")
