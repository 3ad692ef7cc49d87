"""What the rows say of chips that are not at hand, under an emulator: AVX2 without VNNI, and SSE alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from qcompiler.backends.chips import detect_features
from tests.support import ROOT

QEMU = os.environ.get("QCOMPILER_QEMU") or shutil.which("qemu-x86_64")
needs_qemu = pytest.mark.skipif(
    QEMU is None, reason="no qemu-x86_64 on the path (Debian: qemu-user); or name it in QCOMPILER_QEMU"
)
PLAIN_BLAS = {"OPENBLAS_NUM_THREADS": "1", "OPENBLAS_CORETYPE": "Nehalem"}
"""NumPy's OpenBLAS asks the wrong questions of an emulated chip and would take instructions that it has not."""


def _probe(*prefix: str) -> dict[str, Any]:
    command = [*prefix, sys.executable, "-m", "tests.backends.onnx.chip_probe"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **PLAIN_BLAS}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _assert_fused(found: dict[str, Any]) -> None:
    linear = {name: case for name, case in found.items() if "MatMulNBits" in name}
    assert len(linear) == 16
    for name, case in found.items():
        assert case["error"] <= (1 if name in linear else 0), (name, case)
        assert case.get("fallbacks", 0) == 0, name
        assert case["temp"] < case.get("expanded", 1), name


@pytest.mark.skipif("avx2" not in detect_features(), reason="this chip has no AVX2")
def test_every_row_on_this_chip() -> None:
    _assert_fused(_probe())


@needs_qemu
def test_every_row_on_avx2_without_vnni() -> None:
    _assert_fused(_probe(str(QEMU), "-cpu", "Haswell"))


@needs_qemu
def test_without_avx2_every_linear_row_expands_its_weight() -> None:
    """Why the rows need AVX2. Numbers are right there too, but those of full-precision activations."""
    for name, case in _probe(str(QEMU), "-cpu", "Nehalem").items():
        if "MatMulNBits" in name:
            assert case["fallbacks"] == 6, name
            assert case["temp"] >= case["expanded"], name
        else:
            assert case == {"temp": 0, "error": 0.0}, name
