"""torch's low-bit CPU kernels as rows, and the targets ``torch-cpu`` and ``torch-cuda``.

A row stands here because a test runs that kernel, compares its numbers and watches what it allocates. Rows of kernels
that compute on codes of activations stand in :mod:`qcompiler.backends.torch.kernels_integer`.

What has no row on a CPU, and why:
  - 2-bit codes: torch has no kernel for them.
  - 8-bit codes with zero points or in groups: ``_weight_int8pack_mm`` has one scale a row and no zero points; the
    nearest is ``int8 channel sym``.
  - ``_dyn_quant_matmul_4bit``: reference code on x86, 30 times slower than ``_weight_int4pack_mm_for_cpu``.
  - fp8 (``_scaled_mm``, ``onednn.qlinear_pointwise``): slower than dequantizing the weight and multiplying in f32.
  - Arm: nothing was run there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from qcompiler.backends.chips import CHIPS, SM, detect_features
from qcompiler.backends.torch.kernels_integer import CPU_ABSENT, INTEGER_ROWS, runs_with
from qcompiler.backends.triton.targets import cuda_target
from qcompiler.errors import InputError
from qcompiler.target import KernelRow, Target

INT4PACK, INT8PACK, GATHER = "torch-cpu/int4pack", "torch-cpu/int8pack", "torch-cpu/gather"

_MEASURED = "tests/backends/torch/test_kernels.py ran it: numbers, ragged shapes, temporary memory"
_FLOATS = frozenset({"f32", "f16", "bf16"})
_ANY = frozenset({"tensor", "channel", "group"})
_AVX2 = frozenset({"avx2"})

Speeds = tuple[tuple[str, int, float], ...]


def _speeds(**shares: str) -> Speeds:
    """``activation="M:share ..."`` as the rows keep it."""
    pairs = ((name, entry.split(":")) for name, text in shares.items() for entry in text.split())
    return tuple((name, int(m), float(share)) for name, (m, share) in pairs)


_TABLES = _speeds(f32="1:0.44 16:0.81 64:1 512:0.77", bf16="1:0.42 16:0.5 64:0.55", f16="1:0.39 64:0.32")
SLOWER: dict[tuple[str, str], Speeds] = {
    (INT4PACK, "avx512"): _speeds(bf16="16:0.73 32:0.56 64:0.47 512:0.41"),
    (INT4PACK, "avx2"): _speeds(f32="512:0.64", bf16="1:0.85 4:1", f16="1:0.77 4:1"),
    (INT8PACK, "avx512"): _speeds(
        f32="64:0.98 128:0.9 512:0.62", bf16="8:0.72 16:0.49 32:0.37 64:0.31 512:0.26", f16="1:0.89 4:1"
    ),
    (INT8PACK, "avx2"): _speeds(f32="64:0.81 512:0.5", bf16="1:0.93 4:1", f16="1:0.81 4:1"),
    (GATHER, "avx512"): _TABLES,
    (GATHER, "avx2"): _TABLES,
}
"""Speed as a share of the float op on activations of the same type, from M rows on, where it falls below 1 somewhere.

