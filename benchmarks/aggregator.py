"""Time per ingested token of mp_kvm's clustering, with and without centroids that wait to be merged.

    python benchmarks/aggregator.py

Tokens arrive at full centroids: all at once (a prefill), 64 at a time, or one at a time (decoding),
which is the size of a fold. The published aggregator lets centroids wait until there are more than 256
too many, or for 100 tokens; `ratio` is the time against none that wait, at the same fold and block, by
rounds. `dissimilar` keys all open centroids, of `clustered` ones every fourth does. On the CPU the
clock counts seconds of work, on a GPU it is synchronised wall time.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import append_rows, interleaved, paired_ratio, provenance

from kvloom.core.block import Block
from kvloom.core.merge import Losers, Memory
from kvloom.policies.merge._clusters import ingest
from kvloom.policies.merge.mp_kvm import MPKVM

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.oracle.clusters import Cluster, Loop

HEADS = 2
WHOLE = 0  # a fold of everything
# (fold, block, flush threshold, flush interval); the published setting is 256, 100.
SETTINGS = [
    (WHOLE, 1, 0, 0), (WHOLE, 1, 256, 100),
    (WHOLE, 16, 0, 0), (WHOLE, 16, 16, 0), (WHOLE, 16, 64, 0), (WHOLE, 16, 256, 0), (WHOLE, 16, 256, 100),
    (WHOLE, 64, 0, 0), (WHOLE, 64, 256, 100),
    (64, 16, 0, 0), (64, 16, 256, 100),
    (1, 16, 0, 0), (1, 16, 16, 0), (1, 16, 256, 100),
]  # fmt: skip
OPENING = 4  # of clustered keys, every so many'th opens a centroid
LOOP_TOKENS = {64: 8, 256: 1}  # of the slow loop, by centroids


@dataclass(frozen=True)
class Case:
    """What arrives where.

    Attributes:
        fold: tokens per call, or `WHOLE`. clustered: else all keys are dissimilar.
    """

    centroids: int
    width: int
    clustered: bool
    fold: int
    block: int
    threshold: int
    interval: int

    @property
    def rules(self) -> MPKVM:
        return MPKVM(
            max_centroids=self.centroids, block=self.block, flush_threshold=self.threshold,
            flush_interval=self.interval,
        )  # fmt: skip

    def tokens(self) -> int:
        """How many to time: whole periods from one reduction to the next."""
        step = min(self.block, self.fold or self.block)
        opening = (self.threshold + 1) * (OPENING if self.clustered else 1)
        period = step * math.ceil(min(opening, self.interval or math.inf) / step)
        period = math.lcm(period, self.fold) if self.fold > 1 else period
        aim = 160 if self.fold == WHOLE else 128 if self.fold > 1 else 24
        return period * max(1, round(aim / period))


def keys(case: Case, n: int, seed: int) -> torch.Tensor:
    """`[1, HEADS, n, width]`; if clustered, most are near one of centroids / 2 directions."""
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(1, HEADS, n, case.width, generator=generator)
    if not case.clustered:
        return fresh
    known = torch.Generator().manual_seed(99)
    middles = torch.randn(1, HEADS, case.centroids // 2, case.width, generator=known)
    which = torch.randint(0, case.centroids // 2, (n,), generator=generator)
    alone = torch.arange(n) % OPENING == 0
    return torch.where(alone[:, None], fresh, middles[:, :, which] + 0.3 * fresh)


def losers(case: Case, n: int, seed: int, device: str) -> Losers:
    k = keys(case, n, seed)
    values = torch.randn(k.shape, generator=torch.Generator().manual_seed(seed + 1))
    positions = torch.arange(n).int().expand(1, HEADS, n)
    valid = torch.ones(1, HEADS, n, dtype=torch.bool)
    parts = k, values, torch.zeros(1, HEADS, n), positions, valid
    return Losers(*(x.to(device) for x in parts))


def part(of: Losers, start: int, stop: int) -> Losers:
    fields = of.keys, of.values, of.mass, of.positions, of.valid
    return Losers(*(x[:, :, start:stop] for x in fields))


def full(case: Case, device: str) -> tuple[Block, Memory]:
    """As many centroids as may be, one token each; nothing waits."""
    n, room = case.centroids, case.rules.centroids
    k = losers(case, room, 5, device)
    used = torch.arange(room, device=device) < n
    mass = torch.where(used, 0.0, float("-inf")).expand(1, HEADS, room).clone()
    meta = {"mass": mass, "positions": k.positions.float()}
    held = Block(k.keys, k.values, torch.full((1, HEADS), n), meta)
    return held, {name: x.to(device) for name, x in case.rules.memory(1, HEADS).items()}


def call(case: Case, device: str) -> Callable[[], Any]:
    """Takes in `case.tokens()` tokens, from the same state each time."""
    rules, n = case.rules, case.tokens()
    held, memory = full(case, device)
    arriving = losers(case, n, 1, device)
    folds = [part(arriving, i, i + (case.fold or n)) for i in range(0, n, case.fold or n)]

    def run() -> Block:
        block, remembered = held, memory
        for fold in folds:
            block, remembered = ingest(rules, fold, block, remembered)
        return block

    return run


def loop_seconds(case: Case, n: int) -> float:
    """Per token, of the reference in plain Python."""
    held, arriving = full(case, "cpu")[0], losers(case, n, 1, "cpu")

    def clusters(k: torch.Tensor, v: torch.Tensor, head: int, count: int) -> list[Cluster]:
        lists = zip(k[0, head, :count].tolist(), v[0, head, :count].tolist(), strict=True)
        return [Cluster([a], [b], float(i), 1.0) for i, (a, b) in enumerate(lists)]

    loops = [
        Loop(case.rules, list(clusters(held.keys, held.values, head, case.centroids)))
        for head in range(HEADS)
    ]
    tokens = [clusters(arriving.keys, arriving.values, head, n) for head in range(HEADS)]
    start = time.process_time()
    for loop, mine in zip(loops, tokens, strict=True):
        loop.fold(mine)
    return (time.process_time() - start) / n


def measure(given: argparse.Namespace, centroids: int, width: int, clustered: bool) -> list[dict]:
    device = given.device

    def synchronised() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    clock = time.process_time if device == "cpu" else synchronised
    cases = [Case(centroids, width, clustered, *setting) for setting in SETTINGS]
    times = interleaved({str(c): call(c, device) for c in cases}, given.repeats, 1, clock)

    def row(case: Case, engine: str, n: int, seconds: list[float]) -> dict[str, Any]:
        return {
            **provenance(given.threads), "device": device, "engine": engine,
            "keys": "clustered" if clustered else "dissimilar", "centroids": centroids, "width": width,
            "heads": HEADS, "fold": case.fold or n, "block": case.block,
            "flush_threshold": case.threshold, "flush_interval": case.interval, "tokens": n,
            "repeats": len(seconds), "us_per_token": round(statistics.median(seconds) * 1e6 / n, 1),
        }  # fmt: skip

    rows = []
    for case in cases:
        n, none = case.tokens(), Case(centroids, width, clustered, case.fold, case.block, 0, 0)
        per_token = [[x / c.tokens() for x in times[str(c)]] for c in (case, none)]
        ratio = paired_ratio(*per_token)
        found = row(case, "batched", n, times[str(case)])
        names = ("ratio", "q25", "q75")
        rows.append({**found, **{k: round(x, 3) for k, x in zip(names, ratio, strict=True)}})
    if device == "cpu" and centroids in LOOP_TOKENS:
        case, n = Case(centroids, width, clustered, WHOLE, 16, 0, 0), LOOP_TOKENS[centroids]
        found = row(case, "loop", n, [loop_seconds(case, n) * n])
        rows.append({**found, "ratio": "", "q25": "", "q75": ""})
    for r in rows:
        print(f"{r['engine']:8s} {r['keys']:10s} {centroids:5d} x {width:3d}  fold {r['fold']:4d} block "
              f"{r['block']:2d} flush {r['flush_threshold']:3d}/{r['flush_interval']:3d}: "
              f"{r['us_per_token']:9.1f} us per token, {r['ratio']}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--centroids", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry-run", action="store_true", help="print, but write no rows")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch sees no GPU")
    torch.set_num_threads(given.threads)
    rows = []
    with torch.inference_mode():
        for centroids in given.centroids:
            for width in given.widths:
                for clustered in (False, True):
                    rows += measure(given, centroids, width, clustered)
    if not given.dry_run:
        append_rows("aggregator", rows)
    print(f"{time.process_time():.0f} CPU seconds")


if __name__ == "__main__":
    main()
