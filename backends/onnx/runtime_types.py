"""The part of the kernel table that the installed ONNX Runtime itself states: which kernels it has, for which types.

The rows were measured on the versions in :data:`MEASURED_ON`. Another version may have other kernels behind the same
nodes, so what is installed is compared with the rows before they are relied on (QC207).
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata

from qcompiler.errors import InputError
from qcompiler.target import KernelRow, Reason

MEASURED_ON = ("1.31",)
"""Versions (major.minor) of ONNX Runtime on which the rows were measured."""

_PACKAGES = ("onnxruntime", "onnxruntime-gpu")
_PROVIDERS = {"ort-cpu": "CPUExecutionProvider", "ort-cuda": "CUDAExecutionProvider"}
_TYPES = {
    "tensor(float)": "f32",
    "tensor(double)": "f64",
    "tensor(float16)": "f16",
    "tensor(bfloat16)": "bf16",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
}
_OPERANDS: dict[str, tuple[str, dict[str, str]]] = {
    "MatMulNBits": ("T1", {"T2": "uint8", "T3": "uint8"}),
    "GatherBlockQuantized": ("T2", {"T1": "uint8", "Tind": "tensor(int64)"}),
}
"""Op -> the type variable of its activations, and what our nodes put into the others."""

_CODED: dict[str, tuple[str, str]] = {
    "QLinearMatMul": ("T1", "T2"),
    "QLinearConv": ("T1", "T2"),
    "ConvInteger": ("T1", "T2"),
    "MatMulIntegerToFloat": ("T1", "T2"),
    "QGemm": ("TA", "TB"),
    "DynamicQuantizeMatMul": ("", "T2"),
    "QLinearAdd": ("T", ""),
    "QLinearMul": ("T", ""),
    "QLinearSigmoid": ("T", ""),
    "QLinearLeakyRelu": ("T", ""),
    "QLinearSoftmax": ("T", ""),
    "QLinearConcat": ("", ""),
    "QLinearAveragePool": ("", ""),
    "QLinearGlobalAveragePool": ("", ""),
    "DynamicQuantizeLinear": ("T2", ""),
    "QuantizeLinear": ("T2", ""),
    "DequantizeLinear": ("T1", ""),
}
"""Op -> the type variables of the codes of its activations and of its weights; empty where it constrains none."""
_KINDS = {"u8": "uint8", "s8": "int8"}

# Run in a process of its own: with CUDA built in but its libraries absent, the call ends the process.
_LIST = """
import json
from onnxruntime.capi import onnxruntime_pybind11_state as state
ops = {ops!r}
print(json.dumps([
    [d.provider, d.op_name, {{k: [str(t) for t in v] for k, v in d.type_constraints.items()}}]
    for d in state.get_all_opkernel_def() if d.domain in ("", "com.microsoft") and d.op_name in ops
]))
"""


@dataclass(frozen=True)
class InstalledKernel:
    """One registered kernel: type variable -> the types it takes, in our names where we have one."""

    provider: str
    op: str
    types: Mapping[str, frozenset[str]]

    def takes(self, variable: str, name: str) -> bool:
        """True when ``variable`` may be ``name``; a variable that the kernel does not constrain takes anything."""
        return name in self.types.get(variable, frozenset({name}))


def installed_version() -> str | None:
    """The version of the installed ONNX Runtime, or None."""
    for package in _PACKAGES:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


@functools.cache
def installed_kernels() -> tuple[InstalledKernel, ...]:
    """The low-bit kernels that the installed ONNX Runtime registers; raises InputError where it does not say."""
    script = _LIST.format(ops=sorted({*_OPERANDS, *_CODED, "Mul"}))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
        raise InputError(f"the installed ONNX Runtime does not list its kernels: {last}")
    return tuple(
        InstalledKernel(provider, op, {k: frozenset(_TYPES.get(t, t) for t in v) for k, v in types.items()})
        for provider, op, types in json.loads(done.stdout.splitlines()[-1])
    )


def _missing(row: KernelRow, version: str, kernels: Iterable[InstalledKernel]) -> list[Reason]:
    backend, _, kernel = row.name.partition("/")
    op, provider = kernel.partition(".")[0], _PROVIDERS[backend]
    here = [k for k in kernels if (k.provider, k.op) == (provider, op)]
    if not here:
        message = f"ONNX Runtime {version} has no {op} for {provider}"
        return [Reason("QC207", message, f"install ONNX Runtime {MEASURED_ON[-1]}")]
    if op in _CODED:
        return _missing_codes(row, version, op, here)
    variable, others = _OPERANDS.get(op, ("T", {}))
    return [
        Reason("QC207", f"{op} of ONNX Runtime {version} takes no {activation} activations on {provider}")
        for activation in sorted(row.activations)
        if not any(k.takes(variable, activation) and all(k.takes(*o) for o in others.items()) for k in here)
    ]


def _missing_codes(row: KernelRow, version: str, op: str, here: Iterable[InstalledKernel]) -> list[Reason]:
    """The code types that the name of a row tells of: ``u8s8``, or ``u8``; all that it takes where it tells none."""
    word = next((w for w in row.name.split(".")[1:] if w[:2] in _KINDS), "")
    activations = {_KINDS[word[:2]]} if word else row.x_codes or row.codes
    weight = _KINDS.get(word[2:], "")
    x, w = _CODED[op]
    provider = _PROVIDERS[row.name.partition("/")[0]]
    return [
        Reason("QC207", f"{op} of ONNX Runtime {version} takes no {a} x {weight or a} codes on {provider}")
        for a in sorted(activations)
        if not any(k.takes(x, a) and (not weight or k.takes(w, weight)) for k in here)
    ]


def why_not_installed(
    rows: Iterable[KernelRow], version: str | None = None, kernels: Iterable[InstalledKernel] | None = None
) -> dict[str, list[Reason]]:
    """Row name -> why the installed ONNX Runtime does not back that row (QC207); rows that it backs are left out.

    ``version`` and ``kernels`` stand for another installation.
    """
    version = version or installed_version()
    if version is None:
        reason = Reason("QC207", "ONNX Runtime is not installed", f"install onnxruntime {MEASURED_ON[-1]}")
        return {row.name: [reason] for row in rows}
    common: list[Reason] = []
    if ".".join(version.split(".")[:2]) not in MEASURED_ON:
        known = ", ".join(MEASURED_ON)
        message = f"the kernel rows were measured on ONNX Runtime {known}, installed is {version}"
        common = [Reason("QC207", message, "rely on measured evidence only, or install the version named")]
    try:
        found = tuple(installed_kernels() if kernels is None else kernels)
    except InputError as e:
        return {row.name: [*common, Reason("QC207", str(e))] for row in rows}
    reasons = {row.name: common + _missing(row, version, found) for row in rows}
    return {name: why for name, why in reasons.items() if why}
