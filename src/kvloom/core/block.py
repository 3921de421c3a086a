"""A block of exact entries: the sinks, the tail, the tokens of one forward, the centroids.

Entries of one (row, KV head) are left-aligned and in the order of time; `count` says how many are
real. Counts live on the host, so that deciding what to do next never waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

GRANULE = 16  # slots by which a preallocated block grows


def uniform(count: Tensor) -> int | None:
    """The common value of host counts, or None if they differ (or there are none)."""
    if count.numel() == 0:
        return 0
    values = count.flatten().tolist()
    return int(values[0]) if values.count(values[0]) == len(values) else None


def ranges(start: Tensor, count: Tensor) -> Tensor:
    """`start .. start + count - 1` of every cell (host), one cell after the other."""
    n, first = count.flatten(), start.flatten()
    return torch.arange(int(n.sum())) + (first - n.cumsum(0) + n).repeat_interleave(n)


def new_like(template: Tensor, slots: int) -> Tensor:
    """An unset tensor like `template [B, H, S, ...]` with another number of slots."""
    return template.new_empty(*template.shape[:2], slots, *template.shape[3:])


def from_newest(valid: Tensor) -> Tensor:
    """Place of each entry counted from the newest, 1-based, by `valid` (bool `[B, H, S]`)."""
    return valid.flip(-1).cumsum(-1).flip(-1)


def take_slots(x: Tensor, index: Tensor) -> Tensor:
    """Gather along the slot axis: `x [B, H, S, ...]`, `index [B, H, N]` -> `[B, H, N, ...]`."""
    if x.ndim == 3:
        return x.gather(2, index)
    # whole vectors are copied several times as fast as their elements are gathered
    B, H, S, D = x.shape
    if not x.is_contiguous():
        row, head = (torch.arange(n, device=index.device) for n in (B, H))
        return x[row[:, None, None], head[:, None], index]
    first = S * torch.arange(B * H, device=index.device).view(B, H, 1)
    return x.flatten(0, 2).index_select(0, (first + index).flatten()).view(*index.shape, D)


class Block:
    """Exact entries of all rows and heads.

    Attributes:
        keys: `[B, H, C, D]`, values: `[B, H, C, E]`; C is the capacity.
        count: host int64 `[B, H]`, how many of the C slots are in use.
        meta: per-slot tensors `[B, H, C]`: `positions`, `mass` (log), and scorers' slot state.
        size: the common value of `count`, or None if it is ragged. longest: its maximum.
        given_up: slots before the first one that older entries had, in the same storage.

    A ragged block can be packed: then only the slots in use are held, side by side, until keys,
    values or meta are looked at.
    """

    __slots__ = ("_count", "_flat", "_keys", "_meta", "_values", "given_up", "longest", "size")

    def __init__(
        self, keys: Tensor, values: Tensor, count: Tensor, meta: dict[str, Tensor] | None = None
    ):
        self._keys, self._values, self._meta = keys, values, {} if meta is None else meta
        self._flat: list[Tensor] | None = None
        self.count, self.given_up = count, 0

    @property
    def keys(self) -> Tensor:
        if self._flat is not None:
            self._spread(self._flat)
        return self._keys

    @property
    def values(self) -> Tensor:
        if self._flat is not None:
            self._spread(self._flat)
        return self._values

    @property
    def meta(self) -> dict[str, Tensor]:
        if self._flat is not None:
            self._spread(self._flat)
        return self._meta

    @classmethod
    def token(cls, keys: Tensor, values: Tensor, one: Tensor, meta: dict[str, Tensor]) -> Block:
        """One entry per (row, head); `one` is their count, known to be 1 (the decode path counts
        every microsecond).
        """
        block = cls.__new__(cls)
        block._keys, block._values, block._meta, block._flat = keys, values, meta, None
        block._count, block.size, block.longest, block.given_up = one, 1, 1, 0
        return block

    @property
    def count(self) -> Tensor:
        """Entries in use per (row, head)."""
        return self._count

    @count.setter
    def count(self, count: Tensor) -> None:
        values = count.flatten().tolist()
        self._count = count
        self.longest: int = max(values, default=0)
        self.size: int | None = self.longest if min(values, default=0) == self.longest else None

    @property
    def capacity(self) -> int:
        """Slots per head, allocated or (if packed) to be."""
        return self.longest if self._flat is not None else self._keys.shape[2]

    @property
    def allocated(self) -> int:
        """Slots per head of the storage, with those that older entries had."""
        return self.capacity + self.given_up

    @property
    def free(self) -> int:
        """Allocated slots of all heads that no entry uses; none if packed."""
        used = int(self.count.sum())
        return 0 if self._flat is not None else self.count.numel() * self.allocated - used

    def tensors(self) -> list[Tensor]:
        """What is held; looking at it does not unpack."""
        if self._flat is not None:
            return [*self._flat, self.count]
        return [self._keys, self._values, self.count, *self._meta.values()]

    def pack(self) -> None:
        """If ragged, hold only the slots in use, so that no head pays for the longest one."""
        if self.size is not None or self._flat is not None:
            return
        used = self._used(self.capacity)
        parts = [self._keys, self._values, *self._meta.values()]
        self._flat, self.given_up = [x.flatten(0, 2).index_select(0, used) for x in parts], 0
        shape = self._keys.shape
        self._keys, self._values = (x.new_empty(*shape[:2], 0, x.shape[3]) for x in parts[:2])
        self._meta = {name: x[:, :, :0].clone() for name, x in self._meta.items()}

    def _spread(self, flat: list[Tensor]) -> None:
        """Undo `pack`, with room for at least one more entry per head."""
        self._flat, room = None, granules(self.longest + 1)
        used = self._used(room)

        def spread(template: Tensor, x: Tensor) -> Tensor:
            out = new_like(template, room).zero_()
            out.flatten(0, 2).index_copy_(0, used, x)
            return out

        self._keys, self._values = spread(self._keys, flat[0]), spread(self._values, flat[1])
        self._meta = {
            n: spread(self._meta[n], x) for n, x in zip(self._meta, flat[2:], strict=True)
        }

    def _used(self, capacity: int) -> Tensor:
        """Indices of the slots in use among all `B * H * capacity`; the device is not waited for."""
        slots = torch.arange(capacity) < self.count[..., None]
        return slots.flatten().nonzero().flatten().to(self._keys.device)

    def valid(self, slots: int | None = None) -> Tensor:
        """Which of the first `slots` slots are real: bool `[B, H, slots]` on the keys' device."""
        slots = self.longest if slots is None else slots
        slot = torch.arange(slots, device=self.keys.device)
        return slot < self.count.to(self.keys.device)[..., None]

    def each(self, change: Callable[[Tensor], Tensor], count: Tensor) -> Block:
        """The block with `change` applied to every per-slot tensor."""
        meta = {name: change(x) for name, x in self.meta.items()}
        return Block(change(self.keys), change(self.values), count, meta)

    def empty(self, capacity: int = 0) -> Block:
        """A block like this one with room for `capacity` entries and none in it."""
        return self.each(lambda x: new_like(x, capacity), torch.zeros_like(self.count))

    def rows(self, index: Tensor) -> Block:
        """Select rows (beam search, batch selection)."""
        host = index.to("cpu")
        return self.each(lambda x: x.index_select(0, index.to(x.device)), self.count[host])

    def to(self, device: torch.device) -> Block:
        return self.each(lambda x: x.to(device), self.count)

    def span(self, start: Tensor, length: Tensor) -> Block:
        """Entries `start .. start + length` of each (row, head); host int64 `[B, H]` both."""
        first, size = uniform(start), uniform(length)
        if first is not None and size is not None:
            return self.each(lambda x: x[:, :, first : first + size], length)
        longest = int(length.max())
        slot = torch.arange(longest)
        index = (start[..., None] + slot).clamp_max(max(0, self.capacity - 1))
        index = index.to(self.keys.device)
        return self.each(lambda x: take_slots(x, index), length)

    def keep(self, mask: Tensor, count: Tensor | None = None, room: int = 0) -> Block:
        """The entries where `mask [B, H, S]` is set, in order, in storage of their own with room for `room`;
        waits for the device if not told `count`.
        """
        if self.size != mask.shape[2]:
            mask = mask & self.valid(mask.shape[2])
        count = mask.sum(-1).cpu() if count is None else count
        slots = max(int(count.max()), granules(room))
        order = torch.argsort(~mask, dim=-1, stable=True)[..., :slots]
        order = pad(order, (0, slots - order.shape[-1]))  # never read: any entry will do
        return self.each(lambda x: take_slots(x, order), count)

    def without_oldest(self, n: int) -> Block:
        """The same without the oldest `n` of every (row, head), in place of storage."""
        block = self.each(lambda x: x[:, :, n:], self.count - n)
        block.given_up = self.given_up + n
        return block

    def join(self, other: Block) -> Block:
        """This block followed by `other`, each (row, head) without a gap."""
        if self.longest == 0:
            return other
        if other.longest == 0:
            return self.span(torch.zeros_like(self.count), self.count)
        count = self.count + other.count
        mine, theirs = self.size, other.size
        if mine is not None and theirs is not None:
            pair = _join_uniform(mine, theirs)
        else:
            pair = _join_ragged(self.count, count, self.longest, self.keys.device)
        meta = {name: pair(self.meta[name], other.meta[name]) for name in self.meta}
        keys, values = pair(self.keys, other.keys), pair(self.values, other.values)
        return Block(keys, values, count, meta)

    def append_token(self, token: Block) -> None:
        """Append one entry per (row, head) in place; the caller has made room."""
        size = self.size
        pairs = [(self.keys, token.keys), (self.values, token.values)]
        pairs += [(self.meta[name], token.meta[name]) for name in self.meta]
        if size is not None:
            for mine, new in pairs:
                mine.select(2, size).copy_(new.select(2, 0))
            self._count, self.size, self.longest = self._count + 1, size + 1, size + 1
            return
        index = self.count.to(self.keys.device)[..., None]
        for mine, new in pairs:
            _scatter_slot(mine, index, new)
        self.count = self.count + 1

    def owned(self, capacity: int, granule: int = GRANULE) -> Block:
        """A copy in storage of its own, with room for `capacity`, in whole granules."""
        used = self.longest
        room = granules(max(capacity, used), granule)

        def copy(x: Tensor) -> Tensor:
            out = new_like(x, room)
            out[:, :, :used] = x[:, :, :used]
            out[:, :, used:] = 0  # never read, but NaN garbage times weight 0 would be NaN
            return out

        return self.each(copy, self.count)

    def reserve(self, capacity: int) -> Block:
        """The same entries with room for at least `capacity`."""
        return self if self.capacity >= capacity else self.owned(capacity)

    def shrunk(self, count: Tensor) -> Block:
        """The first `count` entries of each (row, head), in place of storage."""
        block = Block(self.keys, self.values, count, self.meta)
        block.given_up = self.given_up
        return block


def granules(slots: int, granule: int = GRANULE) -> int:
    """Slots that are allocated for so many."""
    return -(-slots // granule) * granule


def _scatter_slot(mine: Tensor, index: Tensor, new: Tensor) -> None:
    if mine.ndim == 4:
        index = index[..., None].expand(*index.shape, mine.shape[3])
    mine.scatter_(2, index, new.to(mine.dtype))


def _join_uniform(mine: int, theirs: int) -> Callable[[Tensor, Tensor], Tensor]:
    def pair(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a[:, :, :mine], b[:, :, :theirs].to(a.dtype)], dim=2)

    return pair


def _join_ragged(
    mine: Tensor, total: Tensor, longest: int, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """Slot s of the result is `a[s]` below `mine`, else `b[s - mine]` (stored after a's `longest`)."""
    slot = torch.arange(int(total.max()))
    own = slot < mine[..., None]
    index = torch.where(own, slot, longest + (slot - mine[..., None]))

    def pair(a: Tensor, b: Tensor) -> Tensor:
        both = torch.cat([a[:, :, :longest], b.to(a.dtype)], dim=2)
        return take_slots(both, index.clamp_max(both.shape[2] - 1).to(device))

    return pair
