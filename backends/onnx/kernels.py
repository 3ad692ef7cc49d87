"""ONNX Runtime's low-bit kernels as rows.

A row of ``ort-cpu`` stands here because a test runs that kernel on the installed wheel, compares its numbers
and proves from the runtime's own memory statistics that the weight was never expanded. Rows of ``ort-cuda``
rest on launch traces of the CUDA library and say so in their evidence.

What has no row, and why:
  - 8-bit and 2-bit ``MatMulNBits`` below accuracy_level 4, float zero points, g_idx, codes that are no
    constant: the CPU kernel expands the whole weight on each call.
  - the 2-bit table-lookup kernel: it exists only under the session key ``mlas.use_lut_gemm``, and an .onnx
    file cannot carry a session key.
  - ``MatMulBnb4`` (nf4): the CPU kernel expands the whole weight on each call.
  - Arm: nothing was run there.

The rows of kernels that compute on codes of activations stand in :mod:`qcompiler.backends.onnx.kernels_integer`.
"""

from __future__ import annotations

import re
from typing import Any

from qcompiler.backends.chips import CHIPS, SM, detect_features
from qcompiler.backends.onnx.kernels_integer import CUDA_ABSENT, CUDA_SCALE, INTEGER_ROWS
from qcompiler.errors import InputError
from qcompiler.target import KernelRow, Target

LINEAR_ENTRY = "qcompiler.backends.onnx.lower:matmul_nbits"
LINEAR_LAYOUT = "qcompiler.backends.onnx.layouts:blocks"
TABLE_ENTRY = "qcompiler.backends.onnx.lower:gather_block_quantized"
TABLE_LAYOUT = "qcompiler.backends.onnx.layouts:rows"

_ANY = frozenset({"tensor", "channel", "group"})
_INTEGER_ZEROS = frozenset({"none", "int"})
_MEASURED = "tests/backends/onnx/test_kernels.py ran it: numbers, temporary memory, fallback log"
_TRACED = "static, from launch traces of the CUDA library, not run here"
_REGISTERED = "static, from the kernel registry of the CUDA library, not run here"
_INT8 = "activations are quantized to int8 per block of K, products summed in int32, scaled in f32"


def _linear(name: str, codes: str, groups: set[int], **more: Any) -> KernelRow:
    """A row of ``com.microsoft.MatMulNBits``; ``codes`` are dtype names in one string."""
    fields: dict[str, Any] = {
        "granularities": _ANY,
        "zeros": _INTEGER_ZEROS,
        "activations": frozenset({"f32", "f16"}),
        "entry": LINEAR_ENTRY,
        "layout": LINEAR_LAYOUT,
        "evidence": _MEASURED,
    }
    return KernelRow(name, "q.linear", frozenset(codes.split()), groups=frozenset(groups), **(fields | more))


def _table(name: str, **more: Any) -> KernelRow:
    """A row of ``com.microsoft.GatherBlockQuantized`` on uint8 data."""
    return KernelRow(
        name,
        "q.embedding",
        codes=frozenset({"int2", "uint2", "int4", "uint4", "int8", "uint8"}),
        granularities=_ANY,
        groups=frozenset({16, 32, 64, 128, 256, 512, 1024}),
        zeros=_INTEGER_ZEROS,
        entry=TABLE_ENTRY,
        layout=TABLE_LAYOUT,
        numerics="exact: (code - zero) * scale of the gathered rows only",
        bias=False,
        note="table [V, bytes], or [V, blocks, bytes] where a MatMulNBits reads it too; ids out of range give zeros",
        **more,
    )


_AVX2 = frozenset({"avx2"})

CPU_ROWS: tuple[KernelRow, ...] = (
    _linear(
        "ort-cpu/MatMulNBits.int8",
        "int4 uint4 int8 uint8",
        {16, 32, 64, 128, 256},
        needs=_AVX2,
        numerics=_INT8,
        note="accuracy_level 4; f16 activations are widened to f32 first",
    ),
    _linear(
        "ort-cpu/MatMulNBits.w2int8",
        "int2 uint2",
        {32, 64, 128},
        needs=_AVX2,
        numerics=_INT8,
        note="accuracy_level 4; groups of 16 and 256 would expand the weight",
    ),
    _linear(
        "ort-cpu/MatMulNBits.fp32",
        "int4 uint4",
        {16, 32, 64, 128, 256},
        needs=_AVX2,
        numerics="f32 products and sums; above M=1 the kernel unpacks 32 columns at a time into cache",
        note="accuracy_level 0; f16 activations are widened to f32 first",
        rank=1,
    ),
    _table("ort-cpu/GatherBlockQuantized", activations=frozenset({"f32", "f16"}), evidence=_MEASURED),
    *INTEGER_ROWS,
)

