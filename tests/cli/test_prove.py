"""``qcompiler kernels --prove``: the table, the status and who may ask. The compiling itself is replaced here."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import pytest

from qcompiler.backends.triton import families
from qcompiler.backends.triton.proving import KernelFigures, Proof
from tests.cli.conftest import Run

KERNEL = KernelFigures("linear_kernel", 96, 75776, 0, 0, "HGMMA", 16, 16, 391, 2.413, 4, 0.7)
GOOD = Proof("torch-cuda/wn.gemm.int4", "bf16 g128 M=256 4096x4096", 90, (KERNEL,), ())
BAD = replace(GOOD, case="bf16 g64", kernels=(replace(KERNEL, spills=12, stack=64),), faults=("linear_kernel spills",))
WITHOUT = Proof("torch-cuda/wn.gemv.int4", "f16", 90, (), ("does not compile for sm_90: no such thing",))
SPLIT = replace(GOOD, kernels=(KERNEL, replace(KERNEL, name="reduce_kernel", matrix="", matrix_count=0, narrowest=0)))


def _answer(monkeypatch: pytest.MonkeyPatch, *proofs: Proof) -> list[str]:
    asked: list[str] = []

    def prove_target(target: str, progress: Any = None) -> list[Proof]:
        asked.append(target)
        return list(proofs)

    monkeypatch.setattr(families, "prove_target", prove_target)
    return asked


def test_all_hold(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _answer(monkeypatch, GOOD, SPLIT)
    status, out, err = run("kernels", "--target", "torch-cuda:sm_90", "--prove")
    assert (status, err, asked) == (0, "", ["torch-cuda:sm_90"])
    assert "verdict: accepted" in out.splitlines()[-1]
    assert "3 kernels compiled; 2 of 2 claims proved" in out
    for cell in ("torch-cuda/wn.gemm.int4", "96", "74", "16 HGMMA", "16 B", "2.41", "reduce_kernel", "proved"):
        assert cell in " ".join(out.split())


def test_one_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _answer(monkeypatch, GOOD, BAD, WITHOUT)
    status, out, _ = run("kernels", "--target", "torch-cuda:sm_90", "--prove")
    assert status == 1
    assert "torch-cuda/wn.gemm.int4 bf16 g64, sm_90: linear_kernel spills" in out
    assert "1 of 3 claims proved; verdict: rejected" in out


def test_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _answer(monkeypatch, GOOD, BAD)
    status, out, _ = run("kernels", "--target", "torch-cuda:sm_90", "--prove", "--json")
    assert status == 1
    good, bad = json.loads(out)
    assert (good["holds"], bad["holds"], bad["faults"]) == (True, False, ["linear_kernel spills"])
    assert good["kernels"][0]["registers"] == 96


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("ort-cpu", "those of torch-cuda can be proved"),
        ("torch-cuda:sm_75", "names no architecture from sm_80 on"),
        ("torch-cuda:hopper", "names no architecture from sm_80 on"),
    ],
)
def test_targets_without_proofs(run: Run, target: str, said: str) -> None:
    status, out, err = run("kernels", "--target", target, "--prove")
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_no_triton(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    status, out, err = run("kernels", "--target", "torch-cuda:sm_90", "--prove")
    assert (status, out) == (2, "")
    assert "triton, which is not installed" in err
    assert err.count("\n") == 1
