"""Packed codes against their definition, code by code."""

from __future__ import annotations

import pytest
import torch

from kvloom.kernels.layout import (
    BITS,
    TILE,
    Codes,
    Planes,
    code_k,
    code_v,
    pack_keys,
    pack_values,
    padded,
    tile_nbytes,
    unpack_keys,
    unpack_values,
)

WIDTHS = [1, 5, 16, 48, 64, 80, 96, 128, 256]
PACK = {"key": pack_keys, "value": pack_values}
UNPACK = {"key": unpack_keys, "value": unpack_values}


def codes_of(bits: int, width: int, lead: tuple[int, ...] = (2,)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits * 1000 + width)
    return torch.randint(0, 1 << bits, (*lead, TILE, width), generator=generator)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", BITS)
def test_every_code_lies_where_the_definition_says(bits, width):
    codes = codes_of(bits, width)
    keys, values = pack_keys(codes, bits), pack_values(codes, bits)
    assert keys.shape == values.shape == (2, tile_nbytes(width, bits))
    assert keys.dtype == values.dtype == torch.uint8
    for tile in range(2):
        k, v, want = keys[tile].tolist(), values[tile].tolist(), codes[tile].tolist()
        for t in range(TILE):
            assert [code_k(k, bits, t, c) for c in range(width)] == want[t]
            assert [code_v(v, bits, width, t, c) for c in range(width)] == want[t]


@pytest.mark.parametrize("width", [16, 48, 64, 80])
@pytest.mark.parametrize("bits", BITS)
def test_every_bit_of_a_tile_belongs_to_one_code(bits, width):
    """The definition uses each bit of a tile once: setting one code sets `bits` bits of its own."""
    for code, pack in ((code_k, pack_keys), (code_v, pack_values)):
        taken = torch.zeros(tile_nbytes(width, bits), dtype=torch.uint8)
        for t in range(0, TILE, 11):
            for c in range(0, width, 5):
                one = torch.zeros(TILE, width, dtype=torch.uint8)
                one[t, c] = (1 << bits) - 1
                packed = pack(one, bits)
                args = (bits, t, c) if code is code_k else (bits, width, t, c)
                assert code(packed.tolist(), *args) == (1 << bits) - 1
                assert sum(int(byte).bit_count() for byte in packed) == bits
                assert not bool((taken & packed).any())
                taken |= packed


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("part", PACK)
def test_unpacking_inverts_packing(part, bits, width):
    for lead in ((), (3,), (2, 3, 2), (0,), (2, 0, 1)):
        codes = codes_of(bits, width, lead)
        packed = PACK[part](codes, bits)
        assert packed.shape == (*lead, tile_nbytes(width, bits))
        assert torch.equal(UNPACK[part](packed, bits, width), codes.to(torch.uint8))


@pytest.mark.parametrize("part", PACK)
def test_runs_may_be_views(part):
    """Pages are read through strided views of a slab."""
    codes = codes_of(4, 48, (4, 6))
    packed = PACK[part](codes, 4)
    every_other = packed[:, 1::2]
    assert not every_other.is_contiguous()
    assert torch.equal(UNPACK[part](every_other, 4, 48), codes[:, 1::2].to(torch.uint8))


@pytest.mark.parametrize("bits", BITS)
def test_padding_is_zero(bits):
    """Channels that do not exist have code 0, so that equal entries are equal bytes."""
    codes = codes_of(bits, 5)
    wide = torch.nn.functional.pad(codes, (0, padded(5) - 5))
    assert torch.equal(pack_keys(codes, bits), pack_keys(wide, bits))
    assert torch.equal(pack_values(codes, bits), pack_values(wide, bits))


@pytest.mark.parametrize("width", [5, 16, 80, 128])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("part", PACK)
def test_codecs_take_slots_apart_and_put_them_together(part, bits, width):
    codec, codes = Codes(part, bits, width), codes_of(bits, width)
    tiles = PACK[part](codes, bits)
    slots = codec.unpack(tiles)
    assert slots.shape == (2, TILE, width)
    order = torch.randperm(2 * TILE, generator=torch.Generator().manual_seed(1))
    moved = codec.pack(slots.flatten(0, 1)[order].view_as(slots))
    want = PACK[part](codes.flatten(0, 1)[order].view_as(codes), bits)
    assert torch.equal(moved, want)


def test_planes_are_numbers_of_tokens_side_by_side():
    plane = torch.randn(3, 2, TILE)
    slots = Planes().unpack(plane)
    assert slots.shape == (3, TILE, 2)
    assert torch.equal(Planes().pack(slots), plane)
