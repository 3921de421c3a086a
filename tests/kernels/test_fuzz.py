"""Random lives of a layer: whatever lengths, strides and page tables come of them, the kernels read right.

`make test-kernels` runs this with sanitizers, which see reads beyond a tensor that happen to do no harm.
`KVLOOM_FUZZ=2000` runs so many lives.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

from kvloom import CompressedCache
from kvloom.core.attend import Call
from kvloom.core.slab import Slab
from kvloom.core.store import LayerStore
from kvloom.kernels import ops
from tests.kernels import stores
from tests.kernels.test_cpu import OTHERS, UNIFORM, assert_close

pytestmark = pytest.mark.skipif(
    ops.cpu_refusal() is not None, reason=f"no C++ kernels: {ops.cpu_refusal()}"
)
LIVES = int(os.environ.get("KVLOOM_FUZZ", 24))
SCORERS = [
    "", "knorm", "random", "h2o", "streaming_llm(positions='original')", "streaming_llm", "knorm | ada",
    "snapkv | pyramid", "h2o | mass_fold", "mp_kvm(max_centroids=5)",
]  # fmt: skip
STEPS = 7


class Life:
    """A store and what may happen to it."""

    def __init__(self, seed: int):
        self.rng = rng = random.Random(seed)
        self.B, self.H, self.G = (
            rng.choice((1, 1, 2, 3)),
            rng.choice((1, 2, 4)),
            rng.choice((1, 2, 5)),
        )
        self.D = rng.choice((16, 32, 64, 80))
        scorer, fmt = rng.choice(SCORERS), rng.choice([*UNIFORM, *OTHERS])
        if fmt == "none":  # a few hundred entries without pages, and with
            fmt = rng.choice(("", "dense(unpaged=0)"))
        self.recipe = " | ".join(x for x in (scorer, fmt) if x) or "none"
        self.budget = f"{rng.randint(140, 300)}tok" if scorer else None
        self.seen = 0
        self.told: dict[Slab, tuple[int, list[int]]] = {}
        self.store = self._store()
        self.grow(rng.randint(1, 260))

    def _store(self) -> LayerStore:
        model = stores.model(self.H * self.G, self.H, self.D, torch.float32)
        layer = CompressedCache(model, self.recipe, budget=self.budget).layers[0]
        keys, values = stores.entries(self.B, self.H, 1, self.D)
        layer.lazy_initialization(keys, values)
        return layer.store

    def grow(self, n: int) -> None:
        """A forward of n tokens, of which the last few may be rejected drafts."""
        keys, values = stores.entries(self.B, self.H, n, self.D, seed=self.seen)
        positions = torch.arange(self.seen, self.seen + n).expand(self.B, -1)
        query = torch.randn(self.B, self.H, self.G, n, self.D)
        call = Call(query, self.D**-0.5, positions=positions)
        _, forward = self.store.forward(keys, values, call, None, positions)
        self.store.commit(forward)
        self.seen += n

    def reorder(self) -> None:
        """As beam search does: rows repeated, dropped, in any order."""
        index = [self.rng.randrange(self.B) for _ in range(self.B)]
        self.store.rows(torch.tensor(index))

    def check_versions(self) -> None:
        """A slab of the same version has its tensors where they were."""
        for slab in self.store.pool.slabs:
            extra = [x for x in (slab.alive, slab.base) if x is not None]
            tables = [slab.first, slab.used, slab.skip, *slab.meta.values()]
            now = slab.version, [x.data_ptr() for x in (*slab.codes(), *extra, *tables)]
            version, places = self.told.get(slab, now)
            assert version < slab.version or places == now[1]
            self.told[slab] = now

    def step(self) -> None:
        what = self.rng.random()
        if what < 0.2:
            self.reorder()
        elif what < 0.6:
            self.grow(1)
        else:
            self.grow(self.rng.choice((2, 5, 63, 64, 65, 130)))


@pytest.mark.parametrize("seed", range(LIVES))
def test_whatever_a_layer_has_been_through(seed: int) -> None:
    torch.manual_seed(seed)
    life = Life(seed)
    for step in range(STEPS):
        life.step()
        life.check_versions()
        queries = life.rng.choice((1, 1, 2, 7, 16))
        call = stores.call_of(life.store, life.G, queries, seed=step)
        got, want = life.store.native.attend(life.store, call), stores.exact(life.store, call)
        where = f"{life.recipe} @ {life.budget}, step {step}"
        seen = torch.isfinite(want[1])
        assert torch.equal(torch.isfinite(got[1]), seen), where
        assert_close(got[1][seen], want[1][seen], 2e-5)
        assert_close(got[0][seen], want[0][seen], 2e-5)
