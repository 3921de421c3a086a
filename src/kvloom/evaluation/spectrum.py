"""How much attention centroids get with and without their mass, and how much their members would get.

For each query q of the second half of a text, in one head, at the forward in which q attends:

    with:     e = sum_j exp(l_j + log m_j) / Z    l_j: logit of centroid j, m_j: tokens it stands for
    without:  e = sum_j exp(l_j) / Z              same state, same queries
    full:     e = sum_t exp(l_t) / Z              over the tokens t that they stand for, in a cache that
                                                  holds every key of the same run as it was

Z sums over everything that the query sees in each case: the centroids or their tokens, and whatever is
exact, as the layer holds it; what a merger drops is in the Z of full alone. If members are identical (same
key, same position) and nothing is dropped, with equals full.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kvloom.core.attend import Call, centroid_tier, partials
from kvloom.core.forward import Forward
from kvloom.core.merge import CentroidMerger
from kvloom.core.store import LayerStore
from kvloom.evaluation import analysis, analysis_rows
from kvloom.evaluation.analysis import Case, Recorder, Setting
from kvloom.kernels import reference

NAME = "attention"
KINDS = ("with", "without", "full")


@dataclass(frozen=True)
class Energy:
    """Shares of attention, means over queries and query heads.

    Attributes:
        with_mass, without_mass, full: see the module. error_with, error_without: mean absolute
            difference to `full`, query by query.
    """

    with_mass: float
    without_mass: float
    full: float
    error_with: float
    error_without: float


@dataclass(frozen=True)
class Bin:
    """Centroids of at least `least` and at most `most` tokens, and the mean share that one gets.

    Attributes:
        seen: how many, each counted once per forward. mass: their mean. full: what the tokens that
            are nearest to one get together in a full cache.
    """

    least: int
    most: int
    seen: int
    mass: float
    with_mass: float
    without_mass: float
    full: float


@dataclass(frozen=True)
class Spectrum:
    """The row of `kvloom analyze attention`.

    Attributes:
        queries: how many there were, each with `group` query heads. biased: whether the recipe itself
            adds the log of the mass to the logits. data: sha256 of the tensors beside the row.
    """

    setting: Setting
    queries: int
    group: int
    biased: bool
    energy: Energy
    bins: list[Bin]
    data: str = ""


@dataclass
class Spectrograph:
    """Looks at the forwards of one head from token `first` on, where there are centroids.

    Attributes:
        energy: by kind, `[G, Q]` of each forward. positions: `[Q]` of its queries. weights: by kind,
            mean share of each centroid `[n]`; mass: `[n]`.
    """

    head: int
    first: int
    metric: str
    energy: dict[str, list[Tensor]] = field(default_factory=lambda: {k: [] for k in KINDS})
    weights: dict[str, list[Tensor]] = field(default_factory=lambda: {k: [] for k in KINDS})
    mass: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    biased: bool = True

    def __call__(self, recorder: Recorder, store: LayerStore, forward: Forward) -> None:
        positions = forward.positions[0].cpu()
        if int(positions[-1]) < self.first or store.centroids is None:
            return
        state = analysis.state_of(store, self.head)
        if not len(state.mass):
            return
        for kind, weight in self._centroid_weights(store, forward, state).items():
            self.energy[kind].append(weight.sum(-1))
            self.weights[kind].append(weight.mean((0, 1)))
        energy, members = self._full_weights(recorder, store, forward.call, state)
        self.energy["full"].append(energy)
        self.weights["full"].append(members)
        self.mass.append(state.mass)
        self.positions.append(positions)

    def _centroid_weights(
        self, store: LayerStore, forward: Forward, state: analysis.State
    ) -> dict[str, Tensor]:
        """Share of each centroid with and without mass, `[G, Q, n]`."""
        one, new = slice(self.head, self.head + 1), None if forward.in_tail else forward.block
        parts = partials(store, forward.call, new, centroids=False)
        _, rest = reference.combine(parts, forward.call.sink_logits)
        tier, call, query = centroid_tier(store, forward.call)
        assert tier.bias is not None
        logits = reference.scores(
            query[:, one], tier.keys[:, one], scale=call.scale, softcap=call.softcap
        )[0, 0][..., state.slots.to(query.device)].cpu()
        bias, log_mass = tier.bias[0, self.head].cpu()[state.slots], state.mass.log()
        shown = torch.isfinite(bias)  # a merger may hide some
        self.biased &= bool(torch.allclose(bias[shown], log_mass[shown], atol=1e-3))
        exact = rest[0, self.head].cpu()
        return {
            kind: _shares((logits + added).masked_fill(~shown, -math.inf), exact)
            for kind, added in (("with", log_mass), ("without", torch.zeros_like(log_mass)))
        }

    def _full_weights(
        self, recorder: Recorder, store: LayerStore, call: Call, state: analysis.State
    ) -> tuple[Tensor, Tensor]:
        """Share of all tokens that centroids stand for `[G, Q]`, and of those nearest to each centroid, a
        mean over queries, `[n]`.
        """
        keys, Q = recorder.keys(), call.query.shape[3]
        T = len(keys)
        mask = torch.ones(Q, T, dtype=torch.bool, device=keys.device).tril(T - Q)
        query = call.query[:, self.head : self.head + 1]
        logits = reference.scores(
            query, keys[None, None], scale=call.scale, softcap=call.softcap, mask=mask[None, None]
        )[0, 0].cpu()
        normaliser = logits.logsumexp(-1)
        if call.sink_logits is not None:
            sink = call.sink_logits[self.head].float().cpu()[:, None]
            normaliser = torch.logaddexp(normaliser, sink)
        left = analysis.left_out(T, state)
        left[T - Q :] = False  # the new ones are exact
        merger = store.plan.merger
        assert isinstance(merger, CentroidMerger)
        folded = analysis.folded_of(left, merger)
        weights = torch.exp(logits - normaliser[..., None])[..., folded]
        points = recorder.points().cpu()[folded]
        index, _ = analysis.nearest(points, state.keys, self.metric)
        members = torch.zeros(len(state.mass)).scatter_add(0, index, weights.mean((0, 1)))
        return weights.sum(-1), members


def _shares(logits: Tensor, rest: Tensor) -> Tensor:
    """Softmax of `logits [G, Q, n]` beside entries whose log-sum-exp is `rest [G, Q]`."""
    total = torch.logaddexp(logits.logsumexp(-1), rest)
    return torch.exp(logits - total[..., None])


def analyze(case: Case) -> tuple[Spectrum, dict[str, Tensor]]:
    """The row, and tensors for its figure.

    Raises ValueError as `analysis.run`, or if nothing was folded before the last forward.
    """
    half = len(case.text.document.ids) // 2
    graph = Spectrograph(case.head, half, case.metric)
    observed = analysis.run(case, half, graph)
    if not graph.mass:
        raise ValueError(
            f"a text of {2 * half} tokens is too short for recipe '{case.recipe}': no query of its second "
            "half saw a centroid; use a longer text, a smaller budget or a smaller window"
        )
    return summary(graph, observed.setting)


def summary(graph: Spectrograph, setting: Setting) -> tuple[Spectrum, dict[str, Tensor]]:
    """What was seen, as a row and tensors."""
    tensors = {"positions": torch.cat(graph.positions), "mass": torch.cat(graph.mass)}
    for kind in KINDS:
        tensors[f"energy_{kind}"] = torch.cat(graph.energy[kind], -1)
        tensors[f"weight_{kind}"] = torch.cat(graph.weights[kind])
    with_mass, without, full = (tensors[f"energy_{kind}"] for kind in KINDS)
    energy = Energy(
        with_mass=float(with_mass.mean()),
        without_mass=float(without.mean()),
        full=float(full.mean()),
        error_with=float((with_mass - full).abs().mean()),
        error_without=float((without - full).abs().mean()),
    )
    group, queries = full.shape
    return Spectrum(setting, queries, group, graph.biased, energy, bins(tensors)), tensors


def bins(tensors: dict[str, Tensor]) -> list[Bin]:
    """Means by size: 1, 2 to 3, 4 to 7, 8 to 15, ..; empty ones are left out."""
    mass = tensors["mass"]
    size = (
        mass.clamp_min(1.0).log2().add(1e-4).floor().long()
    )  # a mass is the exp of its rounded log
    found = []
    for power in size.unique().tolist():
        at = size == power
        means = [float(tensors[f"weight_{kind}"][at].mean()) for kind in KINDS]
        least = 1 << power
        found.append(Bin(least, 2 * least - 1, int(at.sum()), float(mass[at].mean()), *means))
    return found


def load(folder: Path) -> tuple[Spectrum, dict[str, Tensor]]:
    """A row and its tensors; see `analysis_rows.load`."""
    return analysis_rows.load(Spectrum, folder, NAME)
