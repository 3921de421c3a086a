"""Pages against a list of entries per (row, head), under random sequences of operations."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.core import registry
from kvloom.core.block import Block
from kvloom.core.compaction import compact
from kvloom.core.format import PAGE, TILES, PageFormat
from kvloom.core.pages import SMALL, PagePool
from kvloom.core.recipe import Recipe
from kvloom.core.slab import Slab
from kvloom.kernels.layout import TILE
from kvloom.positions.rope import RopeSpec
from tests.formats.reading import Cell, place_of

D, E = 4, 6
FORMATS = {name: cls() for name, cls in registry.policies("format").items()}
FORMATS["int4_channel"] = CHANNEL = Recipe.parse("int4(keys='channel')").format
ROPE = RopeSpec(torch.tensor([1.0, 0.1]), D)


@dataclass
class Entry:
    """One sealed entry as it must read back."""

    name: int  # its position: unique in its (row, head)
    key: torch.Tensor
    value: torch.Tensor
    state: float


class Model:
    """A pool and, beside it, the plain lists that it stands for."""

    def __init__(self, fmt: PageFormat, B: int, H: int):
        meta = {"positions": torch.int32, "state": torch.float32}
        self.fmt = fmt
        place = place_of(D, E, H, ROPE)
        self.pool = PagePool(fmt, place, torch.float32, torch.device("cpu"), B, meta)
        self.readers = [[Cell(fmt, place, h) for h in range(H)] for _ in range(B)]
        self.cells: list[list[list[list[Entry]]]] = [[[] for _ in range(H)] for _ in range(B)]
        self.newest = [[0] * H for _ in range(B)]  # how many entries were sealed last
        self.former: list[list[dict]] = [[{} for _ in range(H)] for _ in range(B)]
        self.next = 0
        self.generator = torch.Generator().manual_seed(7)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.cells), len(self.cells[0])

    def seal(self, pages: list[list[int]], limit: int | None = None) -> None:
        """`cells[b][h]` is a list of tiles, and a tile a list of its live entries."""
        B, H = self.shape
        longest = max(map(max, pages)) * PAGE + 5  # a few entries more than are sealed
        keys = torch.randn(B, H, longest, D, generator=self.generator)
        values = torch.randn(B, H, longest, E, generator=self.generator)
        names = torch.arange(self.next, self.next + longest, dtype=torch.int32).expand(B, H, -1)
        state = torch.rand(B, H, longest, generator=self.generator)
        self.next += longest
        block = Block(keys, values, torch.full((B, H), longest),
                      {"positions": names.clone(), "state": state})  # fmt: skip
        cap = None if limit is None else torch.full((B, H), limit)
        self.pool.seal(block, torch.tensor(pages), cap)
        if any(map(any, pages)):
            self.former = [[reader.statistics for reader in row] for row in self.readers]
            self.newest = [[n * PAGE for n in row] for row in pages]
        for b in range(B):
            for h in range(H):
                n = pages[b][h] * PAGE
                if not n:
                    continue
                sealed = (x[b, h, :n].unflatten(0, (-1, PAGE)) for x in (keys, values))
                read = [x.flatten(0, 1) for x in self.readers[b][h].read(*sealed)]
                entries = [
                    Entry(int(i), k, v, float(s))
                    for i, k, v, s in zip(names[b, h, :n], *read, state[b, h, :n], strict=True)
                ]
                tiles = [entries[i : i + TILE] for i in range(0, n, TILE)]
                self.cells[b][h] = [*self.cells[b][h], *tiles]

    def live(self, b: int, h: int) -> list[Entry]:
        return [e for tile in self.cells[b][h] for e in tile]

    def evict(self, lost: list[list[set[int]]]) -> None:
        if not self.pool.slabs:
            return
        names = self.names()
        keep = torch.ones_like(names, dtype=torch.bool)
        for b, row in enumerate(lost):
            for h, cell in enumerate(row):
                for name in cell:
                    keep[b, h] &= names[b, h] != name
        self.pool.evict(keep)
        self.cells = [
            [
                [[e for e in tile if e.name not in lost[b][h]] for tile in self.cells[b][h]]
                for h in range(self.shape[1])
            ]
            for b in range(self.shape[0])
        ]

    def names(self):
        """Positions of all slots, dead ones included, `[B, H, slots]`."""
        return torch.cat(
            [slab.meta["positions"][:, :, : slab.pages * PAGE] for slab in self.pool.slabs], 2
        )

    def drop_newest(self, n: list[list[int]]) -> None:
        if not self.pool.slabs or not self.pool.can_drop(torch.tensor(n)):
            return  # a store refuses what the statistics cannot follow
        self.pool.drop_newest(torch.tensor(n))
        for b, row in enumerate(n):
            for h, count in enumerate(row):
                live = self.live(b, h)
                kept = {e.name for e in live[: len(live) - count]}
                if count and count == self.newest[b][h]:
                    self.readers[b][h].statistics = self.former[b][h]
                    self.newest[b][h] = 0
                self.cells[b][h] = [
                    [e for e in tile if e.name in kept] for tile in self.cells[b][h]
                ]

    def rows(self, index: list[int]) -> None:
        self.pool.rows(torch.tensor(index))
        self.cells = [[list(cell) for cell in self.cells[i]] for i in index]
        self.readers = [deepcopy(self.readers[i]) for i in index]
        self.former, self.newest = ([list(x[i]) for i in index] for x in (self.former, self.newest))

    def compact(self) -> None:
        if self.pool.slabs:
            compact(self.pool)

    def ideal_pages(self) -> int:
        """Pages of the survivors alone: of slots if they may move, else of tiles that live on."""
        total = 0
        for row in self.cells:
            for cell in row:
                tiles = [len(tile) for tile in cell]
                slots = sum(tiles) if self.fmt.movable else TILE * sum(n > 0 for n in tiles)
                total += -(-slots // PAGE)
        return total

    def check(self) -> None:
        """The pool reads back exactly what the lists hold, bit by bit."""
        pool = self.pool
        B, H = self.shape
        want = [[len(self.live(b, h)) for h in range(H)] for b in range(B)]
        assert pool.live.tolist() == want
        assert sum((slab.live for slab in pool.slabs), torch.zeros_like(pool.live)).tolist() == want
        assert (pool.pages * PAGE >= pool.live).all()
        used = [slab for slab in pool.slabs if slab.pages]
        if not used:
            return
        read = [pool.decode_tiles(slab, 0, slab.pages * TILES) for slab in used]
        keys, values = (torch.cat(x, 2) for x in zip(*read, strict=True))
        valid = torch.cat([slab.valid() for slab in used], 2)
        meta = {
            name: torch.cat([slab.meta[name][:, :, : slab.pages * PAGE] for slab in used], 2)
            for name in pool.meta
        }
        for b in range(B):
            for h in range(H):
                ok = valid[b, h]
                entries = self.live(b, h)
                assert meta["positions"][b, h, ok].tolist() == [e.name for e in entries]
                if entries:
                    assert torch.equal(keys[b, h, ok], torch.stack([e.key for e in entries]))
                    assert torch.equal(values[b, h, ok], torch.stack([e.value for e in entries]))
                state = torch.tensor([e.state for e in entries])
                assert torch.equal(meta["state"][b, h, ok], state)


def allocated(pool: PagePool) -> int:
    return sum(slab.size for slab in pool.slabs)


def fields(slab: Slab) -> dict[str, torch.Tensor]:
    return {**slab.slot, **slab.tile, **slab.index}


def stored(slab: Slab) -> list[torch.Tensor]:
    return [*slab.slot.values(), *slab.tile.values(),
            *(x for family in slab.sets.values() for x in family.values())]  # fmt: skip


def nbytes(pool: PagePool, what: str = "all") -> int:
    """Bytes of unique storages."""
    tensors = [t for slab in pool.slabs for t in stored(slab)]
    tensors = tensors if what == "codes" else [t for part in pool.parts() for t in part]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


# -- random sequences ----------------------------------------------------------------------------


def grid(draw, B, H, values):
    return [[draw(values) for _ in range(H)] for _ in range(B)]


def operate(data, model: Model) -> None:
    draw, (B, H) = data.draw, model.shape
    kinds = ["seal", "seal", "evict", "compact", "rows", "drop_newest"]
    kind = draw(st.sampled_from(kinds))
    if kind == "seal":
        pages = grid(draw, B, H, st.integers(0, 2))
        if draw(st.booleans()):
            pages = [[pages[0][0]] * H] * B
        model.seal(pages, draw(st.sampled_from([None, 4])))
    elif kind == "evict":
        share = draw(st.sampled_from([0.1, 0.6, 1.0]))
        whole = draw(st.booleans())  # whole tiles, as selection does for shared scales
        dice = torch.Generator().manual_seed(draw(st.integers(0, 99)))

        def lost(cell):
            out = set()
            for tile in cell:
                if whole and float(torch.rand(1, generator=dice)) < share:
                    out |= {e.name for e in tile}
                elif not whole:
                    out |= {e.name for e in tile if float(torch.rand(1, generator=dice)) < share}
            return out

        model.evict([[lost(cell) for cell in row] for row in model.cells])
    elif kind == "compact":
        model.compact()
    elif kind == "rows":
        model.rows(draw(st.lists(st.integers(0, B - 1), min_size=1, max_size=3)))
    else:
        live = [[len(model.live(b, h)) for h in range(H)] for b in range(B)]
        n = draw(st.sampled_from([0, 1, 40, 200, "sealed last"]))
        wanted = model.newest if isinstance(n, str) else [[n] * H] * B
        model.drop_newest(
            [
                [min(a, x) for a, x in zip(*pair, strict=True)]
                for pair in zip(wanted, live, strict=True)
            ]
        )


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sequence_of_operations(name, data):
    model = Model(FORMATS[name], data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)))
    model.seal(grid(data.draw, *model.shape, st.integers(0, 2)))
    for _ in range(data.draw(st.integers(1, 5))):
        operate(data, model)
        model.check()
    model.compact()
    model.check()
    assert allocated(model.pool) == model.ideal_pages()


# -- appending -----------------------------------------------------------------------------------


def contents(slab):
    used = torch.cat(
        [
            torch.arange(f, f + u)
            for f, u in zip(
                slab.first.flatten().tolist(), slab.used.flatten().tolist(), strict=True
            )
        ]
    )
    return {name: x[used].clone() for name, x in fields(slab).items()}, used


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("limit", [None, 9])
def test_appending_never_copies_the_past(name, limit):
    model = Model(FORMATS[name], 2, 2)
    model.seal([[3, 1], [2, 3]], limit)
    for pages in ([[1, 1], [1, 1]], [[0, 2], [1, 0]], [[1, 1], [1, 1]], [[1, 1], [1, 1]]):
        slabs = list(model.pool.slabs)
        pointers = [[t.data_ptr() for t in stored(s)] for s in slabs]
        before = [contents(slab) for slab in slabs]
        model.seal(pages, limit)
        assert all(a is b for a, b in zip(model.pool.slabs, slabs, strict=False))
        for slab, old, (held, used) in zip(slabs, pointers, before, strict=True):
            assert [t.data_ptr() for t in stored(slab)] == old
            for field, x in held.items():
                assert torch.equal(fields(slab)[field][used], x)
        model.check()


def test_growth_is_bounded_by_four_pages_or_an_eighth():
    model = Model(FORMATS["dense"], 1, 1)
    model.seal([[16]])
    for _ in range(40):
        model.seal([[1]])
        used = int(model.pool.pages)
        assert allocated(model.pool) <= used + max(SMALL, used // 8)
    assert len(model.pool.slabs) < 20  # not one slab per page
    model.check()


def test_a_limit_is_never_reserved_beyond():
    model = Model(FORMATS["dense"], 1, 2)
    for _ in range(12):
        model.seal([[1, 1]], limit=12)
        for slab in model.pool.slabs:
            assert (slab.used <= slab.room).all()
        assert allocated(model.pool) <= 2 * 12
    model.check()


def test_sealing_nothing_does_nothing():
    model = Model(FORMATS["int4"], 1, 2)
    model.seal([[0, 0]])
    assert not model.pool.slabs
    assert model.pool.decode_all() is None


# -- freeing -------------------------------------------------------------------------------------


def every_tenth(model, tiles=False):
    out = []
    for row in model.cells:
        out.append([])
        for cell in row:
            if tiles:
                lost = {e.name for i, tile in enumerate(cell) if i % 10 for e in tile}
            else:
                lost = {e.name for i, e in enumerate(e for tile in cell for e in tile) if i % 10}
            out[-1].append(lost)
    return out


@pytest.mark.parametrize("name", FORMATS)
def test_freed_memory_is_free(name):
    """After evicting 90 % and compacting, the pages that remain are those of the survivors."""
    fmt = FORMATS[name]
    model = Model(fmt, 2, 2)
    model.seal([[20, 20], [20, 20]])
    before = nbytes(model.pool, "codes")
    model.evict(every_tenth(model, tiles=not fmt.movable))
    assert nbytes(model.pool, "codes") == before  # nothing is freed yet
    model.compact()
    model.check()
    assert len(model.pool.slabs) == 1
    assert allocated(model.pool) == model.ideal_pages()
    survivors = 128 if fmt.movable else 4 * TILE
    assert model.pool.live.tolist() == [[survivors] * 2] * 2
    assert allocated(model.pool) == 4 * 2
    layout = fmt.layout(D, E, torch.float32)
    ids = 4 * TILES * len(layout.sets)  # set ids are counted with the page
    sets = {n: sum(f.nbytes for f in family.values()) for n, family in layout.sets.items()}
    most = sum(layout.most_sets(n) * size for n, size in sets.items())
    # four surviving tiles come from four pages: their sets all live on
    (slab,) = model.pool.slabs
    held = {n: slab.n_sets[n] for n in sets}
    assert all(slab.set_room(n) == 0 for n in sets)
    if fmt is CHANNEL:
        assert held == {"scales": 4 * 4}
    want = 8 * (layout.page_nbytes() - ids - most)
    want += sum(held[n] * sets[n] for n in sets)
    assert nbytes(model.pool, "codes") == want <= 8 * layout.page_nbytes(scattered=True)


def test_shared_scales_keep_whole_tiles():
    """One live entry holds its tile of 32, and no more."""
    model = Model(CHANNEL, 1, 1)
    model.seal([[4]])
    keep_one = {1, 70, 200}
    model.evict([[{e.name for e in model.live(0, 0)} - keep_one]])
    model.compact()
    model.check()
    assert allocated(model.pool) == 2  # three tiles
    assert int(model.pool.live) == 3


@pytest.mark.parametrize("name", FORMATS)
def test_evicting_everything_releases_everything(name):
    model = Model(FORMATS[name], 2, 1)
    model.seal([[2], [1]])
    model.evict([[{e.name for e in model.live(b, 0)}] for b in range(2)])
    model.check()
    model.compact()
    assert not model.pool.slabs
    assert model.pool.decode_all() is None
    model.seal([[1], [1]])
    model.check()


def test_scale_sets_are_remapped_and_dropped():
    model = Model(CHANNEL, 1, 2)
    model.seal([[3, 3]])
    model.seal([[1, 1]])
    sets = sum(slab.n_sets["scales"] for slab in model.pool.slabs)
    assert sets == 8
    # of head 0 the first and the last page go, of head 1 half of each page
    lost = [
        [
            {e.name for tile in (*model.cells[0][0][:2], *model.cells[0][0][6:]) for e in tile},
            {e.name for tile in model.cells[0][1][::2] for e in tile},
        ]
    ]
    model.evict(lost)
    model.compact()
    model.check()
    (slab,) = model.pool.slabs
    assert slab.n_sets == {"scales": 2 + 4}
    assert all(x.shape[0] == 6 for x in slab.sets["scales"].values())
    live_tiles = slab.index["scales"][: 2 + 2]
    assert live_tiles.unique().tolist() == list(range(6))


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_is_encoded_twice(name, monkeypatch):
    fmt = FORMATS[name]
    encoded = []
    plain = type(fmt).encode

    def counting(self, batch, statistics):
        encoded.append(batch.keys.shape[0])
        return plain(self, batch, statistics)

    model = Model(fmt, 2, 2)
    monkeypatch.setattr(Cell, "read", lambda self, k, v: (k, v))
    monkeypatch.setattr(type(fmt), "encode", counting)
    model.seal([[4, 4], [4, 4]])
    model.seal([[1, 0], [2, 0]])
    assert sum(encoded) == 16 + 3
    codes = {field: x.clone() for field, x in model.pool.slabs[0].slot.items()}
    planes = {
        name: f.codec.unpack(model.pool.slabs[0].tile[name][0]) if fmt.movable
        else model.pool.slabs[0].tile[name][0].clone()
        for name, f in model.pool.layout.tile.items()
    }  # fmt: skip
    model.evict(every_tenth(model, tiles=not fmt.movable))
    model.compact()
    model.rows([1, 1, 0])
    model.compact()
    assert sum(encoded) == 16 + 3
    # the bits of the first survivor of row 0 (now row 2) are those of the start
    (slab,) = model.pool.slabs
    for field, x in codes.items():
        assert torch.equal(slab.slot[field][slab.first[2, 0], 0], x[0, 0])
    for name, f in model.pool.layout.tile.items():
        now = slab.tile[name][slab.first[2, 0]]
        if fmt.movable:
            assert torch.equal(f.codec.unpack(now)[0, 0], planes[name][0, 0])
        else:
            assert torch.equal(now[0], planes[name][0])


def test_dropping_the_newest_gives_pages_back_to_the_slab():
    model = Model(FORMATS["dense"], 1, 1)
    model.seal([[3]])
    model.drop_newest([[PAGE + 10]])
    model.check()
    assert int(model.pool.pages) == 2
    pointer = model.pool.slabs[0].slot["keys"].data_ptr()
    model.seal([[1]])
    assert len(model.pool.slabs) == 1
    assert model.pool.slabs[0].slot["keys"].data_ptr() == pointer
    model.check()
    model.drop_newest([[2 * PAGE + 54]])
    model.check()
    assert not model.pool.slabs


# -- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_rows_share_storage_until_compaction_copies(name):
    model = Model(FORMATS[name], 2, 2)
    model.seal([[3, 3], [3, 3]])
    before = nbytes(model.pool, "codes")
    model.rows([0, 0, 1, 1])
    model.check()
    assert nbytes(model.pool, "codes") == before
    assert allocated(model.pool) == 12
    # rows that share pages part ways: what one evicts, the other keeps
    lost = [[set(), set()] for _ in range(4)]
    lost[1][0] = {e.name for tile in model.cells[1][0][:3] for e in tile}
    model.evict(lost)
    model.check()
    assert nbytes(model.pool, "codes") == before
    model.compact()
    model.check()
    assert allocated(model.pool) == model.ideal_pages() == 4 * 2 * 3 - 1
    model.seal([[1, 1]] * 4)
    model.check()


@pytest.mark.parametrize("name", FORMATS)
def test_shared_slabs_are_never_written(name):
    model = Model(FORMATS[name], 1, 1)
    model.seal([[24]])
    for _ in range(3):
        model.seal([[1]])
    last = model.pool.slabs[-1]
    assert (last.room > last.used).all()  # there is room that two rows must not both fill
    held = [(slab, *contents(slab)) for slab in model.pool.slabs]
    model.rows([0, 0])
    for _ in range(3):
        model.seal([[1], [1]])
        model.check()
    for slab, before, used in held:
        assert any(slab is other for other in model.pool.slabs)
        for field, x in before.items():
            assert torch.equal(fields(slab)[field][used], x)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_that_are_gone_release_most_of_their_pages(name):
    model = Model(FORMATS[name], 4, 1)
    model.seal([[2], [2], [2], [2]])
    model.rows([1, 1, 1, 1])
    model.check()
    assert allocated(model.pool) == 2
    model.rows([0])
    model.check()
    assert allocated(model.pool) == 2


@pytest.mark.parametrize("name", FORMATS)
def test_beams_that_swap_keep_their_own_survivors(name):
    """Slot state and dead slots travel with the row."""
    model = Model(FORMATS[name], 3, 2)
    model.seal([[2, 2], [1, 2], [2, 1]])
    lost = [
        [{e.name for tile in cell[::2] for e in tile if e.name % (b + 2)} for cell in row]
        for b, row in enumerate(model.cells)
    ]
    model.evict(lost)
    for index in ([2, 0, 1], [0, 0, 2], [1, 2, 0]):
        model.rows(index)
        model.check()
    model.compact()
    model.check()
