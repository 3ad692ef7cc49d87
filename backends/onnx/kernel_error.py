"""How far ONNX Runtime's low-bit kernels may be from the reference semantics of the op that they were chosen for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcompiler.backends.onnx.nodes import low_bit
from qcompiler.backends.onnx.reference import KNOWN, expected
from qcompiler.dtypes import Array
from qcompiler.ir import Op

REQUANTIZED = 2.0**-6
"""Steps: kernels turn int32 sums into codes with one f32 factor, and look functions up in tables of f32."""
_CODES = ("QLinear", "QGemm")


def error_of(op: Op, operands: Sequence[Array | None]) -> Array | float:
    """The bound for the node ``op`` on these operands: steps where it gives codes, else absolute; 0 for host ops.

    ``MatMulNBits`` and its like: :mod:`qcompiler.backends.onnx.reference`. An int32 bias is rounded to steps of x scale
    times w scale: half such a step, of a convolution in steps of the result.
    """
    short = op.name.rpartition(".")[2]
    if short.startswith(_CODES) and short != "QLinearMatMul":
        return REQUANTIZED + (_bias_steps(operands) if short in ("QLinearConv", "QGemm") else 0.0)
    if short == "DequantizeLinear" and operands[0] is not None and operands[0].dtype == np.int32:
        return np.asarray(operands[1], np.float64) / 2
    node = low_bit(op) if op.name in KNOWN else None
    found = None if node is None else expected(node, operands, node.n)
    if found is None:
        return 0.0
    return REQUANTIZED if short == "QLinearMatMul" else found.bound


def _bias_steps(operands: Sequence[Array | None]) -> float:
    """Half a step of an int32 bias in steps of the result; of a QLinearConv or a QGemm."""
    a = [*operands, *[None] * 10]
    is_conv = a[8] is not None and a[8].dtype == np.int32
    x_scale, w_scale, y_scale = a[1], a[4], a[6] if is_conv else a[7]
    if not is_conv and (a[6] is None or a[6].dtype != np.int32):
        return 0.0
    if x_scale is None or w_scale is None or y_scale is None:
        return 0.0
    return float(np.max(x_scale.astype(np.float64) * w_scale) / (2 * y_scale.astype(np.float64).min()))
