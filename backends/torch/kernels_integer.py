"""torch's CPU kernels that compute on codes of activations (W8A8), as rows.

Both products are oneDNN's, for uint8 activations and int8 weights. What decides, measured on torch 2.13
(tests/backends/torch/test_kernels_integer.py, tests/backends/torch/test_ops.py):

  - Without VNNI the products saturate in 16 bits, by AVX2 and AVX-512 alike: the rows need it.
  - int8 activations run in oneDNN's reference code, 270 times slower. So they have no row; uint8 ones with zero point
    128 hold the same numbers.
  - Any M, N and K from 1, bf16 results and ragged shapes are exact: sums in int32, rounded once from f32.
  - The first call at a new M makes a kernel: 0.5 to 9 ms, once. The weight is packed at the first call, and the packed
    copy stays beside the plain one: twice the bytes of the codes.

  - Beside its work a call costs 40 us: 20 in oneDNN, 20 to quantize the activation. Against the float op of the same
    activation, on one thread, with the activation quantized anew each time:

      N x K         M=1 f32, bf16    M=16         M=512
      256 x 256     0.2, 0.3         0.4, 0.4     2.0, 1.0
      1024 x 1024   0.7, 1.0         2.7, 1.5     3.4, 1.6
      2048 x 2048   2.6, 4.2         3.1, 2.6     4.2, 1.8
      8192 x 2048   2.2, 2.5         6.5, 2.2     4.7, 1.9

  - Convolutions: oneDNN computes channels last and torch's usual layout is turned around it, which depthwise, grouped
    and narrow ones do not earn back: 0.3 to 0.9 of the speed of f32 (16 to 96 channels), dense ones 1.1 to 9.

What has no row, and why:
  - activations scaled per token: the kernels take one scale and one zero point for all rows.
  - weights with zero points: the kernels drop them.
  - products of two activations, and functions on codes (``q.matmul``, ``q.apply``): torch has no such kernels.
  - fp8 activations: oneDNN's reference code, 90 times slower than f32.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from qcompiler.requests import BATCHED, SHARED
from qcompiler.target import KernelRow, Reason

_ENTRY = "qcompiler.backends.torch.lower_integer:"
QLINEAR, QCONV = "torch-cpu/qlinear.u8s8", "torch-cpu/qconv.u8s8"

_MEASURED = "tests/backends/torch/test_kernels_integer.py ran it: numbers, ragged shapes, temporary memory"
_TO_THE_BIT = "tests/backends/torch/test_kernels_integer.py ran it: equal to the reference to the bit"
_FLOATS = frozenset({"f32", "bf16", "f16"})
_EXACT = "products summed in int32, exact; scaled and biased in f32"
_PACKED = "the weight is packed at the first call, and the packed copy stays beside the plain one"
_SMALL = "40 us a call beside its work: slower than float where N x K is under about 10^6 and M is 1"
_NARROW = "0.3 to 0.9 of the speed of f32 for depthwise, grouped and narrow convolutions that are not channels-last"


def _product(op: str, name: str, entry: str, **more: Any) -> KernelRow:
    """A row of a kernel that multiplies uint8 activations by int8 weights."""
    return KernelRow(
        name,
        op,
        codes=frozenset({"int8"}),
        granularities=frozenset({"tensor", "channel"}),
        groups=frozenset(),
        zeros=frozenset({"none"}),
        activations=_FLOATS,
        entry=_ENTRY + entry,
        layout="",
        evidence=_MEASURED,
        needs=frozenset({"x86_64", "vnni"}),
        note=f"{_PACKED}; {_SMALL if name == QLINEAR else _NARROW}",
        x_codes=frozenset({"uint8"}),
        **more,
    )


def _static(op: str, name: str, entry: str, **more: Any) -> KernelRow:
    numerics = f"{_EXACT}; a code of a result may be off by one at a tie"
    return _product(op, name, entry, y_codes=frozenset({"float", "uint8"}), numerics=numerics, **more)


def _dynamic(op: str, name: str, entry: str, **more: Any) -> KernelRow:
    return _product(op, name, entry, dynamic=True, x_zeros=frozenset({"int"}), numerics=_EXACT, **more)


def _edge(op: str, name: str, entry: str, codes: str, numerics: str, **more: Any) -> KernelRow:
    """Where floats become codes and codes floats, and the rescale between floats."""
    fields: dict[str, Any] = {"zeros": frozenset({"none", "int"}), "activations": _FLOATS}
    return KernelRow(
        f"torch-cpu/{name}",
        op,
        codes=frozenset(codes.split()),
        granularities=frozenset({"tensor"}),
        groups=frozenset(),
        entry=_ENTRY + entry,
        layout="",
        evidence=_TO_THE_BIT,
        bias=False,
        numerics=numerics,
        **(fields | more),
    )


INTEGER_ROWS: tuple[KernelRow, ...] = (
    _dynamic("q.linear_dyn", QLINEAR, "linear_dyn", traits=frozenset({BATCHED, SHARED})),
    _static("q.linear_static", QLINEAR, "linear_static", traits=frozenset({BATCHED})),
    _dynamic("q.conv_dyn", QCONV, "conv_dyn"),
    _static("q.conv", QCONV, "conv_static"),
    _edge("q.quantize", "quantize", "quantize", "uint8", "divided in f32, rounded to even, saturated", dynamic=True),
    _edge("q.dequantize", "dequantize", "dequantize", "uint8 int8", "(code - zero) * scale in f32", dynamic=True),
    _edge(
        "q.choose_qparams",
        "quantize_dynamic",
        "choose_qparams",
        "uint8",
        "by the range widened to hold 0, in f64; the scale rounded once to f32",
        dynamic=True,
        zeros=frozenset({"int"}),
    ),
    _edge("q.scale", "mul", "scale", "int8", "one rounding a product"),
)
"""Rows of torch-cpu."""


_WITHOUT_VNNI = frozenset({"SSE41", "AVX", "AVX2", "AVX512_CORE"})


def runs_with(features: frozenset[str], environment: Mapping[str, str] = os.environ) -> frozenset[str]:
    """What oneDNN uses of a chip's ``features``: ``ONEDNN_MAX_CPU_ISA`` may hold it down to code without VNNI."""
    held = environment.get("ONEDNN_MAX_CPU_ISA") or environment.get("DNNL_MAX_CPU_ISA") or ""
    return features - {"vnni"} if held.upper() in _WITHOUT_VNNI else features


def _none(what: str) -> Reason:
    return Reason("QC201", f"torch has no CPU kernel for {what}", "leave it in float, or compile for ort-cpu")


CPU_ABSENT: tuple[tuple[str, Reason], ...] = (
    ("q.matmul", _none("products of two activations in codes")),
    ("q.apply", _none("functions computed on codes")),
)
"""Why torch-cpu has no row for these ops."""
