"""Entry points: convolutions on codes, written as ONNX Runtime's integer nodes.

``QLinearConv`` takes any number of channels, groups and up to three spatial axes, one weight scale an output channel,
and its bias in int32. ``ConvInteger`` gives int32 sums, which are scaled and biased by the ops behind it.
"""

from __future__ import annotations

import numpy as np

from qcompiler.backends.onnx import layouts
from qcompiler.backends.onnx.building import Builder
from qcompiler.backends.onnx.lower_pointwise import dynamic_codes
from qcompiler.dtypes import F32, INT32, UINT8, Array
from qcompiler.ir import Attr, Op, TensorType, Value
from qcompiler.requests import opset_of_graph
from qcompiler.scheme import Scheme
from qcompiler.target import Choice

_ATTRS = ("strides", "pads", "dilations", "group", "auto_pad", "kernel_shape")


def _attrs(op: Op) -> dict[str, Attr]:
    return {key: op.attrs[key] for key in _ATTRS if key in op.attrs}


def _codes(b: Builder, index: int) -> Value:
    """The codes ``[O, I / group, ..]`` as the kernel wants them."""
    scheme: Scheme = b.op.attrs["scheme"]
    payload = b.payload(index, "codes")
    if not (b.flips and scheme.dtype.signed):
        return b.at(index)
    return b.derived("weight_q8", payload, lambda c: layouts.kernels(c, flip=True), UINT8, payload.shape)


def qlinear_conv(op: Op, choice: Choice) -> Value:
    """q.conv(x, ..)  ->  QLinearConv(x, xs, xz, W, ws, wz, ys, yz, int32 bias?)

    Raises InputError for a bias beyond int32 when the artifact is written.
    """
    b = Builder(op, choice)
    shape = b.payload(3, "codes").shape
    b.payload(4, "scale")
    zero = b.weight_zero(5, op.attrs["scheme"], (), explicit=True)
    bias = None if op.operand(6) is None else b.bias_codes(6, 1, 4, shape[0])
    x_zero, y_zero = b.zero(2, op.attrs["x_scheme"]), b.zero(8, op.attrs["y_scheme"])
    operands = [b.at(0), b.at(1), x_zero, _codes(b, 3), b.at(4), zero, b.at(7), y_zero, bias]
    name = "com.microsoft.QLinearConv" if 0 < opset_of_graph(op.graph) < 10 else "onnx.QLinearConv"
    return b.node(name, operands, _attrs(op)).result


def conv_integer(op: Op, choice: Choice) -> Value:
    """q.conv_dyn(x, ..)  ->  DynamicQuantizeLinear(x), ConvInteger, Cast, Mul by both scales, Add of the bias"""
    b = Builder(op, choice)
    codes = b.payload(1, "codes")
    axes = len(codes.shape) - 2
    x, x_scale, x_zero = dynamic_codes(b, b.at(0))
    zero = b.weight_zero(3, op.attrs["scheme"], (), explicit=False)
    sums = b.step("onnx.ConvInteger", [x, _codes(b, 1), x_zero, zero], "", b.like(INT32), _attrs(op))
    floats = b.step("onnx.Cast", [sums], "float", b.like(F32), {"to": 1})
    scale = b.payload(2, "scale")
    wide = () if scale.size == 1 and not scale.shape else (codes.shape[0], *[1] * axes)
    w_scale = b.derived("weight_scale", scale, lambda s: s.reshape(wide), F32, wide)
    step = b.step("onnx.Mul", [x_scale, w_scale], "step", TensorType(F32, wide))
    y = b.step("onnx.Mul", [floats, step], "scaled", b.like(F32))
    if op.operand(4) is None:
        return y
    row = (codes.shape[0], *[1] * axes)

    def column(bias: Array) -> Array:
        return np.ascontiguousarray(bias).reshape(row)

    bias = b.derived("bias", b.payload(4, "bias"), column, F32, row)
    return b.step("onnx.Add", [y, bias], "biased", b.like(F32))
