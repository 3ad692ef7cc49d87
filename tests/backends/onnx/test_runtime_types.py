"""The rows against what the installed ONNX Runtime registers (QC207)."""

from __future__ import annotations

import dataclasses

import pytest

from qcompiler.backends.onnx import runtime_types
from qcompiler.backends.onnx.kernels import CPU_ROWS, CUDA_ROWS
from qcompiler.backends.onnx.runtime_types import (
    MEASURED_ON,
    InstalledKernel,
    installed_kernels,
    installed_version,
    why_not_installed,
)
from qcompiler.errors import InputError

MEASURED = f"{MEASURED_ON[-1]}.0"


def test_the_installed_runtime_backs_every_cpu_row() -> None:
    """The pinned runtime is the one the rows were measured on, and it registers the types that they claim."""
    assert why_not_installed(CPU_ROWS) == {}


def test_no_cpu_row_leaves_out_an_activation_type_that_the_runtime_has() -> None:
    """A type that the wheel registers and no row takes would be a kernel that nobody measured."""
    for op, variable in (("MatMulNBits", "T1"), ("GatherBlockQuantized", "T2")):
        registered = {
            t
            for k in installed_kernels()
            if (k.provider, k.op) == ("CPUExecutionProvider", op)
            and k.takes("T1", "uint8" if variable == "T2" else "f32")
            for t in k.types[variable]
        }
        rows = [r for r in CPU_ROWS if r.name.startswith(f"ort-cpu/{op}")]
        assert registered <= frozenset.union(*(r.activations for r in rows))


def test_another_version_is_named_once_a_row() -> None:
    reasons = why_not_installed(CPU_ROWS, version="1.23.2")
    assert set(reasons) == {r.name for r in CPU_ROWS}
    for (reason,) in reasons.values():
        assert reason.code == "QC207"
        assert "installed is 1.23.2" in reason.message


def test_types_that_are_not_registered_are_named() -> None:
    kernels = [
        dataclasses.replace(k, types={**k.types, "T1": frozenset({"f32"})})
        for k in installed_kernels()
        if k.op == "MatMulNBits" and "f32" in k.types["T1"]
    ]
    reasons = why_not_installed(CPU_ROWS, MEASURED, kernels)
    assert [r.message for r in reasons["ort-cpu/MatMulNBits.int8"]] == [
        f"MatMulNBits of ONNX Runtime {MEASURED} takes no f16 activations on CPUExecutionProvider"
    ]
    (gone,) = reasons["ort-cpu/GatherBlockQuantized"]
    assert gone.message == f"ONNX Runtime {MEASURED} has no GatherBlockQuantized for CPUExecutionProvider"


def test_cuda_rows_need_a_runtime_with_cuda() -> None:
    only_cpu = [k for k in installed_kernels() if k.provider == "CPUExecutionProvider"]
    assert set(why_not_installed(CUDA_ROWS, MEASURED, only_cpu)) == {r.name for r in CUDA_ROWS}
    types = {v: frozenset({"f32", "f16", "bf16", "uint8", "tensor(int64)"}) for v in ("T", "T1", "T2", "T3", "Tind")}
    ops = ("MatMulNBits", "GatherBlockQuantized", "Mul")
    cuda = [InstalledKernel("CUDAExecutionProvider", op, types) for op in ops]
    assert why_not_installed(CUDA_ROWS, MEASURED, cuda) == {}


def test_integer_kernels_need_both_code_types() -> None:
    """A runtime that multiplies uint8 by uint8 alone does not back the rows for int8 weights or activations."""
    kernels = [
        dataclasses.replace(k, types={**k.types, "T1": frozenset({"uint8"}), "T2": frozenset({"uint8"})})
        for k in installed_kernels()
        if k.op == "QLinearConv"
    ]
    reasons = why_not_installed([r for r in CPU_ROWS if "QLinearConv" in r.name], MEASURED, kernels)
    assert set(reasons) == {"ort-cpu/QLinearConv.u8s8", "ort-cpu/QLinearConv.s8s8"}
    (reason,) = reasons["ort-cpu/QLinearConv.u8s8"]
    assert "takes no uint8 x int8 codes" in reason.message


def test_without_a_runtime_each_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_types, "_PACKAGES", ("no-such-runtime",))
    assert installed_version() is None
    (reason,) = why_not_installed(CPU_ROWS)["ort-cpu/MatMulNBits.fp32"]
    assert "not installed" in reason.message


def test_a_runtime_that_ends_the_process_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA built in and its libraries absent, listing the kernels is a segmentation fault."""
    monkeypatch.setattr(runtime_types, "_LIST", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV) # {ops}")
    installed_kernels.cache_clear()
    try:
        with pytest.raises(InputError, match="status"):
            installed_kernels()
        (reason,) = why_not_installed(CPU_ROWS[:1], MEASURED).values()
        assert "does not list its kernels" in reason[0].message
    finally:
        installed_kernels.cache_clear()
