"""Entry points: convolutions on codes, written as ONNX Runtime's integer nodes.

``QLinearConv`` takes any number of channels, groups and up to three spatial axes, one weight scale an output channel,
and its bias in int32. ``ConvInteger`` gives int32 sums, which are scaled and biased by the ops behind it: by one
BatchNormalization, or by a product and a sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from qcompiler.backends.onnx import layouts
from qcompiler.backends.onnx.building import CODE, Builder
from qcompiler.backends.onnx.lower_pointwise import dynamic_codes
from qcompiler.dtypes import F32, INT32, UINT8, Array
from qcompiler.ir import Attr, Op, TensorType, Value
from qcompiler.payload import Payload, computed, constant
from qcompiler.requests import opset_of_graph
from qcompiler.scheme import Scheme
from qcompiler.target import Choice

_ATTRS = ("strides", "pads", "dilations", "group", "auto_pad", "kernel_shape")
NORMALISED = 1 << 18
"""Elements of the largest result that a BatchNormalization scales and biases; a quarter of that where it only scales.

It goes over the result once; Mul and Add go over it twice and broadcast, channel by channel. What follows the int32
sums takes, on one thread of ONNX Runtime 1.31 (us, with Mul and Add -> with BatchNormalization): 11.0 -> 7.3 for
[128, 4], 49.9 -> 12.1 for [4096, 1], 31.3 -> 14.6 for [512, 7, 7], 71 -> 49 for [64, 56, 56]; without a bias
12.0 -> 7.8 for [258, 4], 13.4 -> 12.2 for [64, 20, 20]. On two threads it is about the same. But its kernel has one
thread on every machine, where Mul and Add share the work: at this size 45 us against 59 on two threads, so many cores
would do better without it. Axes of unknown size count as 1.
"""


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
    """q.conv_dyn(x, ..)  ->  DynamicQuantizeLinear(x), ConvInteger, Cast, BatchNormalization(both scales, bias, 0, 1)

    Where :data:`NORMALISED` says so; else Mul by both scales, Add of the bias.
    """
    b = Builder(op, choice)
    x, x_scale, x_zero = dynamic_codes(b, b.at(0))
    return _scaled_sums(b, 1, x, x_zero, x_scale)


def conv_integer_static(op: Op, choice: Choice) -> Value:
    """q.conv(x, ..) with a float result  ->  ConvInteger, Cast, BatchNormalization(both scales, bias, 0, 1)

    Where :data:`NORMALISED` says so; else Mul by both scales, Add of the bias.
    """
    b = Builder(op, choice)
    return _scaled_sums(b, 3, b.at(0), b.zero(2, op.attrs["x_scheme"]), b.at(1))


def _scaled_sums(b: Builder, first: int, x: Value, x_zero: Value, x_scale: Value) -> Value:
    """The convolution of codes ``x`` with those in operand ``first``, which their scale, zero point and bias follow."""
    codes = b.payload(first, "codes")
    axes = len(codes.shape) - 2
    zero = b.weight_zero(first + 2, b.op.attrs["scheme"], (), explicit=False)
    sums = b.step("onnx.ConvInteger", [x, _codes(b, first), x_zero, zero], "", b.like(INT32), _attrs(b.op))
    floats = b.step("onnx.Cast", [sums], "float", b.like(F32), {"to": 1})
    scale, row = b.payload(first + 1, "scale"), (codes.shape[0], *[1] * axes)
    one, biased = scale.size == 1 and not scale.shape, b.op.operand(first + 3) is not None
    if (biased or not one) and _at_least(floats) <= (NORMALISED if biased else NORMALISED // 4):
        return _normalised(b, floats, _step(b, x_scale, scale, row[:1]), first + 3)
    y = b.step("onnx.Mul", [floats, _step(b, x_scale, scale, () if one else row)], "scaled", b.like(F32))
    if not biased:
        return y

    def column(bias: Array) -> Array:
        return np.ascontiguousarray(bias).reshape(row)

    bias = b.derived("bias", b.payload(first + 3, "bias"), column, F32, row)
    return b.step("onnx.Add", [y, bias], "biased", b.like(F32))


def _at_least(value: Value) -> int:
    """The number of elements, as far as it is known."""
    return math.prod(d for d in value.tensor.shape or () if isinstance(d, int))


def _step(b: Builder, x_scale: Value, scale: Payload, shape: tuple[int, ...]) -> Value:
    """Both scales multiplied, in ``shape``: here where they are constants, else by a Mul."""
    if x_scale.is_const and x_scale.payload is not None:
        return b.const("step", computed("step", _product(shape), [x_scale.payload, scale], F32, shape))
    w_scale = b.derived("weight_scale", scale, lambda s: _spread(s, shape), F32, shape)
    return b.step("onnx.Mul", [x_scale, w_scale], "step", TensorType(F32, shape))


def _normalised(b: Builder, floats: Value, step: Value, place: int) -> Value:
    """``floats * step + bias``; with mean 0, variance 1 and epsilon 0 nothing else is rounded."""
    (n,) = step.tensor.static_shape or (0,)
    zeros, ones = _filled(b, 0, n), _filled(b, 1, n)
    bias = zeros
    if b.op.operand(place) is not None:
        bias = b.derived("bias", b.payload(place, "bias"), lambda a: a.reshape(n), F32, (n,))
    operands = [floats, step, bias, zeros, ones]
    return b.step("onnx.BatchNormalization", operands, "scaled", b.like(F32), {"epsilon": 0.0})


def _filled(b: Builder, value: int, n: int) -> Value:
    """``[n]`` times one number; the same constant for all that ask."""
    root, key = b.op.graph.root, f"f32_{n}x{value}"
    found = dict(root.meta.get(CODE, ())).get(key)
    known = None if found is None else root.local(found)
    if known is not None and known.is_const:
        return known
    made = root.add_const(root.fresh(key), constant(np.full(n, value, np.float32)))
    root.meta[CODE] = (*root.meta.get(CODE, ()), (key, made.name))
    return made


def _spread(scale: Array, shape: tuple[int, ...]) -> Array:
    """One scale, or one a channel, in ``shape``."""
    return np.array(np.broadcast_to(scale.reshape(() if scale.size == 1 else shape), shape))


def _product(shape: tuple[int, ...]) -> Callable[[Payload, Payload], Array]:
    """The product of two scales in ``shape``, rounded once."""

    def fn(x: Payload, w: Payload) -> Array:
        both = x.array().astype(np.float64).reshape(()) * w.array().astype(np.float64)
        return _spread(both, shape).astype(np.float32)

    return fn
