"""The same kernels for AMD's gfx942, as far as triton can: compiled, no spills, on the matrix cores, in 64 KiB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fnmatch import fnmatchcase

import pytest
import triton

from tests.support import ROOT

SHARED = 65536
"""Bytes of a gfx942's local data share."""
EXCEPTIONS = {
    "torch-cuda/wn.gemm.int4 bfloat16 g32 * tile 128x128*": "the tile is sm_80's; on gfx942 it spills 4 registers",
}
"""Globs over row and case, and why they are not asked to pass."""
EVERY = bool(os.environ.get("QCOMPILER_FULL"))
SECONDS = 900 if EVERY else 240


@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
    reason="triton before 3.9 takes minutes to emulate 8-bit floats on gfx942",
)
def test_gfx942() -> None:
    command = [sys.executable, "-m", "tests.backends.triton.compiled.amd", *(["all"] if EVERY else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) >= 8
    wrong = []
    for case in found:
        name = f"{case['row']} {case['case']}"
        if any(fnmatchcase(name, pattern) for pattern in EXCEPTIONS):
            continue
        if case["error"]:
            wrong.append(f"{name}: {case['error']}")
            continue
        if case["spills"]:
            wrong.append(f"{name}: {case['spills']} registers spill")
        if case["shared"] > SHARED:
            wrong.append(f"{name}: {case['shared']} bytes of shared memory")
        if case["products"] and not case["matrix"]:
            wrong.append(f"{name}: no matrix instruction")
    assert not wrong, "\n" + "\n".join(wrong)
