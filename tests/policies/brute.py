"""Any scorer against brute force: what a method's equation would keep, in loops, in fp64.

Each KV head of each row of each layer has a list of entries. After every forward of a real model
the lists take in the new tokens, a function from the paper scores them one by one, and what stays
must be what the cache kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from kvloom import CompressedCache
from kvloom.core.view import entries_of
from tests.models import build, left_padded, tokens
from tests.policies.replay import Recorder, columns_of, forward_edges, run


@dataclass
class Head:
    """One KV head of one row: its entries, oldest first, and every query that it ever saw."""

    pinned: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)  # [G, D], rotated
    seen: int = 0

    def take(self, query: Tensor, keys: Tensor, values: Tensor, sinks: int) -> None:
        """`query [G, Q, D]`, `keys`, `values [Q, D]`."""
        for i, (key, value) in enumerate(zip(keys, values, strict=True)):
            self.queries.append(query[:, i])
            if self.seen < sinks:
                self.pinned.append(self.seen)
            else:
                self.positions.append(self.seen)
                self.keys.append(key)
                self.values.append(value)
            self.seen += 1

    def keep(self, chosen: list[int]) -> None:
        for name in ("positions", "keys", "values"):
            held = getattr(self, name)
            setattr(self, name, [held[j] for j in sorted(chosen)])


Scores = Callable[[int, list[Head], int], list[float]]  # (layer, heads of the row, head)


def best(scores: list[float], target: int, window: int) -> list[int]:
    """The newest `window`, then the best, the newer first among equals."""
    n = len(scores)
    window = min(window, target)
    rest = sorted(range(n - window), key=lambda j: (scores[j], j), reverse=True)
    return [*rest[: target - window], *range(n - window, n)]


def check_keeps(
    recipe: str,
    scores: Scores,
    capacity: int | None,
    *,
    size: int | None = None,
    window: int = 0,
    sinks: int = 0,
    lengths: list[int] | None = None,
    edges: list[int] | None = None,
    family: str = "llama",
    choose: Callable[[list[list[float]], list[int]], list[list[int]]] | None = None,
    ties: float = 0.0,
    stored: bool = True,
) -> list[list[list[Head]]]:
    """Run a model and compare after every forward; returns `[layer][row][head]`.

    `capacity` is the cache's budget in entries (None: the recipe has `size`). `choose` replaces
    the selection: from the scores of all heads to the indices that stay in each. Scores that differ
    by `ties` (relative) may change places, where equal entries only differ by rounding. `stored`:
    the method sees what a packed format made of the entries, not what they were on arrival.
    """
    model = build(family)
    recorder = Recorder(model)
    budget = None if capacity is None else f"{capacity}tok"
    cache = CompressedCache(model, recipe, budget, track_positions=True)
    room = (size or capacity or 0) - sinks
    length = 110 if lengths is None else max(lengths)
    ids, mask = (tokens(length), None) if lengths is None else left_padded(lengths)
    rows, H = len(ids), model.config.num_key_value_heads
    layers = [[[Head() for _ in range(H)] for _ in range(rows)] for _ in recorder.layers]
    edges = edges or forward_edges(length, length - 30, 17)
    for step, (start, stop) in enumerate(run(model, cache, ids, edges, mask)):
        for layer, forwards in enumerate(recorder.layers):
            seen, kept = forwards[step], cache.positions(layer)
            for row, heads in enumerate(layers[layer]):
                columns = columns_of(mask, start, stop, row)
                for h, head in enumerate(heads):
                    new = seen.keys[row, h, columns], seen.values[row, h, columns]
                    head.take(seen.query[row, h][:, columns], *new, sinks)
                given = [scores(layer, heads, h) for h in range(H)]
                if choose is not None:
                    chosen = choose(given, [len(head.positions) for head in heads])
                else:
                    chosen = [best(s, min(room, len(s)), window) for s in given]
                for h, head in enumerate(heads):
                    if ties:
                        free = kept[row][h][len(head.pinned) :]
                        chosen[h] = _among_equals(head, given[h], chosen[h], free, ties)
                    head.keep(chosen[h])
                    where = f"layer {layer}, row {row}, head {h}, after token {stop}"
                    assert kept[row][h] == [*head.pinned, *head.positions], where
        for layer, rows_of in enumerate(layers):
            if stored:
                _read_stored(cache.layers[layer].store, rows_of)
    assert cache.stats().evicted > 0
    return layers


def _among_equals(
    head: Head, scores: list[float], chosen: list[int], kept: list[int], ties: float
) -> list[int]:
    """The cache's own choice, if it only swapped entries whose scores are as good as equal."""
    theirs = [j for j, position in enumerate(head.positions) if position in set(kept)]
    swapped = [scores[j] for j in set(chosen) ^ set(theirs)]
    same = len(theirs) == len(chosen) and len(theirs) == len(kept)
    if swapped and same and max(swapped) - min(swapped) <= ties * max(map(abs, swapped)):
        return theirs
    return chosen


def _read_stored(store, rows: list[list[Head]]) -> None:
    """What a packed format made of the entries is what the method sees from now on."""
    if store.plan.format.name == "dense":
        return
    entries = entries_of(store)
    for row, heads in enumerate(rows):
        for h, head in enumerate(heads):
            valid = entries.valid[row, h]
            assert entries.positions[row, h][valid].tolist() == head.positions
            head.keys = list(entries.keys[row, h][valid].double())
            head.values = list(entries.values[row, h][valid].double())
