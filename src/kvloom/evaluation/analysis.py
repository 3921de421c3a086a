"""One layer and KV head of a compressed cache while a text runs through it: what analyses look at."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvloom.core import registry
from kvloom.core.budget import Budget
from kvloom.core.forward import Forward
from kvloom.core.merge import CentroidMerger, Losers
from kvloom.core.recipe import Recipe
from kvloom.core.store import LayerStore
from kvloom.core.view import kept_positions
from kvloom.evaluation import identity, results
from kvloom.evaluation.subjects import Cell
from kvloom.evaluation.topics import Labelled
from kvloom.hf import load
from kvloom.hf.cache import CompressedCache
from kvloom.hf.observed import ObservedCache


@dataclass(frozen=True)
class Setting:
    """What was analysed; the part that the rows of all analyses share.

    Attributes:
        measured_at: UTC. took: seconds. layer: the model's index; head: KV head.
        chunk: tokens per forward. space: of the keys that are clustered, `"pre-RoPE"` or `"post-RoPE"`.
        metric: by which a token's nearest centroid is found, the merger's own where it names one.
        compared: whose keys decide that: `"own head"`, or, where the heads share their clusters, `"all
            heads"`, side by side, or their `"mean"`.
        exact: entries of the head that are not centroids at the end, sinks included; left: tokens that
            are no longer exact; dropped: those of them that the merger did not take in. masses: how
            many tokens each centroid stands for.
    """

    measured_at: str
    took: float
    model: results.Model
    subject: results.Subject
    text: results.Text
    environment: results.Environment
    layer: int
    head: int
    chunk: int
    space: str
    metric: str
    compared: str
    exact: int
    left: int
    dropped: int
    masses: list[float]


@dataclass(frozen=True)
class Case:
    """What to analyse: see `Setting`. Made by `prepare`, which checks it."""

    model: Any
    name: str
    recipe: Recipe
    budget: Budget | None
    text: Labelled
    layer: int
    head: int
    chunk: int

    @property
    def merger(self) -> CentroidMerger:
        assert isinstance(self.recipe.merger, CentroidMerger)
        return self.recipe.merger

    @property
    def metric(self) -> str:
        """`"cosine"` or `"euclidean"`."""
        return "euclidean" if getattr(self.merger, "metric", "") == "euclidean" else "cosine"


@dataclass(frozen=True)
class State:
    """Centroids of one head, those in use, and which tokens are still exact.

    Attributes:
        keys: `[n, W]`, what the merger compares of them, see `compared`. slots: `[n]`, in the store.
        mass: tokens `[n]`. positions: mean ones `[n]`. exact: token indices, int64 `[m]`.
    """

    keys: Tensor
    slots: Tensor
    mass: Tensor
    positions: Tensor
    exact: Tensor


@dataclass(frozen=True)
class Observed:
    """A text that has run through.

    Attributes:
        points: every token's key as the merger compares it, fp32 `[T, W]`. state: at the end.
        folded: which tokens the centroids stand for, bool `[T]`.
    """

    points: Tensor
    state: State
    folded: Tensor
    setting: Setting

    @property
    def left(self) -> Tensor:
        """Which tokens are no longer exact: bool `[T]`."""
        return left_out(len(self.points), self.state)


class Recorder:
    """Keeps a layer's keys as they arrive, and lets `see` look at every forward.

    Attributes:
        store: the layer's; None before its first forward.
    """

    def __init__(self, head: int, see: Callable[[Recorder, LayerStore, Forward], None] | None):
        self.head, self.see = head, see
        self.store: LayerStore | None = None
        self._keys: list[Tensor] = []
        self._positions: list[Tensor] = []

    def __call__(self, store: LayerStore, forward: Forward) -> None:
        self.store = store
        self._keys.append(forward.block.keys[0].clone())
        self._positions.append(forward.positions[0].clone())
        if self.see is not None:
            self.see(self, store, forward)

    def keys(self) -> Tensor:
        """Of the head, as attention uses them, `[T, D]`."""
        self._keys = [torch.cat(self._keys, 1)]
        return self._keys[0][self.head]

    def points(self) -> Tensor:
        """As the merger compares them, fp32 `[T, W]`: before rotation unless it wants them rotated."""
        assert self.store is not None
        merger, rope = self.store.plan.merger, self.store.plan.rope
        assert isinstance(merger, CentroidMerger)
        self._keys = [torch.cat(self._keys, 1)]
        keys = compared_keys(merger, self._keys[0], self.head)
        if merger.rotated:
            return joined(merger, keys.float())
        assert rope is not None
        return joined(merger, rope.unrotate(keys, torch.cat(self._positions)))


def compared(merger: CentroidMerger) -> str:
    """Whose keys decide which centroid is near; see `Setting`."""
    if getattr(merger, "per_head_clustering", True):
        return "own head"
    return "mean" if merger.head_mean else "all heads"  # type: ignore[attr-defined]


def compared_keys(merger: CentroidMerger, keys: Tensor, head: int) -> Tensor:
    """Of keys of all heads, `[H, n, D]`, those that the merger compares in `head`: `[1 or H, n, D]`."""
    return keys[head : head + 1] if compared(merger) == "own head" else keys


def joined(merger: CentroidMerger, keys: Tensor) -> Tensor:
    """Those `[H, n, D]` as one vector each: side by side, or their mean; fp32 `[n, W]`."""
    if compared(merger) == "mean":
        return keys.float().mean(0)
    return keys.float().transpose(0, 1).flatten(1)


def prepare(
    model: Any, name: str, recipe: str, budget: str | None, text: Labelled,
    layer: int | None, head: int, chunk: int,
) -> Case:  # fmt: skip
    """Check what is asked for; `layer=None` is the middle one of those that are compressed.

    Raises ValueError if the recipe has no centroids, layer or head are out of range, or model, recipe
    and budget do not fit together.
    """
    parsed = Recipe.parse(recipe)
    if not isinstance(parsed.merger, CentroidMerger):
        known = [n for n, c in registry.policies("merger").items() if issubclass(c, CentroidMerger)]
        raise ValueError(
            f"recipe '{parsed}' has no merger that keeps centroids, so there is nothing to analyse; "
            f"add one: {', '.join(known)}"
        )
    size = None if budget is None else Budget.parse(budget)
    full = [
        x.layer_idx for x in CompressedCache(model, parsed, size, track_positions=True).compressed
    ]
    layer = full[len(full) // 2] if layer is None else layer
    case = Case(model, name, parsed, size, text, layer, head, chunk)
    ObservedCache(model, parsed, size, layer, lambda store, forward: None)  # checks the layer
    heads = identity.model_facts(model, name).kv_heads
    if not 0 <= head < heads:
        raise ValueError(f"head {head} is out of range: the model has KV heads 0 to {heads - 1}")
    if not case.merger.serves(full.index(layer)):
        raise ValueError(f"layer {layer} has no centroids: {case.merger} leaves it alone")
    return case


def run(
    case: Case,
    split: int = 0,
    see: Callable[[Recorder, LayerStore, Forward], None] | None = None,
) -> Observed:
    """Feed the text through the recipe's cache, `chunk` tokens at a time.

    No forward reaches over token `split`. `see` is told of each forward of the layer. Raises
    ValueError if nothing was folded into a centroid.
    """
    begun = time.perf_counter()
    recorder = Recorder(case.head, see)
    cache = ObservedCache(case.model, case.recipe, case.budget, case.layer, recorder)
    ids = case.text.document.ids.to(case.model.device)
    with torch.inference_mode():
        for part in (ids[:split], ids[split:]):
            for chunk in part.split(case.chunk) if len(part) else ():
                load.forward(case.model, chunk[None], cache)
        assert recorder.store is not None
        state = state_of(recorder.store, case.head)
        points = recorder.points().cpu()
    folded = folded_of(left_out(len(ids), state), case.merger)
    if not len(state.mass):
        at = f" @ {case.budget}" if case.budget else ""
        raise ValueError(
            f"a text of {len(ids)} tokens is too short for recipe '{case.recipe}{at}': no token was "
            "folded into a centroid; use a longer text, a smaller budget or a smaller window"
        )
    stand_for, known = float(state.mass.sum()), int(folded.sum())
    if abs(stand_for - known) > 0.5 + 1e-3 * known:
        raise ValueError(
            f"recipe '{case.recipe}' cannot be analysed: its centroids stand for {stand_for:.1f} tokens, "
            f"but {case.merger} says that {known} were folded; takes() must name exactly those"
        )
    took = time.perf_counter() - begun
    return Observed(points, state, folded, _setting(case, state, known, took))


def state_of(store: LayerStore, head: int) -> State:
    """One head of a store now; on the CPU."""
    held, merger = store.centroids, store.plan.merger
    assert held is not None and isinstance(merger, CentroidMerger)
    n = held.longest
    mass = held.meta["mass"][0, head, :n]
    slots = (held.valid(n)[0, head] & torch.isfinite(mass)).nonzero().flatten()
    exact = torch.tensor(kept_positions(store)[0][head], dtype=torch.int64)
    keys = joined(merger, compared_keys(merger, held.keys[0][:, slots], head))
    places = held.meta["positions"][0, head, slots]
    return State(keys.cpu(), slots.cpu(), mass[slots].exp().cpu(), places.float().cpu(), exact)


def left_out(tokens: int, state: State) -> Tensor:
    """Which of the first `tokens` tokens are no longer exact: bool `[tokens]`."""
    left = torch.ones(tokens, dtype=torch.bool)
    left[state.exact[state.exact < tokens]] = False
    return left


def folded_of(left: Tensor, merger: CentroidMerger) -> Tensor:
    """Which tokens the centroids stand for, of those that are no longer exact, bool `[T]` both."""
    cells = 1, 1, len(left)
    none, positions = torch.zeros(cells), torch.arange(len(left), dtype=torch.int32)[None, None]
    taken = merger.takes(
        Losers(none[..., None], none[..., None], none, positions, left[None, None])
    )
    return left if taken is None else left & taken[0, 0]


def nearest(points: Tensor, centroids: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Of each point `[S, D]` the nearest of `centroids [n, D]`: index `[S]`, and cosine to it `[S]`."""
    cosine = normalize(points, dim=-1) @ normalize(centroids, dim=-1).T
    like = -torch.cdist(points, centroids) if metric == "euclidean" else cosine
    index = like.argmax(-1)
    return index, cosine.gather(1, index[:, None])[:, 0]


def _setting(case: Case, state: State, folded: int, took: float) -> Setting:
    left = len(case.text.document.ids) - len(state.exact)
    return Setting(
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        took=round(took, 3),
        model=identity.model_facts(case.model, case.name),
        subject=Cell(case.recipe, case.budget).facts,
        text=case.text.document.facts,
        environment=identity.environment(case.model.device),
        layer=case.layer,
        head=case.head,
        chunk=case.chunk,
        space="post-RoPE" if case.merger.rotated else "pre-RoPE",
        metric=case.metric,
        compared=compared(case.merger),
        exact=len(state.exact),
        left=left,
        dropped=left - folded,
        masses=[round(x, 4) for x in state.mass.tolist()],
    )
