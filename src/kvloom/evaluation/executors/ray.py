"""Cells on a Ray cluster: each actor claims its cores and GPU, and answers with rows.

The cluster is the one that `RAY_ADDRESS` names, else one is started on this machine. Models and texts
must be found by the same names on every machine.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kvloom.evaluation.cells import (
    OUT_OF_MEMORY,
    Fallback,
    Finished,
    Workplace,
    with_fallbacks,
)
from kvloom.evaluation.executors import Order
from kvloom.evaluation.experiment import Spec

Needs = tuple[int, int]  # cores, GPUs


class _Actor:
    """On the machine that measures."""

    def __init__(self) -> None:
        self.place = Workplace()

    def work(self, spec: str, known: list[str], fallbacks: list[Fallback], start: int) -> str:
        done = with_fallbacks(
            Spec(**json.loads(spec)),
            fallbacks,
            lambda s: self.place.work(s, frozenset(known)),
            start,
        )
        return json.dumps({"done": done.to_json(), "fallback": done.fallback})


def needs(spec: Spec, gpus: int) -> Needs:
    """What a cell claims; `device="auto"` takes a GPU where the cluster has one."""
    wants_gpu = spec.device.startswith("cuda") or (spec.device == "auto" and gpus > 0)
    return spec.threads or 1, int(wants_gpu)


def run(order: Order) -> Iterator[tuple[int, Finished]]:
    """See `Executor`."""
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise ValueError("executor 'ray': pip install 'kvloom[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(
            address=os.environ.get("RAY_ADDRESS"), include_dashboard=False, log_to_driver=False
        )
    try:
        yield from _Cluster(ray, order).finish()
    finally:
        if ours:
            ray.shutdown()


@dataclass
class _Job:
    """A cell, and how many attempts at it have killed their actor."""

    number: int
    spec: Spec
    died: int = 0


class _Cluster:
    """Actors, by what they claim, and what they are at."""

    def __init__(self, ray: Any, order: Order):
        self.ray, self.order = ray, order
        held = ray.cluster_resources()
        self.held: Needs = (int(held.get("CPU", 0)), int(held.get("GPU", 0)))
        self.waiting = [_Job(n, spec) for n, spec in order.specs.items()]
        self.flying: dict[Any, tuple[_Job, Needs, Any]] = {}
        self.idle: list[tuple[Needs, Any]] = []

    def finish(self) -> Iterator[tuple[int, Finished]]:
        while self.waiting or self.flying:
            while self.waiting and self._launch(self.waiting[0]):
                self.waiting.pop(0)
            if not self.flying:  # alone, it does not fit either
                job = self.waiting.pop(0)
                need = needs(job.spec, self.held[1])
                yield job.number, Finished(failed=f"it claims {need}, the cluster has {self.held}")
                continue
            ready, _ = self.ray.wait(list(self.flying), num_returns=1)
            for reference in ready:
                yield from self._land(reference)

    def _launch(self, job: _Job) -> bool:
        """Whether there is an actor for a cell, now."""
        need = needs(job.spec, self.held[1])
        actor = self._actor(need)
        if actor is None:
            return False
        text = json.dumps(dataclasses.asdict(job.spec))
        reference = actor.work.remote(text, list(self.order.known), self.order.fallbacks, job.died)
        self.flying[reference] = (job, need, actor)
        return True

    def _actor(self, need: Needs) -> Any:
        """An idle actor that claims this, or a new one if there is room; those that claim something else
        give way.
        """
        if self.order.workers is not None and len(self.flying) >= self.order.workers:
            return None
        for i, (claimed, _) in enumerate(self.idle):
            if claimed == need:
                return self.idle.pop(i)[1]
        for _, actor in self.idle:
            self.ray.kill(actor)
        self.idle.clear()
        used = [sum(n[i] for _, n, _ in self.flying.values()) for i in (0, 1)]
        if used[0] + need[0] > self.held[0] or used[1] + need[1] > self.held[1]:
            return None
        return self.ray.remote(num_cpus=need[0], num_gpus=need[1])(_Actor).remote()

    def _land(self, reference: Any) -> Iterator[tuple[int, Finished]]:
        """What came of a cell; one that a machine's memory did not suffice for waits again, if there is a
        fallback left.
        """
        job, need, actor = self.flying.pop(reference)
        try:
            answer = json.loads(self.ray.get(reference))
        except self.ray.exceptions.RayError as error:  # the actor died; the next cell gets another
            words = " ".join(str(error).split())[:300]
            killed = isinstance(error, self.ray.exceptions.OutOfMemoryError)
            if killed and job.died < len(self.order.fallbacks):
                self.waiting.insert(0, _Job(job.number, job.spec, job.died + 1))
            else:
                failed = f"{OUT_OF_MEMORY}: {words}" if killed else words
                fallback = self.order.fallbacks[job.died - 1] if job.died else None
                yield job.number, Finished(failed=failed, fallback=fallback)
            return
        self.idle.append((need, actor))
        done = Finished.from_json(answer["done"])
        yield job.number, dataclasses.replace(done, fallback=answer["fallback"])
