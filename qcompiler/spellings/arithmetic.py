"""A dequantize that is written as a cast and arithmetic on constants: ``(float(c) - z) * s`` and its variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler.dtypes import F32, TABLE, Array, DType
from qcompiler.ir import Op, Value
from qcompiler.movement import PERMUTE
from qcompiler.payload import Payload, computed, constant
from qcompiler.rewrite import Rewriter, rule
from qcompiler.scheme import Scheme
from qcompiler.spellings.aten_values import base_of, is_known, run_aten
from qcompiler.spellings.expressions import expression
from qcompiler.spellings.parts import Parameters, dequantized
from qcompiler.views import CONV_OPS, EMBEDDING_OPS, LINEAR_OPS, call_args

_ATEN = {f"aten.{n}.{o}": n for n in ("mul", "div", "sub", "add") for o in ("Tensor", "Scalar")}
STEPS = {"onnx.Mul": "mul", "onnx.Div": "div", "onnx.Sub": "sub", "onnx.Add": "add"} | _ATEN
AFFINE = tuple(STEPS)
CASTS = (
    *("onnx.Cast", "aten.to.dtype", "aten.to.dtype_layout", "aten.to.other", "aten._to_copy.default"),
    *("aten.type_as.default", "prims.convert_element_type.default"),
    "quantized_decomposed.convert_element_type.no_fuse",
)
READERS = (
    frozenset(f"onnx.{n}" for n in ("MatMul", "Gemm", "Conv", "ConvTranspose", "Gather", "Einsum"))
    | frozenset(f"onnx.{n}" for n in ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"))
    | frozenset(n for n in LINEAR_OPS | CONV_OPS | EMBEDDING_OPS | PERMUTE if n.startswith("aten."))
)
"""Ops that read a weight, or move it."""
WIDTHS = ("int2", "uint2", "int4", "uint4", "int8", "uint8")


@dataclass(frozen=True)
class Affine:
    """``codes * scale + offset``; scale and offset broadcast over the codes, float64."""

    codes: Payload
    scale: Array
    offset: Array
    name: str


def affine(value: Value) -> Affine | None:
    """``value`` as whole numbers of at most 8 bits, times a constant, plus a constant; None where it is not."""
    op = value.owner
    if op is None:
        return None
    if op.name in CASTS:
        return _cast(op)
    if op.name in PERMUTE and op.name.startswith("aten."):
        return _moved(op)
    if op.name not in AFFINE:
        return None
    step = STEPS[op.name]
    a, b = _operands(op)
    if a is None or b is None:
        return None
    inner, other = _inner(a, op), _factor(b)
    if inner is None and step in ("mul", "add"):
        inner, other = _inner(b, op), _factor(a)
    if inner is None or other is None or other.size >= max(inner.codes.size, 2):
        return None
    c = other.astype(np.float64)
    match step:
        case "mul":
            return Affine(inner.codes, inner.scale * c, inner.offset * c, inner.name)
        case "div":
            return Affine(inner.codes, inner.scale / c, inner.offset / c, inner.name)
        case "sub":
            return Affine(inner.codes, inner.scale, inner.offset - c, inner.name)
    return Affine(inner.codes, inner.scale, inner.offset + c, inner.name)


Operand = Value | float | None


def _operands(op: Op) -> tuple[Operand, Operand]:
    """What the arithmetic takes; of aten also plain numbers. None where more is said, such as an ``alpha``."""
    if not op.name.startswith("aten."):
        return op.operand(0), op.operand(1)
    args: list[Any] = call_args(op)
    if len(args) != 2 or op.attrs.get("kwargs"):
        return None, None
    plain = [a if isinstance(a, Value) or type(a) in (int, float) else None for a in args]
    return plain[0], plain[1]


def _factor(given: Operand) -> Array | None:
    """A float constant; of aten, where arithmetic mixes types, a whole number too."""
    if not isinstance(given, Value):
        return None if given is None else np.asarray(given, np.float64)
    found = expression(given)
    if found is None or not (found.dtype.is_float or (found.dtype.is_integer and given.graph.root.dialect == "aten")):
        return None
    return found.array()


def _inner(given: Operand, op: Op) -> Affine | None:
    """The affine form of an operand; of aten, codes that the arithmetic itself makes floats of."""
    if not isinstance(given, Value):
        return None
    found = affine(given)
    if found is not None or not op.name.startswith("aten."):
        return found
    element, codes = op.result.tensor.dtype, expression(_before_casts(given))
    narrow = codes is not None and codes.dtype.is_integer and codes.dtype.bits <= 8
    if codes is None or not narrow or (given.tensor.rank or 0) < 2 or element is None:
        return None
    if element.is_integer and element.bits <= 8:
        return None  # it may wrap
    name = given.name if given.is_const else op.result.name
    return Affine(codes, np.ones((), np.float64), np.zeros((), np.float64), name)


def _moved(op: Op) -> Affine | None:
    """The affine form of what a view or transpose moves, where one scale and one offset serve all of it."""
    source, shape = op.operand(0), op.result.tensor.static_shape
    found = None if source is None else affine(source)
    if found is None or shape is None or found.scale.size != 1 or found.offset.size != 1 or not is_known(op):
        return None

    def run(p: Payload) -> Array:
        return run_aten(op, [p.array()], shape, p.dtype)

    codes = computed(base_of(op), run, [found.codes], found.codes.dtype, shape)
    return Affine(codes, found.scale.reshape(()), found.offset.reshape(()), found.name)


def _before_casts(value: Value) -> Value:
    """``value`` before it was cast to wider integers."""
    while (op := value.owner) is not None and op.name in CASTS:
        source, element = op.operand(0), op.result.tensor.dtype
        if source is None or element is None or source.tensor.dtype is None:
            break
        if not (element.is_integer and source.tensor.dtype.is_integer and element.bits > source.tensor.dtype.bits):
            break
        value = source
    return value


def _cast(op: Op) -> Affine | None:
    source, to = op.operand(0), op.result.tensor.dtype
    if source is None or to is None or not to.is_float or len(op.result.tensor.shape or ()) < 2:
        return None
    if source.graph.root.dialect == "aten" and (found := affine(source)) is not None:
        return found
    codes = expression(source)
    if codes is None or not codes.dtype.is_integer:
        return None
    name = source.name if source.is_const else op.result.name
    return Affine(codes, np.ones((), np.float64), np.zeros((), np.float64), name)


def narrowest(codes: Array) -> DType | None:
    """The narrowest type of at most 8 bits that holds every one of ``codes``; None where there is none."""
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    return next((TABLE[w] for w in WIDTHS if TABLE[w].qmin <= low and high <= TABLE[w].qmax), None)


def _goes_on(op: Op) -> bool:
    """The arithmetic is not at its end: the one op that reads the result adds a constant to it, or scales it."""
    users = op.result.users
    following = users[0] if len(users) == 1 else None
    while following is not None and following.name in PERMUTE and following.name.startswith("aten."):
        users = following.result.users
        following = users[0] if len(users) == 1 else None
    goes = following is not None and following.name in (*AFFINE, *(c for c in CASTS if c.startswith("aten.")))
    return following is not None and goes and affine(following.result) is not None


@rule(*AFFINE, *CASTS)
def lift_arithmetic(op: Op, rw: Rewriter) -> Value:
    """(cast(c) - z) * s  ->  q.dequantize(c, s, z)   for constants, in any order of the arithmetic"""
    if op.result.is_output or _goes_on(op) or not all(u.name in READERS for u in op.result.users):
        raise rw.declined("its result goes on", quiet=True)
    found = affine(op.result)
    if found is None:
        raise rw.declined("no codes that are cast and scaled", quiet=True)
    element = narrowest(found.codes.array())
    shape = found.codes.shape
    if element is None or op.result.tensor.static_shape != shape:
        raise rw.declined("its whole numbers take more than 8 bits", quiet=True)
    small = np.broadcast_shapes(found.scale.shape, found.offset.shape)
    scale, offset = (np.broadcast_to(v, small) for v in (found.scale, found.offset))
    if not scale.all():
        raise rw.declined("a scale is 0", code="QC302")
    zeros = np.rint(-offset / scale)
    slack = 1e-5 * np.maximum(np.abs(zeros), 1) * np.abs(scale)
    if (np.abs(offset + zeros * scale) > slack).any():
        raise rw.declined("its zero points are no whole numbers", code="QC204", fix="quantize with integer zero points")
    where = _place(rw, small, shape)
    codes, zeros, element = _fit(rw, found.codes, zeros, element)
    const = rw.const(f"{found.name}.codes", codes)
    out = op.result.tensor.dtype or F32
    scales = rw.const(f"{found.name}.scales", constant(scale.reshape(where[1]), out))
    points = None
    if zeros.any() or not element.signed:
        points = rw.const(f"{found.name}.zeros", constant(zeros.reshape(where[1]), element))
    scheme = Scheme(element, where[0].granularity, points is None, where[0].group, where[0].axis)
    return dequantized(rw, const, Parameters(scheme, scales, points), out)


def _place(rw: Rewriter, small: tuple[int, ...], shape: tuple[int, ...]) -> tuple[Scheme, tuple[int, ...]]:
    """How factors of shape ``small`` scale a tensor of ``shape``: granularity, and the shape of the parameters."""
    full = (*[1] * (len(shape) - len(small)), *small)
    kept = [i for i, (d, f) in enumerate(zip(shape, full, strict=True)) if f != 1]
    any_type = TABLE["int8"]
    if not kept:
        return Scheme(any_type, "tensor"), ()
    if len(kept) == 1:
        return Scheme(any_type, "channel", axis=kept[0]), (shape[kept[0]],)
    left = [i for i in range(len(shape)) if i not in kept]
    if len(left) == 1 and shape[left[0]] in (16, 32, 64, 128, 256, 512, 1024):
        return Scheme(any_type, "group", True, (shape[left[0]],), left[0]), full
    raise rw.declined(f"factors of shape {list(small)} scale {list(shape)} in no way that a scheme has", code="QC202")


def _fit(rw: Rewriter, codes: Payload, zeros: Array, element: DType) -> tuple[Payload, Array, DType]:
    """Codes and zero points in one type: both count from where the type holds all of them."""
    low, high = zeros.min(), zeros.max()
    if not (element.qmin <= low and high <= element.qmax):
        wide = TABLE["int8"] if element.signed else TABLE["uint8"]
        if not (wide.qmin <= low and high <= wide.qmax):
            raise rw.declined(f"a zero point is {high if high > wide.qmax else low:g}, outside of {wide}", code="QC204")
        element = wide
    kept = element
    if codes.dtype == kept:
        return codes, zeros, kept
    return computed("codes", lambda p: p.array().astype(kept.storage), [codes], kept, codes.shape), zeros, kept


RULES = (lift_arithmetic,)
