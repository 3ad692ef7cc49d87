"""Products of codes that are ops of their own: QLinearMatMul, QGemm, MatMulInteger and its kin, in the pair form."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.dtypes import F32, INT32, Array
from qcompiler.ir import Op, TensorType, Value
from qcompiler.payload import constant
from qcompiler.rewrite import Rewriter, rule
from qcompiler.spellings.expressions import settle
from qcompiler.spellings.parts import (
    Parameters,
    code_type,
    dequantized,
    float_bias,
    int_attr,
    once,
    parameters,
    quantized,
    transformed,
)
from qcompiler.spellings.qdq import DYNAMIC, chosen

MS = "com.microsoft."


def operand(rw: Rewriter, codes: Value | None, scale: Value | None, zero: Value | None, axis: int = -1) -> Value:
    """``q.dequantize`` of an operand of an integer op; several scales go along ``axis``.

    Declines for scales in blocks, which the kernels would misread.
    """
    if codes is None:
        raise rw.declined("an operand is absent", code="QC205")
    codes = settle(rw, codes)
    if scale is not None and (scale.tensor.rank or 0) > 1:
        scale = _column(rw, settle(rw, scale), codes, axis)
    if zero is not None and (zero.tensor.rank or 0) > 1:
        zero = _column(rw, settle(rw, zero), codes, axis)
    p = parameters(rw, codes, code_type(codes, zero), scale, zero, axis=axis)
    return dequantized(rw, codes, _as_chosen(p))


def _as_chosen(p: Parameters) -> Parameters:
    """The dynamic scheme, where the scale is chosen at run time."""
    made_by = p.scale.owner
    return p._replace(scheme=DYNAMIC) if made_by is not None and made_by.name == "q.choose_qparams" else p


def _column(rw: Rewriter, small: Value, codes: Value, axis: int) -> Value:
    """``[1, N]`` as ``[N]``."""
    shape, full = small.tensor.static_shape, codes.tensor.static_shape
    if shape is None or full is None or int(np.prod(shape)) not in (1, full[axis]) or not small.is_const:
        raise rw.declined(
            f"the scales {small!r} of shape {small.tensor.shape} are not one a channel: the kernel reads them as if "
            "they were, and its numbers are wrong",
            code="QC303",
            fix="quantize with one scale an output channel",
        )
    size = int(np.prod(shape))
    return once(rw, small, "row", lambda p: transformed(p, "row", lambda a: a.reshape(size), p.dtype, (size,)))


def result(rw: Rewriter, y: Value, op: Op, scale: Value | None, zero: Value | None) -> Value:
    """``q.quantize`` of the float result, as the op gives it."""
    p = parameters(rw, y, code_type(op.result, zero), scale, zero)
    return quantized(rw, y, p)


def float_type(op: Op) -> TensorType:
    return TensorType(F32, op.result.tensor.shape)


@rule("onnx.QLinearMatMul")
def lift_qlinear_matmul(op: Op, rw: Rewriter) -> Value:
    """QLinearMatMul(a, b)  ->  q.quantize(q.dequantize(a) @ q.dequantize(b))"""
    o = op.operand
    a, b = operand(rw, o(0), o(1), o(2)), operand(rw, o(3), o(4), o(5))
    return result(rw, rw.op("onnx.MatMul", a, b, type=float_type(op)), op, o(6), o(7))


@rule(MS + "QGemm")
def lift_qgemm(op: Op, rw: Rewriter) -> Value:
    """QGemm(a, b, c)  ->  Gemm(q.dequantize(a), q.dequantize(b), c * s_a * s_b), quantized where it has a scale"""
    o, flip = op.operand, int_attr(op, "transB", 0)
    a, b = operand(rw, o(0), o(1), o(2)), operand(rw, o(3), o(4), o(5), axis=0 if flip else -1)
    n = (b.tensor.static_shape or (0, 0))[0 if flip else 1]
    bias = o(6)
    if bias is not None:
        assert o(1) is not None and o(4) is not None
        bias = float_bias(rw, bias, [v for v in (o(1), o(4)) if v is not None], n, F32)
    alpha = float(op.attrs.get("alpha", 1.0))
    attrs: dict[str, Any] = {"transA": int_attr(op, "transA", 0), "transB": flip, "alpha": alpha, "beta": alpha}
    y = rw.op("onnx.Gemm", a, b, bias, type=float_type(op), **attrs)
    return y if o(7) is None else result(rw, y, op, o(7), o(8))


@rule(MS + "MatMulIntegerToFloat")
def lift_integer_to_float(op: Op, rw: Rewriter) -> Value:
    """MatMulIntegerToFloat(a, b, c)  ->  q.dequantize(a) @ q.dequantize(b) + c"""
    o = op.operand
    a, b = operand(rw, o(0), o(2), o(4)), operand(rw, o(1), o(3), o(5))
    y = rw.op("onnx.MatMul", a, b, type=float_type(op))
    return y if o(6) is None else rw.op("onnx.Add", y, o(6), type=float_type(op))


@rule(MS + "DynamicQuantizeMatMul")
def lift_dynamic_matmul(op: Op, rw: Rewriter) -> Value:
    """DynamicQuantizeMatMul(x, b, c)  ->  q.dequantize(q.quantize(x, s, z), s, z) @ q.dequantize(b) + c"""
    o, x = op.operand, op.operand(0)
    if x is None:
        raise rw.declined("it has no input", code="QC205")
    scale, zero = chosen(rw, x)
    p = Parameters(DYNAMIC, scale, zero)
    a = dequantized(rw, quantized(rw, x, p), p)
    y = rw.op("onnx.MatMul", a, operand(rw, o(1), o(2), o(3)), type=float_type(op))
    return y if o(4) is None else rw.op("onnx.Add", y, o(4), type=float_type(op))


# -- MatMulInteger and what follows it -----------------------------------------------------------------------


def chain(op: Op, rw: Rewriter, axis: int = -1) -> tuple[Op, list[Value]]:
    """Follow an int32 result through its Cast to float and the products with scales: the last op, and the factors.

    ``axis``, counted from the end: along which several scales go.

    Declines where the integers are read otherwise.
    """
    value, factors, last = op.result, list[Value](), op
    while len(value.uses) == 1 and not value.is_output:
        user = value.users[0]
        if user.graph is not op.graph:
            break
        if user.name == "onnx.Cast" and value.tensor.dtype == INT32 and not factors:
            if user.result.tensor.dtype != F32:
                break
        elif user.name == "onnx.Mul" and last is not op:
            other = user.operand(1) if user.operand(0) is value else user.operand(0)
            if other is None or other is value or not _is_scale(other, axis):
                break
            factors.append(other)
        else:
            break
        last, value = user, user.result
    if last is op or not factors:
        raise rw.declined(
            "its integers are not cast to float and scaled right behind it", code="QC205", fix="scale the result"
        )
    return last, factors


def _is_scale(value: Value, axis: int) -> bool:
    """Few numbers beside a product: a constant, a scalar, or numbers along ``axis`` alone."""
    shape = value.tensor.static_shape
    return value.is_const or (shape is not None and all(d == 1 for i, d in enumerate(shape) if i - len(shape) != axis))


def split(rw: Rewriter, factors: list[Value]) -> tuple[list[Value], Array]:
    """The factors known only at run time, and the product of the constant ones (float64)."""
    free, product = list[Value](), np.ones((), np.float64)
    work = list(factors)
    while work:
        value = settle(rw, work.pop(0))
        if value.is_const and value.payload is not None:
            product = product * value.payload.array().astype(np.float64)
        elif value.owner is not None and value.owner.name == "onnx.Mul":
            work += [v for v in value.owner.operands if v is not None]
        else:
            free.append(value)
    return free, product


def scales_of(op: Op, rw: Rewriter, factors: list[Value], n: int) -> tuple[Value, Value]:
    """The scale of the activation in operand 0 of an integer op, and that of its weight, from the factors.

    An activation that was quantized with a constant scale has that one, and the weight's is the rest of the product.
    """
    free, product = split(rw, factors)
    codes = op.operand(0)
    maker = None if codes is None else codes.owner
    own = maker.operand(1) if maker is not None and maker.name == "q.quantize" else None
    if len(free) > 1 or (free and own is not None and own is not free[0] and not own.is_const):
        raise rw.declined(f"{len(free)} of its scales are known only at run time", code="QC205")
    if free:
        scale = free[0]
    elif own is not None and own.is_const and own.payload is not None:
        scale, product = own, product / own.payload.array().astype(np.float64)
    else:
        raise rw.declined("the scale of its activation is not among its factors", code="QC205")
    if product.size not in (1, n):
        raise rw.declined(f"its constant factors are {list(product.shape)}, it has {n} columns", code="QC205")
    values = product.reshape(() if product.size == 1 else (n,))
    return scale, rw.const(f"{op.result.name}.weight_scale", constant(values, F32))


@rule("onnx.Mul")
def lift_matmul_integer(op: Op, rw: Rewriter) -> Value:
    """mul(cast(MatMulInteger(a, b)), s_a * s_b), in any order  ->  q.dequantize(a, s_a) @ q.dequantize(b, s_b)"""
    root = behind(op, "onnx.MatMulInteger", rw)
    last, factors = chain(root, rw)
    if last is not op:
        raise rw.declined("another product follows", quiet=True)
    o = root.operand
    weight = o(1)
    codes = None if weight is None else settle(rw, weight)
    shape = None if codes is None else codes.tensor.static_shape
    if codes is None or shape is None or len(shape) < 2:
        raise rw.declined("the shape of its weight is not known", code="QC205")
    x_scale, w_scale = scales_of(root, rw, factors, shape[-1])
    a, b = operand(rw, o(0), x_scale, o(2)), operand(rw, codes, w_scale, o(3))
    y = rw.op("onnx.MatMul", a, b, type=op.result.type)
    if y.owner is not None:
        y.owner.loc = root.loc
    return y


def behind(op: Op, name: str, rw: Rewriter) -> Op:
    """The integer op that ``op`` scales, through the Cast and the other factors."""
    seen = 0
    work = [v for v in op.operands if v is not None]
    while work and seen < 12:
        seen += 1
        owner = work.pop(0).owner
        if owner is None:
            continue
        if owner.name == name:
            return owner
        if owner.name in ("onnx.Cast", "onnx.Mul"):
            work += [v for v in owner.operands[:2] if v is not None]
    raise rw.declined(f"no {name} is behind it", quiet=True)


RULES = (
    lift_qlinear_matmul,
    lift_qgemm,
    lift_integer_to_float,
    lift_dynamic_matmul,
    lift_matmul_integer,
)
