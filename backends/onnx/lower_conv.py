"""Entry points: convolutions on codes, written as ONNX Runtime's integer nodes.

``QLinearConv`` takes any number of channels, groups and up to three spatial axes, one weight scale an output channel,
and its bias in int32. ``ConvInteger`` gives int32 sums, which are scaled and biased by the ops behind it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qcompiler.backends.onnx import layouts
from qcompiler.backends.onnx.building import Builder
from qcompiler.backends.onnx.lower_pointwise import dynamic_codes
from qcompiler.dtypes import F32, INT32, UINT8, Array
from qcompiler.ir import Attr, Op, TensorType, Value
from qcompiler.payload import Payload, computed
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
    x, x_scale, x_zero = dynamic_codes(b, b.at(0))
    return _scaled_sums(b, 1, x, x_zero, x_scale)


def conv_integer_static(op: Op, choice: Choice) -> Value:
    """q.conv(x, ..) with a float result  ->  ConvInteger, Cast, Mul by both scales, Add of the bias"""
    b = Builder(op, choice)
    return _scaled_sums(b, 3, b.at(0), b.zero(2, op.attrs["x_scheme"]), b.at(1))


def _scaled_sums(b: Builder, first: int, x: Value, x_zero: Value, x_scale: Value) -> Value:
    """The convolution of codes ``x`` with those in operand ``first``, which their scale, zero point and bias follow."""
    codes = b.payload(first, "codes")
    axes = len(codes.shape) - 2
    zero = b.weight_zero(first + 2, b.op.attrs["scheme"], (), explicit=False)
    sums = b.step("onnx.ConvInteger", [x, _codes(b, first), x_zero, zero], "", b.like(INT32), _attrs(b.op))
    floats = b.step("onnx.Cast", [sums], "float", b.like(F32), {"to": 1})
    scale = b.payload(first + 1, "scale")
    wide = () if scale.size == 1 and not scale.shape else (codes.shape[0], *[1] * axes)
    if x_scale.is_const and x_scale.payload is not None:
        both = computed("step", _product(wide), [x_scale.payload, scale], F32, wide)
        step = b.const("step", both)
    else:
        w_scale = b.derived("weight_scale", scale, lambda s: s.reshape(wide), F32, wide)
        step = b.step("onnx.Mul", [x_scale, w_scale], "step", TensorType(F32, wide))
    y = b.step("onnx.Mul", [floats, step], "scaled", b.like(F32))
    if b.op.operand(first + 3) is None:
        return y
    row = (codes.shape[0], *[1] * axes)

    def column(bias: Array) -> Array:
        return np.ascontiguousarray(bias).reshape(row)

    bias = b.derived("bias", b.payload(first + 3, "bias"), column, F32, row)
    return b.step("onnx.Add", [y, bias], "biased", b.like(F32))


def _product(shape: tuple[int, ...]) -> Callable[[Payload, Payload], Array]:
    """The product of two scales in ``shape``, rounded once."""

    def fn(x: Payload, w: Payload) -> Array:
        both = x.array().astype(np.float64).reshape(()) * w.array().astype(np.float64)
        return both.reshape(shape).astype(np.float32)

    return fn
