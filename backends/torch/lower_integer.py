"""Entry points: products of uint8 activations and int8 weights as ``qcompiler.qlinear`` and ``qcompiler.qconv``.

Each takes ``(op, choice)``, inserts the calls before ``op`` and returns the value that stands for its result. The call
that runs the kernel is called exactly like the site. Weights stay plain int8; the operator packs them at its first
call. An activation that several sites quantize at run time is quantized once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompiler.backends.torch import ops as _registered  # noqa: F401  (the calls name its operators)
from qcompiler.backends.torch.building import Builder
from qcompiler.backends.torch.payload import TO_TORCH
from qcompiler.dtypes import BF16, F32, UINT8, Array
from qcompiler.errors import InputError
from qcompiler.integer_numerics import padding
from qcompiler.ir import Op, TensorType, Value
from qcompiler.payload import constant
from qcompiler.target import Choice

_DYNAMIC = "qcompiler.quantize_dynamic.default"
_MADE = "torch.dynamic"
"""Key in the ``meta`` of a call of it that was made here."""


def linear_dyn(op: Op, choice: Choice) -> Value:
    """q.linear_dyn(x, ..)  ->  qlinear(codes, scale, zero, ..) of quantize_dynamic(x), which others may read too"""
    b = Builder(op)
    return _linear(b, dynamic_codes(b, b.at(0)), 1)


def linear_static(op: Op, choice: Choice) -> Value:
    """q.linear_static(c, s, z?, .., t?, u?)  ->  qlinear(c, s, z, ..), in codes of t and u where they are given"""
    b = Builder(op)
    return _linear(b, _static_codes(b), 3)


def conv_dyn(op: Op, choice: Choice) -> Value:
    """q.conv_dyn(x, ..)  ->  qconv(codes, scale, zero, ..) of quantize_dynamic(x)

    Padding of which one side is wider than the other is written before it, with zeros: they do not change the range.
    """
    b, x = Builder(op), Builder(op).at(0)
    sides = _sides(b, 1)
    if _uneven(sides):
        x = _padded(b, x, sides, 0.0)
    return _conv(b, dynamic_codes(b, x), 1, sides)


def conv_static(op: Op, choice: Choice) -> Value:
    """q.conv(c, s, z?, .., t?, u?)  ->  qconv(c, s, z, ..), in codes of t and u where they are given

    Padding of which one side is wider than the other is written before it, with the code of 0.
    """
    b = Builder(op)
    codes, scale, zero = _static_codes(b)
    sides = _sides(b, 3)
    if _uneven(sides):
        point = 0 if op.operand(2) is None else int(_number(b, 2, "zero point of the activation"))
        codes = _padded(b, codes, sides, point)
    return _conv(b, (codes, scale, zero), 3, sides)


# -- activations ---------------------------------------------------------------------------------------------


def dynamic_codes(b: Builder, x: Value) -> Sequence[Value]:
    """uint8 codes of ``x``, their scale (f32) and zero point (uint8): of a call that is there, or made."""
    for user in x.users:
        if user.name == _DYNAMIC and _reaches(user, b.op):
            return user.results
    types = [TensorType(UINT8, x.tensor.shape), TensorType(F32, ()), TensorType(UINT8, ())]
    made: Sequence[Value] = b.call(_DYNAMIC, x, type=types, suffix="quantize")
    assert made[0].owner is not None
    made[0].owner.meta[_MADE] = True
    return made


def _reaches(maker: Op, reader: Op) -> bool:
    """``maker`` stands before ``reader``, in its graph or in an enclosing one.

    What was made here stands before the first op that asked for it, and ops ask in their order.
    """
    while reader.graph is not maker.graph:
        if reader.graph.parent is None:
            return False
        reader = reader.graph.parent
    if maker.meta.get(_MADE):
        return True
    return any(op is reader for op in itertools.dropwhile(lambda op: op is not maker, maker.graph))


def _static_codes(b: Builder) -> tuple[Value, Value, Value]:
    return b.at(0), _scalar(b, 1), _zero(b, 2)


def _scalar(b: Builder, index: int) -> Value:
    """The scale in operand ``index`` in f32, ``[]``."""
    value = b.at(index)
    if value.tensor.dtype == F32 and value.tensor.static_shape == ():
        return value
    if value.payload is None:
        return b.cast(value, F32, "scale")
    return b.derived("x_scale", [value.payload], lambda s: s.reshape(()).astype(np.float32), F32, ())


def _zero(b: Builder, index: int) -> Value:
    """The zero point in operand ``index``, or 0."""
    found = b.op.operand(index)
    return b.const("x_zero", constant(0, UINT8)) if found is None else found


def _number(b: Builder, index: int, what: str) -> float:
    return float(b.payload(index, what).array().astype(np.float64).reshape(()))


# -- weights and results -------------------------------------------------------------------------------------


def _weights(b: Builder, first: int) -> tuple[Value, Value, Value | None]:
    """Codes as they are, one f32 scale a channel, the bias in f32; of the constants in operands ``first`` on."""
    n = b.payload(first, "codes").shape[0]
    scale = b.payload(first + 1, "scale")

    def row(s: Array) -> Array:
        return np.ascontiguousarray(np.broadcast_to(s.reshape(-1), (n,))).astype(np.float32)

    scales = b.derived("weight_scale", [scale], row, F32, (n,))
    bias = b.op.operand(first + 3)
    if bias is not None and bias.tensor.dtype != F32:
        given = b.payload(first + 3, "bias")
        bias = b.derived("bias", [given], lambda a: a.astype(np.float32), F32, (n,))
    return b.at(first), scales, bias


def _result(b: Builder, name: str, args: Sequence[Any], first: int) -> Value:
    """The call, in codes where the op has them; operands ``first`` on are the scale and zero point of the result."""
    if "y_scheme" in b.op.attrs:
        scale = _number(b, first, "scale of the result")
        zero = 0 if b.op.operand(first + 1) is None else int(_number(b, first + 1, "zero point of the result"))
        y: Value = b.call(name, *args, scale, zero, TO_TORCH[UINT8], type=b.like(UINT8))
        return y
    element = b.op.result.tensor.dtype or F32
    inside = element if element == BF16 else F32
    y = b.call(name, *args, 1.0, 0, TO_TORCH[inside], type=b.like(inside))
    return b.cast(y, element, "result")


def _linear(b: Builder, x: Sequence[Value], first: int) -> Value:
    return _result(b, "qcompiler.qlinear.default", [*x, *_weights(b, first)], 7)


# -- convolutions --------------------------------------------------------------------------------------------


def _conv(b: Builder, x: Sequence[Value], first: int, sides: list[int]) -> Value:
    op, axes = b.op, len(sides) // 2
    even = [0] * axes if _uneven(sides) else sides[:axes]
    strides, dilations = _ints(op, "strides", axes), _ints(op, "dilations", axes)
    where = [strides, even, dilations, int(op.attrs.get("group", 1) or 1)]
    return _result(b, "qcompiler.qconv.default", [*x, *_weights(b, first), *where], 7)


def _ints(op: Op, key: str, axes: int) -> list[int]:
    return [int(i) for i in op.attrs.get(key) or [1] * axes]


def _sides(b: Builder, first: int) -> list[int]:
    """Padding at the begin of each spatial axis, then at the end of each.

    Raises InputError where it depends on a size that is open: ``auto_pad`` of a strided convolution.
    """
    op, kernel = b.op, b.payload(first, "codes").shape[2:]
    strides, dilations = _ints(op, "strides", len(kernel)), _ints(op, "dilations", len(kernel))
    windows = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    size = list(b.at(0).tensor.shape or ())[2:]
    if op.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID", None):
        if all(s == 1 for s in strides):
            size = list(windows)  # whatever it is: the result is as large as the input
        elif not size or not all(isinstance(n, int) for n in size):
            raise InputError(f"{op.name} '{b.label}' is padded by sizes that are open; export it with fixed sizes")
    elif len(size) != len(kernel):
        size = list(windows)
    return padding(op.attrs, [n if isinstance(n, int) else 0 for n in size], windows, strides)


def _uneven(sides: Sequence[int]) -> bool:
    axes = len(sides) // 2
    return list(sides[:axes]) != list(sides[axes:])


def _padded(b: Builder, x: Value, sides: Sequence[int], value: float) -> Value:
    axes = len(sides) // 2
    widths = [w for i in reversed(range(axes)) for w in (sides[i], sides[axes + i])]
    shape = x.tensor.shape
    if shape is not None:
        wide = [n + sides[i] + sides[axes + i] if isinstance(n, int) else None for i, n in enumerate(shape[2:])]
        shape = None if None in wide else (*shape[:2], *(n for n in wide if n is not None))
    kind = TensorType(x.tensor.dtype, shape)
    made: Value = b.call("aten.constant_pad_nd.default", x, widths, value, type=kind, suffix="padded")
    return made


# -- edges ---------------------------------------------------------------------------------------------------


def quantize(op: Op, choice: Choice) -> Value:
    """q.quantize(x, s, z?)  ->  quantize(x, s, z), or the codes of the quantize_dynamic(x) that made s and z"""
    b = Builder(op)
    if op.attrs["scheme"].dynamic:
        codes, scale, zero = dynamic_codes(b, b.at(0))
        if scale is op.operand(1) and zero is op.operand(2):
            return codes
    operands = [b.at(0), _scalar(b, 1), _zero(b, 2)]
    made: Value = b.call("qcompiler.quantize.default", *operands, type=op.result.type)
    return made


def dequantize(op: Op, choice: Choice) -> Value:
    """q.dequantize(c, s, z?)  ->  (float(c) - z) * s"""
    b, element = Builder(op), op.result.tensor.dtype or F32
    y = b.cast(b.at(0), F32, "floats")
    if op.operand(2) is not None:
        y = b.call("aten.sub.Tensor", y, b.at(2), type=b.like(F32), suffix="centred")
    y = b.call("aten.mul.Tensor", y, _scalar(b, 1), type=b.like(F32))
    return b.cast(y, element, "result")


def choose_qparams(op: Op, choice: Choice) -> Sequence[Value]:
    """q.choose_qparams(x)  ->  the scale and the zero point of quantize_dynamic(x)"""
    b = Builder(op)
    return dynamic_codes(b, b.at(0))[1:]


def scale(op: Op, choice: Choice) -> Value:
    """q.scale(x, s)  ->  x * s, computed in f32 where they differ in type"""
    b, element = Builder(op), op.result.tensor.dtype or F32
    x, factors = b.at(0), b.at(1)
    inside = element if x.tensor.dtype == factors.tensor.dtype == element else F32
    y = b.call("aten.mul.Tensor", b.cast(x, inside), b.cast(factors, inside), type=b.like(inside))
    return b.cast(y, element, "result")
