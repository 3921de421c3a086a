"""The keys of one head before and after partition: where they lie, and which centroid is nearest.

A token counts as a member of the centroid that is nearest to its key in the end, by the merger's own
metric: mergers keep sums, not members, and centroids move after they took a token in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from kvloom.evaluation import analysis, analysis_rows, projection
from kvloom.evaluation.analysis import Case, Observed, Setting
from kvloom.evaluation.projection import Projection
from kvloom.evaluation.topics import Labelled

NAME = "manifold"


@dataclass(frozen=True)
class Topic:
    """A topic and how many tokens it has."""

    name: str
    tokens: int


@dataclass(frozen=True)
class Transition:
    """A place in the text, and how the centroids that are nearest to its tokens change there.

    Attributes:
        position: of the first token after it. before, after: topics. around: tokens looked at on
            either side. shift: total variation distance between the shares of these tokens that each
            centroid has before and after: 0 if they are the same, 1 if no centroid is on both sides.
    """

    position: int
    before: str
    after: str
    around: int
    shift: float


@dataclass(frozen=True)
class Manifold:
    """The row of `kvloom analyze manifold`.

    Attributes:
        projections: planes in `data`. similarity: mean cosine of folded tokens to their nearest
            centroid.
        topics: empty without topics; then the rest is empty or None, too.
        purity: share of the folded tokens whose nearest centroid has no other topic more often than
            their own among its members; purity_of_one: what one centroid for all would reach.
        transitions: at the boundaries between topics. shift: their mean; shift_within: the same in the
            middle of passages, where no topic changes, which a few tokens of many centroids shift, too.
        data: sha256 of the tensors beside the row.
    """

    setting: Setting
    projections: list[Projection]
    similarity: float
    topics: list[Topic]
    purity: float | None
    purity_of_one: float | None
    transitions: list[Transition]
    shift: float | None
    shift_within: float | None
    data: str = ""


def analyze(case: Case, kinds: Sequence[str]) -> tuple[Manifold, dict[str, Tensor]]:
    """The row, and tensors for its figures: places of keys and centroids on each plane, and of
    each token its topic, whether it is exact or folded, and its nearest centroid.

    Raises ValueError as `analysis.run`.
    """
    observed = analysis.run(case)
    state, points = observed.state, observed.points
    index, cosine = analysis.nearest(points, state.keys, case.metric)
    tensors = {
        "mass": state.mass,
        "centroid_positions": state.positions,
        "exact": ~observed.left,
        "folded": observed.folded,
        "nearest": index,
        "topic": case.text.topic,
    }
    planes = []
    for kind in kinds:
        places, plane = projection.project(kind, points, state.keys, case.metric)
        tensors[f"{kind}_keys"], tensors[f"{kind}_centroids"] = places.split(
            [len(points), len(state.keys)]
        )
        planes.append(plane)
    return _row(observed, case.text, planes, index, cosine), tensors


def _row(
    observed: Observed, text: Labelled, planes: list[Projection], index: Tensor, cosine: Tensor
) -> Manifold:
    folded = observed.folded
    similarity = float(cosine[folded].mean())
    if len(text.names) < 2:
        return Manifold(observed.setting, planes, similarity, [], None, None, [], None, None)
    pure, one = purity(index[folded], text.topic[folded])
    found = transitions(index, text)
    middle = within(index, text)
    counts = torch.bincount(text.topic, minlength=len(text.names)).tolist()
    return Manifold(
        setting=observed.setting,
        projections=planes,
        similarity=similarity,
        topics=[Topic(n, c) for n, c in zip(text.names, counts, strict=True)],
        purity=pure,
        purity_of_one=one,
        transitions=found,
        shift=_mean_shift(found),
        shift_within=_mean_shift(middle),
    )


def purity(nearest: Tensor, topic: Tensor) -> tuple[float, float]:
    """Share of tokens of the topic that most members of their centroid have, and of the commonest
    topic of all; `nearest`, `topic`: `[S]`.
    """
    counts = topic_counts(nearest, topic, int(nearest.max()) + 1, int(topic.max()) + 1)
    total = len(nearest)
    return float(counts.max(1).values.sum()) / total, float(counts.sum(0).max()) / total


def topic_counts(nearest: Tensor, topic: Tensor, centroids: int, topics: int) -> Tensor:
    """Members of each centroid by topic, `[centroids, topics]`."""
    flat = torch.bincount(nearest * topics + topic, minlength=centroids * topics)
    return flat.view(centroids, topics)


def boundaries(topic: Tensor) -> list[int]:
    """Indices of tokens whose topic `[T]` is not that of the one before."""
    return [int(i) + 1 for i in (topic.diff() != 0).nonzero().flatten()]


def transitions(nearest: Tensor, text: Labelled) -> list[Transition]:
    """One for each boundary, with half a passage on either side; `nearest [T]`."""
    edges = [0, *boundaries(text.topic), len(nearest)]
    around = [max(1, min(b - a, c - b) // 2) for a, b, c in _triples(edges)]
    return [_transition(nearest, text, *x) for x in zip(edges[1:-1], around, strict=True)]


def within(nearest: Tensor, text: Labelled) -> list[Transition]:
    """The same in the middle of each passage, where no topic changes: to compare with."""
    edges = [0, *boundaries(text.topic), len(nearest)]
    middles = [((a + b) // 2, (b - a) // 2) for a, b in pairwise(edges) if b - a >= 2]
    return [_transition(nearest, text, *x) for x in middles]


def _triples(edges: list[int]) -> Iterator[tuple[int, int, int]]:
    return zip(edges, edges[1:], edges[2:], strict=False)


def _transition(nearest: Tensor, text: Labelled, at: int, around: int) -> Transition:
    n = int(nearest.max()) + 1
    sides = nearest[at - around : at], nearest[at : at + around]
    before, after = (torch.bincount(x, minlength=n) / around for x in sides)
    names = [text.names[int(text.topic[i])] for i in (at - 1, at)]
    return Transition(at, names[0], names[1], around, float((before - after).abs().sum()) / 2)


def _mean_shift(found: list[Transition]) -> float | None:
    return sum(t.shift for t in found) / len(found) if found else None


def load(folder: Path) -> tuple[Manifold, dict[str, Tensor]]:
    """A row and its tensors; see `analysis_rows.load`."""
    return analysis_rows.load(Manifold, folder, NAME)
