"""Online clustering the slow way: one token, one head, one Python float at a time, in double precision.

It follows the description of MP-KVM and shares nothing with `kvloom.policies.merge._clusters`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

UNIT = 65536  # similarities are compared in whole multiples of 1 / UNIT


@dataclass
class Cluster:
    """Keys of every head that shares it, values likewise, and what it stands for."""

    keys: list[list[float]]
    values: list[list[float]]
    position: float
    mass: float

    def toward(self, other: Cluster, share: float) -> None:
        """Move by `share` of the way to `other`."""
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for head, vector in enumerate(mine):
                for i, x in enumerate(vector):
                    vector[i] = x + share * (theirs[head][i] - x)
        self.position += share * (other.position - self.position)


@dataclass
class Loop:
    """Centroids of one cell: a list of places, some of them free.

    `rules` is the policy, read for its parameters only.
    """

    rules: Any
    places: list[Cluster | None] = field(default_factory=list)
    best: list[list[float]] = field(default_factory=list)  # by batch
    ingested: int = 0
    since: int = 0

    @property
    def clusters(self) -> list[Cluster]:
        return [c for c in self.places if c is not None]

    def fold(self, tokens: list[Cluster]) -> None:
        """One compression's losers, oldest first."""
        rules = self.rules
        taken = [t for t in tokens if t.position % rules.sample_stride == 0]
        for i in range(0, len(taken), rules.block):
            self.block(taken[i : i + rules.block])
        self.places = list(self.clusters)

    def block(self, tokens: list[Cluster]) -> None:
        rules = self.rules
        found = []
        for token in tokens:
            best, near = -math.inf, None
            for cluster in self.clusters:
                similarity = self.similarity(token, cluster)
                if similarity > best:
                    best, near = similarity, cluster
            found.append((best, near))
        threshold = self.threshold([best for best, near in found if near is not None])
        joining, opening = [], []
        for token, (best, near) in zip(tokens, found, strict=True):
            self.ingested += 1
            early = self.ingested <= (rules.init_preserve_first_n or 0)
            if near is None or best < threshold or early:
                opening.append(token)
            else:
                joining.append((token, near))
        for token, near in joining:
            near.toward(token, self.step(token.mass, near.mass))
            near.mass += token.mass
        for token in opening:
            self.open(token)
        self.since += len(tokens)
        self.reduce()

    def step(self, mass: float, mine: float) -> float:
        """How far a centroid of mass `mine` goes to meet a token."""
        if self.rules.update == "ema":
            return 1 - self.rules.ema**mass
        return mass / (mine + mass)

    def threshold(self, batch: list[float]) -> float:
        if not self.rules.adaptive_threshold:
            return self.rules.similarity_threshold
        if batch:
            self.best = [*self.best, batch][-64:]
        ordered = sorted(x for each in self.best for x in each)
        if not ordered:
            return self.rules.similarity_threshold
        at = self.rules.threshold_quantile * (len(ordered) - 1)
        low, part = ordered[int(at)], at - int(at)
        high = ordered[min(int(at) + 1, len(ordered) - 1)]
        return low + part * (high - low)

    def open(self, token: Cluster) -> None:
        """In the first free place."""
        if None in self.places:
            self.places[self.places.index(None)] = token
        else:
            self.places.append(token)

    def reduce(self) -> None:
        rules, waiting = self.rules, len(self.clusters) - self.rules.max_centroids
        if rules.flush_threshold:
            overdue = rules.flush_interval and self.since >= rules.flush_interval
            if waiting <= rules.flush_threshold and not overdue:
                return
            self.since = 0
        while len(self.clusters) > rules.max_centroids:
            self.merge()

    def merge(self) -> None:
        here = [i for i, c in enumerate(self.places) if c is not None]
        pairs = [(i, j) for i in here for j in here if i < j]
        closest, first, second = -math.inf, *pairs[0]
        for i, j in pairs:
            similarity = self.similarity(self.places[i], self.places[j])
            if similarity > closest:
                closest, first, second = similarity, i, j
        least = self.rules.min_merge_similarity
        if least is not None and closest < least:
            light = sorted(here, key=lambda i: (self.places[i].mass, i))[:2]
            first, second = min(light), max(light)
        into, gone = self.places[first], self.places[second]
        into.toward(gone, gone.mass / (into.mass + gone.mass))
        into.mass += gone.mass
        self.places[second] = None

    # -- comparing -------------------------------------------------------------------------------

    def compared(self, cluster: Cluster) -> list[float]:
        if self.rules.head_mean:
            heads = len(cluster.keys)
            return [sum(column) / heads for column in zip(*cluster.keys, strict=True)]
        return [x for head in cluster.keys for x in head]

    def similarity(self, one: Cluster, two: Cluster) -> float:
        a, b = self.compared(one), self.compared(two)
        if self.rules.metric == "euclidean":
            exact = 1 - math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
        else:
            lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
            exact = sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0
        return round(exact * UNIT) / UNIT
