"""Convolutions of codes that are ops of their own: QLinearConv, and ConvInteger with what follows it."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.dtypes import F32
from qcompiler.ir import Op, Value
from qcompiler.rewrite import Rewriter, rule
from qcompiler.spellings.expressions import settle
from qcompiler.spellings.integers import behind, chain, float_type, operand, result, scales_of
from qcompiler.spellings.parts import float_bias, int_attr

KEPT = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def _attributes(op: Op) -> dict[str, Any]:
    return {k: v for k, v in op.attrs.items() if k in KEPT}


@rule("onnx.QLinearConv", "com.microsoft.QLinearConv")
def lift_qlinear_conv(op: Op, rw: Rewriter) -> Value:
    """QLinearConv(x, w, b)  ->  q.quantize(Conv(q.dequantize(x), q.dequantize(w), b * s_x * s_w))"""
    if int_attr(op, "channels_last", 0):
        raise rw.declined("it keeps channels last, which only the runtime's own optimizer writes", code="QC205")
    o = op.operand
    x, w = operand(rw, o(0), o(1), o(2)), operand(rw, o(3), o(4), o(5), axis=0)
    bias, channels = o(8), (w.tensor.static_shape or (0,))[0]
    if bias is not None:
        bias = float_bias(rw, bias, [v for v in (o(1), o(4)) if v is not None], channels, F32)
    y = rw.op("onnx.Conv", x, w, bias, type=float_type(op), **_attributes(op))
    return result(rw, y, op, o(6), o(7))


@rule("onnx.Mul")
def lift_conv_integer(op: Op, rw: Rewriter) -> Value:
    """mul(cast(ConvInteger(x, w)), s_x * s_w), in any order  ->  Conv(q.dequantize(x, s_x), q.dequantize(w, s_w))"""
    root = behind(op, "onnx.ConvInteger", rw)
    last, factors = chain(root, rw)
    if last is not op:
        raise rw.declined("another product follows", quiet=True)
    o = root.operand
    weight = o(1)
    codes = None if weight is None else settle(rw, weight)
    shape = None if codes is None else codes.tensor.static_shape
    if codes is None or shape is None:
        raise rw.declined("the shape of its weight is not known", code="QC205")
    x_scale, w_scale = scales_of(root, rw, factors, shape[0])
    _along_channels(rw, factors, shape)
    x, w = operand(rw, o(0), x_scale, o(2)), operand(rw, codes, w_scale, o(3), axis=0)
    y = rw.op("onnx.Conv", x, w, type=op.result.type, **_attributes(root))
    if y.owner is not None:
        y.owner.loc = root.loc
    return y


def _along_channels(rw: Rewriter, factors: list[Value], shape: tuple[int, ...]) -> None:
    """Scales ``[O, 1, ..]`` go along the channels of the result; one ``[O]`` would go along its last axis."""
    for factor in factors:
        have = factor.tensor.static_shape
        if have is not None and int(np.prod(have)) > 1 and len(have) < len(shape) - 1:
            raise rw.declined(f"its scales {factor!r} of shape {list(have)} do not go along channels", code="QC205")


RULES = (lift_qlinear_conv, lift_conv_integer)
