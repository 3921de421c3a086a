"""Blocks against plain Python lists, ragged and uniform."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.core.block import GRANULE, Block, ranges, take_slots, uniform

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
Lists = list[list[list[int]]]  # ids of the entries, [row][head]


def block_of(lists: Lists, capacity: int | None = None) -> Block:
    """Entry with id n has key [n, -n], value [10 n] and position n; unused slots hold NaN."""
    B, H = len(lists), len(lists[0])
    longest = max(len(ids) for row in lists for ids in row)
    C = longest if capacity is None else capacity
    keys, values = torch.full((B, H, C, 2), torch.nan), torch.full((B, H, C, 1), torch.nan)
    meta = {"positions": torch.full((B, H, C), -1, dtype=torch.int32)}
    for b, row in enumerate(lists):
        for h, ids in enumerate(row):
            for s, n in enumerate(ids):
                keys[b, h, s] = torch.tensor([n, -n])
                values[b, h, s] = 10 * n
                meta["positions"][b, h, s] = n
    count = torch.tensor([[len(ids) for ids in row] for row in lists])
    return Block(keys, values, count, meta)


def lists_of(block: Block) -> Lists:
    """Back to ids; every tensor must tell the same."""
    out = []
    for b, row in enumerate(block.count.tolist()):
        out.append([])
        for h, n in enumerate(row):
            ids = block.meta["positions"][b, h, :n].tolist()
            assert block.keys[b, h, :n].tolist() == [[i, -i] for i in ids]
            assert block.values[b, h, :n].flatten().tolist() == [10 * i for i in ids]
            out[b].append(ids)
    counts = [n for row in block.count.tolist() for n in row]
    assert block.longest == max(counts)
    assert block.size == (counts[0] if len(set(counts)) == 1 else None)
    return out


@st.composite
def ragged(draw, B=None, H=None, start=1):
    B, H = B or draw(st.integers(1, 3)), H or draw(st.integers(1, 3))
    if draw(st.booleans()):
        n = draw(st.integers(0, 5))
        sizes = [[n] * H for _ in range(B)]
    else:
        sizes = [[draw(st.integers(0, 5)) for _ in range(H)] for _ in range(B)]
    ids = iter(range(start, 10_000))
    return [[[next(ids) for _ in range(n)] for n in row] for row in sizes]


def each(f, *grids):
    """Apply `f` cell by cell."""
    return [[f(*cell) for cell in zip(*rows, strict=True)] for rows in zip(*grids, strict=True)]


@SETTINGS
@given(ragged(), st.integers(0, 4))
def test_valid_says_which_slots_are_real(lists, extra):
    block = block_of(lists, 5 + extra)
    for slots in (None, block.longest, block.capacity):
        valid = block.valid(slots)
        width = block.longest if slots is None else slots
        assert valid.shape[2] == width
        assert valid.sum(-1).tolist() == each(len, lists)
        real = [[[s < len(ids) for s in range(width)] for ids in row] for row in lists]
        assert valid.tolist() == real


@SETTINGS
@given(st.data())
def test_span(data):
    lists = data.draw(ragged())
    if data.draw(st.booleans()):  # the same span everywhere
        least = min(len(ids) for row in lists for ids in row)
        first = data.draw(st.integers(0, least))
        start = each(lambda ids: first, lists)
        n = data.draw(st.integers(0, least - first))
        length = each(lambda ids: n, lists)
    else:
        start = each(lambda ids: data.draw(st.integers(0, len(ids))), lists)
        length = each(lambda ids, s: data.draw(st.integers(0, len(ids) - s)), lists, start)
    got = block_of(lists, 6).span(torch.tensor(start), torch.tensor(length))
    assert lists_of(got) == each(lambda ids, s, n: ids[s : s + n], lists, start, length)


@SETTINGS
@given(st.data())
def test_keep(data):
    lists = data.draw(ragged())
    width = max(len(ids) for row in lists for ids in row)
    mask = each(lambda ids: [data.draw(st.booleans()) for _ in range(width)], lists)
    tensor = torch.tensor(mask, dtype=torch.bool).view(len(lists), len(lists[0]), width)
    want = each(lambda ids, m: [i for i, k in zip(ids, m, strict=False) if k], lists, mask)
    block = block_of(lists, 7)
    assert lists_of(block.keep(tensor)) == want
    told = torch.tensor(each(len, want))
    assert lists_of(block.keep(tensor, told)) == want
    roomy = block.keep(tensor, told, room=GRANULE + 1)
    assert lists_of(roomy) == want
    assert roomy.capacity == 2 * GRANULE
    assert lists_of(block) == lists  # pure


@SETTINGS
@given(st.integers(1, 3), st.integers(0, 5), st.data())
def test_without_oldest(heads, size, data):
    lists = [[[10 * h + i for i in range(1, size + 1)] for h in range(heads)]]
    block = block_of(lists, GRANULE)
    first = data.draw(st.integers(0, size))
    second = data.draw(st.integers(0, size - first))
    got = block.without_oldest(first).without_oldest(second)
    assert lists_of(got) == each(lambda ids: ids[first + second :], lists)
    assert got.keys.untyped_storage().data_ptr() == block.keys.untyped_storage().data_ptr()
    assert got.allocated == block.allocated == GRANULE
    assert got.free == heads * (GRANULE - size + first + second)
    token = block_of([[[100 + h] for h in range(heads)]])
    got.append_token(token)
    assert lists_of(got) == [[[*ids[first + second :], 100 + h] for h, ids in enumerate(lists[0])]]
    shrunk = got.shrunk(got.count - 1)
    assert (shrunk.allocated, shrunk.free) == (GRANULE, heads + got.free)


@SETTINGS
@given(st.data())
def test_join(data):
    a = data.draw(ragged())
    b = data.draw(ragged(len(a), len(a[0]), start=5000))
    capacities = (5 + data.draw(st.integers(0, 3)) for _ in range(2))
    first, second = (block_of(x, c) for x, c in zip((a, b), capacities, strict=True))
    assert lists_of(first.join(second)) == each(lambda x, y: x + y, a, b)
    assert lists_of(first) == a
    assert lists_of(second) == b


@SETTINGS
@given(st.data())
def test_three_blocks_join_in_any_grouping(data):
    a = data.draw(ragged())
    shape = len(a), len(a[0])
    b, c = data.draw(ragged(*shape, start=3000)), data.draw(ragged(*shape, start=6000))
    x, y, z = block_of(a, 6), block_of(b, 7), block_of(c, 8)
    assert lists_of(x.join(y).join(z)) == lists_of(x.join(y.join(z)))


def test_join_takes_the_dtype_of_the_first():
    other = block_of([[[3]]])
    other = Block(other.keys.double(), other.values, other.count, other.meta)
    assert block_of([[[1]]]).join(other).keys.dtype == torch.float32


@SETTINGS
@given(ragged(), st.integers(0, 40))
def test_owned_copies_into_whole_granules(lists, capacity):
    block = block_of(lists, 6)
    mine = block.owned(capacity)
    assert lists_of(mine) == lists
    assert mine.capacity % GRANULE == 0
    assert max(capacity, block.longest) <= mine.capacity < max(capacity, block.longest) + GRANULE
    assert not mine.keys[:, :, block.longest :].any()  # no garbage: NaN times 0 is NaN
    assert not mine.values[:, :, block.longest :].any()
    mine.keys.fill_(0.5)
    assert lists_of(block) == lists
    exact = block.owned(block.longest, granule=1)
    assert exact.capacity == block.longest


@SETTINGS
@given(ragged(), st.data())
def test_rows_selects_and_repeats(lists, data):
    index = data.draw(st.lists(st.integers(0, len(lists) - 1), min_size=1, max_size=5))
    got = block_of(lists, 6).rows(torch.tensor(index))
    assert lists_of(got) == [lists[i] for i in index]


@SETTINGS
@given(ragged(), st.integers(1, 4))
def test_append_token_ragged(lists, steps):
    block = block_of(lists).owned(20)
    want = [[list(ids) for ids in row] for row in lists]
    for step in range(steps):
        new = each(lambda ids, step=step: [7000 + 100 * step + len(ids)], want)
        before = block.keys.data_ptr()
        block.append_token(block_of(new))
        assert block.keys.data_ptr() == before  # in place: the past is not copied
        want = each(lambda ids, n: ids + n, want, new)
        assert lists_of(block) == want


@SETTINGS
@given(ragged(), st.data())
def test_shrunk_keeps_the_oldest_in_the_same_storage(lists, data):
    sizes = each(lambda ids: data.draw(st.integers(0, len(ids))), lists)
    block = block_of(lists)
    small = block.shrunk(torch.tensor(sizes))
    assert lists_of(small) == each(lambda ids, n: ids[:n], lists, sizes)
    assert small.keys.data_ptr() == block.keys.data_ptr()


def test_reserve_copies_only_when_it_must():
    block = block_of([[[1, 2]]], 4)
    assert block.reserve(4) is block
    assert block.reserve(5).capacity == GRANULE


def test_empty_has_the_same_fields_and_no_entries():
    block = block_of([[[1, 2], [3]]])
    empty = block.empty()
    assert lists_of(empty) == [[[], []]]
    assert empty.meta.keys() == block.meta.keys()
    assert lists_of(empty.join(block)) == lists_of(block)
    assert lists_of(block.join(empty)) == lists_of(block)


def test_tensors_are_all_there_is():
    block = block_of([[[1]]])
    held = {id(t) for t in block.tensors()}
    assert held == {id(t) for t in (block.keys, block.values, block.count, block.meta["positions"])}


@pytest.mark.parametrize(
    ("counts", "value"), [([[2, 2]], 2), ([[2], [3]], None), ([[0]], 0), ([], 0), ([[7]], 7)]
)
def test_uniform(counts, value):
    assert uniform(torch.tensor(counts, dtype=torch.int64)) == value


def test_take_slots_gathers_every_kind_of_field():
    index = torch.tensor([[[2, 0], [1, 1]], [[0, 1], [2, 2]]])
    flat = torch.arange(12).view(2, 2, 3)
    deep = torch.stack([flat, -flat], -1)
    strided = deep.repeat(1, 1, 2, 1)[:, :, :3]
    want = [[[2, 0], [4, 4]], [[6, 7], [11, 11]]]
    assert take_slots(flat, index).tolist() == want
    for x in (deep, strided):
        assert take_slots(x, index)[..., 0].tolist() == want
        assert torch.equal(take_slots(x, index)[..., 1], -take_slots(flat, index))


def test_ranges_of_cells_side_by_side():
    start, count = torch.tensor([[5, 0], [7, 2]]), torch.tensor([[3, 0], [1, 2]])
    assert ranges(start, count).tolist() == [5, 6, 7, 7, 2, 3]
    assert ranges(start, torch.zeros_like(count)).tolist() == []
