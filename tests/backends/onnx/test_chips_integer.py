"""What the integer rows say of chips that are not at hand, under an emulator: who saturates without VNNI."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from qcompiler.backends.chips import CHIPS, detect_features
from qcompiler.backends.onnx.kernels_integer import INTEGER_ROWS
from tests.backends.onnx.test_chips import PLAIN_BLAS, QEMU, needs_qemu
from tests.support import ROOT

ROWS = {r.name: r for r in INTEGER_ROWS}


def _probe(*prefix: str) -> dict[str, float]:
    command = [*prefix, sys.executable, "-m", "tests.backends.onnx.integer_chip_probe"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **PLAIN_BLAS}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= 60
    return found


def _wrong(found: dict[str, float]) -> set[str]:
    return {case for case, error in found.items() if error > 1}


@pytest.mark.skipif("vnni" not in detect_features(), reason="this chip has no VNNI")
def test_every_row_is_right_with_vnni() -> None:
    assert not _wrong(_probe())


@needs_qemu
def test_without_vnni_only_rows_that_need_it_saturate() -> None:
    """Those of uint8 x int8, on extreme codes: why they need VNNI. All others are exact there."""
    bad = {case.split()[0] for case in _wrong(_probe(str(QEMU), "-cpu", "Haswell"))}
    assert bad
    assert bad == {name for name in bad if "vnni" in ROWS[name].needs}
    products = {r.name for r in INTEGER_ROWS if "vnni" in r.needs}
    assert bad == products


@needs_qemu
def test_sse_alone_is_exact_for_all_of_them() -> None:
    assert not _wrong(_probe(str(QEMU), "-cpu", "Nehalem"))


def test_the_rows_of_a_chip_without_vnni_serve_every_op() -> None:
    for chip in ("sse", "avx2", "avx512"):
        served = {r.op for r in INTEGER_ROWS if r.needs <= CHIPS[chip]}
        assert served == {r.op for r in INTEGER_ROWS}
