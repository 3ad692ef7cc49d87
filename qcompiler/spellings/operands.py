"""Which operands of a product are its activation and its weight, and the dequantizes behind them."""

from __future__ import annotations

from collections.abc import Mapping

from qcompiler.ir import Op, Value
from qcompiler.movement import PERMUTE
from qcompiler.views import CONV_OPS, LINEAR_OPS

PRODUCTS = ("onnx.MatMul", "onnx.Gemm")
ATEN_PRODUCTS = tuple(sorted(op for op in LINEAR_OPS if op.startswith("aten.")))
ATEN_CONVS = tuple(sorted(op for op in CONV_OPS if op.startswith("aten.")))
MOVES = frozenset({"onnx.Transpose", "onnx.Reshape", "onnx.Squeeze", "onnx.Unsqueeze", "onnx.Identity"}) | {
    op for op in PERMUTE if op.startswith("aten.")
}


def weight_of(value: Value | None) -> Op | None:
    """The dequantize of constant codes that makes ``value``, through movement of the weight."""
    while value is not None and value.owner is not None:
        op = value.owner
        if op.name == "q.dequantize":
            codes = op.operand(0)
            return op if codes is not None and codes.is_const else None
        if op.name not in MOVES:
            return None
        value = op.operand(0)
    return None


def activation_of(value: Value | None) -> Op | None:
    """The dequantize of codes that are computed which makes ``value`` itself."""
    op = None if value is None else value.owner
    if op is None or op.name != "q.dequantize":
        return None
    codes = op.operand(0)
    return None if codes is None or codes.is_const else op


def slots(op: Op) -> tuple[int, int]:
    """The operands of a product or convolution that are its activation and its weight."""
    return (1, 2) if op.name == "aten.addmm.default" else (0, 1)


def with_operands(op: Op, changes: Mapping[int, Value | None]) -> list[Value | None]:
    """The operands of ``op`` with others in some places."""
    return [changes.get(i, v) for i, v in enumerate(op.operands)]
