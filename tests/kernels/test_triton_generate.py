"""`generate()` by the Triton kernels alone, in their interpreter: the tokens of the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kvloom import CompressedCache
from kvloom.kernels import ops, triton_backend
from tests.kernels import stores
from tests.kernels.test_triton import _forced  # noqa: F401


@pytest.mark.parametrize(
    ("recipe", "budget"),
    [
        ("none", None),
        ("int4", None),
        ("kivi(residual=32)", None),
        ("streaming_llm(sinks=2) | int4", "100tok"),
        ("h2o | int8", "100tok"),
        ("mp_kvm(max_centroids=4) | int8", "100tok"),
    ],
)
def test_generate(monkeypatch, recipe, budget):
    """A prompt, a page that fills up while decoding, and what the recipe does then."""
    model = stores.model(2, 1, 32, torch.float32)
    prompt = torch.randint(0, 32, (1, 125), generator=torch.Generator().manual_seed(3))
    launches = []
    monkeypatch.setattr(triton_backend, "kernels", _counted(triton_backend.kernels, launches))
    made = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv("KVLOOM_BACKEND", backend)
        ops.forced_backend.cache_clear()
        cache = CompressedCache(model, recipe, budget)
        made[backend] = model.generate(
            prompt, past_key_values=cache, max_new_tokens=5, min_new_tokens=5, do_sample=False
        ).tolist()
        assert bool(launches) == (backend == "triton")
    assert made["triton"] == made["reference"]
    assert "attention" in launches


def _counted(kernels, launches):
    def found(name):
        launches.append(name)
        return kernels(name)

    return found
