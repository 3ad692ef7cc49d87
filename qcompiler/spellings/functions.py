"""Element-wise ops and pools of codes that are ops of their own (QLinearAdd, QLinearConcat ...), in the pair form."""

from __future__ import annotations

from qcompiler.ir import Op, Value
from qcompiler.rewrite import Rewriter, rule
from qcompiler.spellings.integers import float_type, operand, result
from qcompiler.spellings.parts import int_attr

MS = "com.microsoft."
UNARY = {
    MS + "QLinearSigmoid": "onnx.Sigmoid",
    MS + "QLinearLeakyRelu": "onnx.LeakyRelu",
    MS + "QLinearSoftmax": "onnx.Softmax",
    MS + "QLinearAveragePool": "onnx.AveragePool",
    MS + "QLinearGlobalAveragePool": "onnx.GlobalAveragePool",
}
BINARY = {MS + "QLinearAdd": "onnx.Add", MS + "QLinearMul": "onnx.Mul"}
OWN = frozenset({"channels_last", "opset"})
"""Attributes that the ONNX op has not."""


@rule(*UNARY)
def lift_unary(op: Op, rw: Rewriter) -> Value:
    """QLinearF(x)  ->  q.quantize(F(q.dequantize(x)))"""
    if int_attr(op, "channels_last", 0):
        raise rw.declined("it keeps channels last, which only the runtime's own optimizer writes", code="QC205")
    o = op.operand
    if op.name.endswith("Softmax") and int_attr(op, "opset", 13) < 13:
        raise rw.declined("the Softmax of an opset below 13 flattens its input", code="QC205")
    attrs = {k: v for k, v in op.attrs.items() if k not in OWN}
    y = rw.op(UNARY[op.name], operand(rw, o(0), o(1), o(2)), type=float_type(op), **attrs)
    return result(rw, y, op, o(3), o(4))


@rule(*BINARY)
def lift_binary(op: Op, rw: Rewriter) -> Value:
    """QLinearF(a, b)  ->  q.quantize(F(q.dequantize(a), q.dequantize(b)))"""
    o = op.operand
    a, b = operand(rw, o(0), o(1), o(2)), operand(rw, o(3), o(4), o(5))
    return result(rw, rw.op(BINARY[op.name], a, b, type=float_type(op)), op, o(6), o(7))


@rule(MS + "QLinearConcat")
def lift_concat(op: Op, rw: Rewriter) -> Value:
    """QLinearConcat(a, b, ..)  ->  q.quantize(Concat(q.dequantize(a), q.dequantize(b), ..))"""
    o = op.operand
    parts = [operand(rw, o(i), o(i + 1), o(i + 2)) for i in range(2, len(op.operands) - 2, 3)]
    return result(rw, rw.op("onnx.Concat", *parts, type=float_type(op), axis=op.attrs["axis"]), op, o(0), o(1))


RULES = (lift_unary, lift_binary, lift_concat)
