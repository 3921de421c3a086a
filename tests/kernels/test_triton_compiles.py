"""The kernels compile for GPUs: what the interpreter takes is more than what the compiler does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("compile_triton.py")


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.full), 90])
def test_kernels_compile_and_fit(tmp_path, capability):
    """Shared memory of a block: 163 KiB on an A100, 227 KiB on an H100 or H200."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    names = ["dense", "int4", "int3_channel", "planes", "exact", "encode", "compact", "centroids"]
    if capability == 80:
        names += ["int8", "fp8", "levels", "pre_rope"]
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability), *names],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    shared = [int(line.split()[-1]) for line in ran.stdout.splitlines()]
    assert len(shared) >= len(names)
    assert max(shared) <= {80: 163, 90: 227}[capability] << 10
