"""Shared settings: no gradients, fixed threads, nothing random left to chance."""

from __future__ import annotations

import os
import zlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# against oracles, products are fp32; what integers add to the error is tests/kernels/test_cpu.py
os.environ.setdefault("KVLOOM_CPU_MODE", "exact")

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton, which reads it then
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "KVLOOM_TEST_MODULE" in os.environ:  # kernels built otherwise: emulated, or with sanitizers
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location("_cpu", os.environ["KVLOOM_TEST_MODULE"])
    import kvloom.kernels as kernels

    kernels._cpu = sys.modules["kvloom.kernels._cpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernels._cpu)

torch.set_num_threads(1)  # the models are tiny, and the workers of xdist share the cores


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def pytest_addoption(parser):
    parser.addoption("--shard", default="1/1", help="i/n: the i-th of n parts of the tests")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark the error cases, and keep one shard. A test belongs to the same one on every machine, whatever else is selected."""
    try:
        part, parts = map(int, config.getoption("--shard").split("/"))
    except ValueError:
        part = parts = 0
    if not 1 <= part <= parts:
        shard = config.getoption("--shard")
        raise pytest.UsageError(f"--shard {shard}: write i/n with 1 <= i <= n")
    for item in items:  # what can go wrong must be said clearly on every version
        if item.path.name == "test_bad_input.py":
            item.add_marker("oldest")
    kept, dropped = [], []
    for item in items:
        mine = zlib.crc32(item.nodeid.encode()) % parts == part - 1
        (kept if mine else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
