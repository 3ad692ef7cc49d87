"""``--check`` on the repair recipe: lifting is exact, freeing activations keeps its bound, and nothing else moves."""

from __future__ import annotations

from pathlib import Path

import pytest

import qcompiler
from tests.repair.harness import saved
from tests.repair.test_corpus import every_case

EXACT = (
    "nbits8-g64-acc0",
    "nbits4-g_idx",
    "w8a8-gemm-float-bias",
    "dyn-qdq-bias",
    "conv-no-output-q",
    "spelled-unpack",
)
LOSSY = ("w8a8-block", "w8a8-u16")


@pytest.mark.parametrize("name", [*EXACT, *LOSSY])
def test_every_pass_keeps_its_promise(name: str, tmp_path: Path) -> None:
    path = saved(every_case()[name].model, tmp_path)
    report = qcompiler.compile(
        str(path), target="ort-cpu", recipe="repair", out=str(tmp_path / "repaired.onnx"), check=True
    ).report
    assert report.accepted
    checks = {c.name: c for c in report.checks}
    lifted = checks["lift-quantized"]
    assert (lifted.kind, lifted.compared > 0) == ("exact", True)
    assert lifted.error <= lifted.bound
    assert (checks["free-activations"].drift > 0) == (name in LOSSY)