Measured on torch 2.13, one thread, K=2048 and N=8192 with groups of 128 (int8 tables of 32000 rows), a chip with
AVX-512, and the same chip held down to AVX2. ``F.linear`` in f16 is slow above M=1.
"""


def _row(name: str, op: str, codes: str, entry: str, layout: str, **more: Any) -> KernelRow:
    """A row of a weight-only kernel; ``codes`` are dtype names in one string."""
    return KernelRow(
        name,
        op,
        codes=frozenset(codes.split()),
        activations=_FLOATS,
        entry=f"qcompiler.backends.torch.lower:{entry}",
        layout=f"qcompiler.backends.torch.layouts:{layout}",
        evidence=_MEASURED,
        **more,
    )


def weight_only_rows(width: str) -> tuple[KernelRow, ...]:
    """The rows of kernels that read float activations, where torch runs its code of the vector width ``width``."""
    return (
        _row(
            INT4PACK,
            "q.linear",
            "int4 uint4",
            "int4pack",
            f"int4pack_{width}",
            granularities=_ANY,
            groups=frozenset({32, 64, 128, 256, 512, 1024}),
            zeros=frozenset({"none", "int"}),
            needs=_AVX2,
            numerics="activations and results in bf16, products and sums in f32; (8 - zero) * scale is rounded to bf16",
            note=f"packed for {width}: the layout belongs to the vector width, and other widths would misread it",
            slower=SLOWER[INT4PACK, width],
        ),
        _row(
            INT8PACK,
            "q.linear",
            "int8",
            "int8pack",
            "int8pack",
            granularities=frozenset({"tensor", "channel"}),
            groups=frozenset(),
            zeros=frozenset({"none"}),
            needs=_AVX2,
            numerics="activations and sums in bf16, products summed in f32; the scale is applied in f32 behind that",
            slower=SLOWER[INT8PACK, width],
        ),
        _row(
            GATHER,
            "q.embedding",
            "int4 uint4 int8 uint8",
            "gather",
            "table",
            granularities=_ANY,
            groups=frozenset({16, 32, 64, 128, 256, 512, 1024}),
            zeros=frozenset({"none", "int"}),
            numerics="exact: (code - zero) * scale of the gathered rows only",
            bias=False,
            note="plain aten calls, 15 us at M=1, thrice that for 4-bit codes; int8 codes are one tensor with those of "
            "a tied int8pack layer",
            slower=SLOWER[GATHER, width],
        ),
    )


def vector_width(features: frozenset[str], environment: Mapping[str, str] = os.environ) -> str:
    """``avx512``, ``avx2`` or ``default``: the code that torch runs on a chip with ``features``.

    ``ATEN_CPU_CAPABILITY`` holds it down, as it does in torch.
    """
    asked = environment.get("ATEN_CPU_CAPABILITY", "").lower()
    known = ["avx512", "avx2"]
    if asked in ("avx2", "default"):
        known = known[1:] if asked == "avx2" else []
    return next((w for w in known if w in features), "default")


def chips(name: str) -> tuple[str, ...]:
    """The architecture words that target ``name`` takes; empty for a target that is not here."""
    return {"torch-cpu": tuple(CHIPS), "torch-cuda": tuple(f"sm_{s}" for s in SM)}.get(name, ())


def target(spec: str) -> Target:
    """``torch-cpu`` (this machine's chip), ``torch-cpu:ARCH``, ``torch-cuda``, ``torch-cuda:sm_XX``.

    Raises InputError that lists the known words.
    """
    name, _, arch = spec.partition(":")
    if name == "torch-cpu":
        return _cpu(spec, arch)
    found = re.fullmatch(r"sm_(\d+)", arch or "sm_80")
    if name != "torch-cuda":
        raise InputError(f"no target {spec!r} here; known: torch-cpu, torch-cuda, each with an optional :ARCH")
    if found is None or int(found[1]) not in SM:
        known = ", ".join(f"sm_{s}" for s in SM)
        raise InputError(f"target {spec!r}: no architecture called {arch!r}; known: {known}")
    return cuda_target(arch)


def _cpu(spec: str, arch: str) -> Target:
    if arch and arch not in CHIPS:
        raise InputError(f"target {spec!r}: no chip called {arch!r}; known: {', '.join(CHIPS)}")
    features = CHIPS[arch] if arch else runs_with(detect_features())
    width = vector_width(features, {} if arch else os.environ)
    rows = (*weight_only_rows("avx512" if width == "avx512" else "avx2"), *INTEGER_ROWS)
    return Target("torch-cpu", arch, features if width != "default" else features - _AVX2, rows, "aten", CPU_ABSENT)
