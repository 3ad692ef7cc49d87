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
    _, shape = _weight(root, rw)
    last, factors = chain(root, rw, axis=1 - len(shape))
    if last is not op:
        raise rw.declined("another product follows", quiet=True)
    _along_channels(rw, factors, shape)
    return _convolution(op, root, factors, None, rw)


@rule("onnx.BatchNormalization")
def lift_normalised_conv_integer(op: Op, rw: Rewriter) -> Value:
    """batchnorm(cast(ConvInteger(x, w)), s_x * s_w, b, 0, 1)  ->  Conv(dequantized x, dequantized w, b)"""
    cast = rw.expect(op.operand(0), "onnx.Cast")
    root = rw.expect(cast.operand(0), "onnx.ConvInteger")
    if any(len(v.uses) != 1 or v.is_output for v in (cast.result, root.result)):
        raise rw.declined("its integers are read otherwise too", code="QC205")
    step, bias, (mean, variance) = op.operand(1), op.operand(2), (op.operand(3), op.operand(4))
    plain = op.attrs.get("epsilon", 1e-5) == 0.0 and int_attr(op, "spatial", 1) == 1 and len(op.results) == 1
    neutral = plain and cast.result.tensor.dtype == F32 and _all(rw, mean, 0.0) and _all(rw, variance, 1.0)
    if not neutral or step is None or bias is None:
        raise rw.declined("what normalises it is more than a factor and a shift", code="QC205")
    return _convolution(op, root, [step], None if _all(rw, bias, 0.0) else bias, rw)


def _all(rw: Rewriter, value: Value | None, number: float) -> bool:
    """A constant of this one number."""
    payload = None if value is None else settle(rw, value).payload
    return payload is not None and bool((payload.array() == number).all())


def _weight(root: Op, rw: Rewriter) -> tuple[Value, tuple[int, ...]]:
    """The codes of the weight, and their shape."""
    weight = root.operand(1)
    codes = None if weight is None else settle(rw, weight)
    shape = None if codes is None else codes.tensor.static_shape
    if codes is None or shape is None:
        raise rw.declined("the shape of its weight is not known", code="QC205")
    return codes, shape


def _convolution(op: Op, root: Op, factors: list[Value], bias: Value | None, rw: Rewriter) -> Value:
    """The Conv of what is dequantized, in the place of ``op``."""
    o = root.operand
    codes, shape = _weight(root, rw)
    x_scale, w_scale = scales_of(root, rw, factors, shape[0])
    x, w = operand(rw, o(0), x_scale, o(2)), operand(rw, codes, w_scale, o(3), axis=0)
    y = rw.op("onnx.Conv", x, w, bias, type=op.result.type, **_attributes(root))
    if y.owner is not None:
        y.owner.loc = root.loc
    return y


def _along_channels(rw: Rewriter, factors: list[Value], shape: tuple[int, ...]) -> None:
    """Scales ``[O, 1, ..]`` go along the channels of the result; one ``[O]`` would go along its last axis."""
    for factor in factors:
        have = factor.tensor.static_shape
        if have is not None and int(np.prod(have)) > 1 and len(have) < len(shape) - 1:
            raise rw.declined(f"its scales {factor!r} of shape {list(have)} do not go along channels", code="QC205")


RULES = (lift_qlinear_conv, lift_conv_integer, lift_normalised_conv_integer)