_INT8_ROWS = frozenset({"ort-cpu/MatMulNBits.int8", "ort-cpu/MatMulNBits.w2int8"})


def accuracy_level(row: KernelRow) -> int:
    """The ``accuracy_level`` that makes ``MatMulNBits`` take the kernel of ``row``: 4 for int8 activations, else 0."""
    return 4 if row.name in _INT8_ROWS else 0


def _gemv(bits: int, groups: set[int], m_max: int, activations: str) -> KernelRow:
    return _linear(
        f"ort-cuda/MatMulNBits.gemv{bits}",
        f"int{bits} uint{bits}",
        groups,
        activations=frozenset(activations.split()),
        evidence=_TRACED,
        needs=frozenset({"cuda", "sm_75"}),
        n_multiple=8,
        k_multiple=8,
        m_max=m_max,
        numerics="sums in the activation's type or wider",
        note="a bias runs as a kernel of its own; above m_max the weight is expanded for cuBLAS",
        rank=1,
    )


def _fpa_intb(bits: int, activation: str, sm: str, n_multiple: int, group: int) -> KernelRow:
    return _linear(
        f"ort-cuda/MatMulNBits.fpA_intB{bits}.{activation}",
        f"int{bits} uint{bits}",
        {group},
        zeros=frozenset({"none"}),
        activations=frozenset({activation}),
        evidence=_TRACED,
        needs=frozenset({"cuda", sm}),
        n_multiple=n_multiple,
        k_multiple=group,
        bias=False,
        numerics=f"{activation} products, f32 sums",
        note="CUTLASS GemmFpAIntB at every M; without the session key the weight is expanded for cuBLAS",
        session=(("ep.cuda.fpa_intb_gemm", "1"),),
    )


CUDA_ROWS: tuple[KernelRow, ...] = (
    *(
        _fpa_intb(bits, activation, sm, n_multiple, group)
        for bits, n_multiple, group in ((4, 64, 32), (8, 32, 32), (2, 128, 64))
        for activation, sm in (("f16", "sm_75"), ("bf16", "sm_80"))
    ),
    _gemv(4, {16, 32, 64, 128}, 16, "f32 f16 bf16"),
    _gemv(8, {16, 32, 64, 128, 256}, 5, "f32 f16 bf16"),
    _gemv(2, {16, 32, 64, 128, 256}, 8, "f16"),
    _table(
        "ort-cuda/GatherBlockQuantized",
        activations=frozenset({"f32", "f16", "bf16"}),
        evidence=_REGISTERED,
        needs=frozenset({"cuda"}),
    ),
    CUDA_SCALE,
)

DEFAULT_SM = 80


def chips(name: str) -> tuple[str, ...]:
    """The architecture words that target ``name`` takes; empty for a target that is not here."""
    return {"ort-cpu": tuple(CHIPS), "ort-cuda": tuple(f"sm_{s}" for s in SM)}.get(name, ())


def target(spec: str) -> Target:
    """``ort-cpu`` (this machine's chip), ``ort-cpu:ARCH``, ``ort-cuda`` (sm_80 assumed), ``ort-cuda:sm_XX``.

    Raises InputError that lists the known words.
    """
    name, _, arch = spec.partition(":")
    if name == "ort-cpu":
        if arch and arch not in CHIPS:
            raise InputError(f"target {spec!r}: no chip called {arch!r}; known: {', '.join(CHIPS)}")
        return Target(name, arch, CHIPS[arch] if arch else detect_features(), CPU_ROWS, "onnx")
    if name == "ort-cuda":
        found = re.fullmatch(r"sm_(\d+)", arch or f"sm_{DEFAULT_SM}")
        if found is None or int(found[1]) not in SM:
            known = ", ".join(f"sm_{s}" for s in SM)
            raise InputError(f"target {spec!r}: no architecture called {arch!r}; known: {known}")
        has = {f"sm_{s}" for s in SM if s <= int(found[1])}
        return Target(name, arch, frozenset({"cuda"} | has), CUDA_ROWS, "onnx", CUDA_ABSENT)
    raise InputError(f"no target {spec!r} here; known: ort-cpu, ort-cuda, each with an optional :ARCH")
