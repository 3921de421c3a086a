"""The kernels compile for GPUs: what the interpreter takes is more than what the compiler does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SHORT = ["int4", "step", "encode", "compact", "centroids"]
REST = [
    "none", "int8", "fp8", "int3(keys='channel', channels=32)", "turboquant_mse", "kvquant", "streaming_kvquant",
]  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "names"),
    [
        (90, SHORT),
        pytest.param(90, REST, marks=pytest.mark.full),
        pytest.param(80, SHORT + REST, marks=pytest.mark.full),
    ],
)
def test_kernels_compile_and_fit(tmp_path, capability, names):
    """Shared memory of a block: 163 KiB on an A100, 227 KiB on an H100 or H200."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_triton", str(capability), *names],
        capture_output=True, text=True, check=False, env=environment, cwd=ROOT,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    shared = [int(line.split()[-1]) for line in ran.stdout.splitlines()]
    assert len(shared) >= len(names)
    assert max(shared) <= {80: 163, 90: 227}[capability] << 10
