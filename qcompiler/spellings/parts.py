"""What the decoders share: scales, zero points and codes of any spelling, as a scheme and its operands.

Codes and scales are kept: a decoder gives them another shape, unpacks them or counts them from another zero, and never
rounds a weight again. The operands have the shapes of :func:`qcompiler.op_spec.scale_shape`: ``[]`` for a tensor,
``[C]`` for a channel, the tensor's shape with the grouped axis divided for a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from qcompiler.dtypes import INT64, TABLE, Array, DType
from qcompiler.errors import RecipeError
from qcompiler.ir import Op, TensorType, Value
from qcompiler.payload import ArrayPayload, Payload, computed, constant
from qcompiler.rewrite import Rewriter
from qcompiler.scheme import Granularity, Scheme
from qcompiler.spec import is_float_const
from qcompiler.spellings.expressions import settle

EAGER = 1 << 16
"""Parameters of at most so many elements are read at once, so that equal ones are seen to be equal."""


class Parameters(NamedTuple):
    """A scheme with its scale and zero point; the zero point is None for a symmetric scheme."""

    scheme: Scheme
    scale: Value
    zero: Value | None


def static_shape(value: Value) -> tuple[int, ...] | None:
    """The shape, where every size is a number."""
    return value.tensor.static_shape


def once(rw: Rewriter, value: Value, suffix: str, make: Callable[[Payload], Payload]) -> Value:
    """The constant that ``make`` derives from the constant ``value``, made once."""
    name = f"{value.name}.{suffix}"
    known = value.graph.local(name)
    if known is not None and known.is_const:
        return known
    assert value.payload is not None
    made = rw.const(name, make(value.payload), value.graph)
    made.meta["origin"] = value.meta.get("origin", value.name)
    return made


def transformed(
    payload: Payload, label: str, fn: Callable[[Array], Array], element: DType, shape: tuple[int, ...]
) -> Payload:
    """``fn`` of the payload's array: at once when it is small, else recorded."""
    if payload.size <= EAGER:
        return constant(np.ascontiguousarray(fn(payload.array())).reshape(shape), element)
    return computed(label, lambda p: fn(p.array()), [payload], element, shape)


def reshaped(rw: Rewriter, value: Value, shape: tuple[int, ...]) -> Value:
    """``value`` in another shape of as many elements; a constant stays one."""
    if value.tensor.static_shape == shape:
        return value
    if value.is_const:
        word = "x".join(map(str, shape)) or "scalar"
        return once(
            rw, value, word, lambda p: transformed(p, f"reshape[{word}]", lambda a: a.reshape(shape), p.dtype, shape)
        )
    to = rw.const(f"{value.name}.shape", constant(np.array(shape, np.int64), INT64))
    return rw.op("onnx.Reshape", value, to, type=TensorType(value.tensor.dtype, shape))


def parameters(
    rw: Rewriter,
    codes: Value,
    element: DType,
    scale: Value | None,
    zero: Value | None,
    *,
    axis: int = 1,
    block: int = 0,
) -> Parameters:
    """Scheme, scale and zero point of codes that are scaled per tensor, along ``axis``, or in blocks of ``axis``.

    Declines with a reason for shapes that fit no scheme, block sizes that no scheme has and float zero points that are
    not whole numbers. Unsigned codes always have a zero point, signed ones only where it is not 0.
    """
    if scale is None:
        raise rw.declined("it has no scale", code="QC205")
    scale, zero = settle(rw, scale), None if zero is None else settle(rw, zero)
    if not element.is_integer or element.bits > 8:
        raise rw.declined(f"{element} codes have no kernel; int8, int4, int2 and their unsigned kin do", code="QC201")
    shape, small = static_shape(codes), static_shape(scale)
    if small is None:
        raise rw.declined(f"the shape of the scale {scale!r} is not known", code="QC205")
    granularity, where, wanted = _granularity(rw, shape, codes.tensor.rank, small, axis, block)
    scale = _at_hand(rw, reshaped(rw, scale, wanted))
    zero = zero_point(rw, zero, element, wanted, scale)
    group = (block,) if granularity == "group" else ()
    try:
        scheme = Scheme(element, granularity, zero is None, group, where)
    except RecipeError as e:
        raise rw.declined(str(e), code="QC202", fix="quantize in blocks of 16, 32, 64, 128 or 256") from None
    return Parameters(scheme, scale, zero)


def _at_hand(rw: Rewriter, value: Value) -> Value:
    """A constant of one element with its bytes in memory, so that equal ones are seen to be equal."""
    if not value.is_const or value.payload is None or value.payload.size != 1 or value.tensor.dtype is None:
        return value
    if isinstance(value.payload, ArrayPayload):
        return value
    element = value.tensor.dtype
    return once(rw, value, "one", lambda p: constant(p.array(), element))


def _granularity(
    rw: Rewriter, shape: tuple[int, ...] | None, rank: int | None, small: tuple[int, ...], axis: int, block: int
) -> tuple[Granularity, int | None, tuple[int, ...]]:
    """Granularity, its axis, and the shape that its parameters have."""
    if math.prod(small) == 1 and not (block and shape is not None and len(small) == len(shape)):
        return "tensor", None, ()
    if shape is None or rank is None:
        raise rw.declined("the shape of its codes is not known, and they have several scales", code="QC205")
    axis %= len(shape) or 1
    if block:
        wanted = tuple(-(-d // block) if i == axis else d for i, d in enumerate(shape))
        if small != wanted:
            raise rw.declined(f"blocks of {block} of {list(shape)} have scales {list(wanted)}, not {list(small)}")
        return "group", axis, wanted
    if small != (shape[axis],):
        raise rw.declined(f"axis {axis} of {list(shape)} has scales [{shape[axis]}], not {list(small)}", code="QC205")
    return "channel", axis, small


def zero_point(rw: Rewriter, zero: Value | None, element: DType, shape: tuple[int, ...], scale: Value) -> Value | None:
    """The zero point in the type of the codes and ``shape``; None where it is 0 and the codes are signed."""
    if zero is None:
        return None if element.signed else nought(rw, scale, element, shape)
    if not zero.is_const or zero.payload is None:
        size = static_shape(zero)
        if size is None or (math.prod(size) != 1 and size != shape):
            raise rw.declined(f"the zero point {zero!r} has a shape that its scale has not", code="QC205")
        return reshaped(rw, zero, shape)
    values = zero.payload.array()
    if values.size != 1 and values.size != math.prod(shape):
        raise rw.declined(f"{values.size} zero points stand beside {math.prod(shape)} scales", code="QC205")
    whole(rw, values, element)
    if element.signed and not values.any():
        return None
    if zero.tensor.dtype == element and values.shape == shape:
        return _at_hand(rw, zero)

    def make(p: Payload) -> Payload:
        spread = np.broadcast_to(p.array().reshape(shape if p.size == math.prod(shape) else ()), shape)
        return constant(np.ascontiguousarray(spread).reshape(shape).astype(element.storage), element)

    return once(rw, zero, f"{element}.{'x'.join(map(str, shape)) or 'scalar'}", make)


def whole(rw: Rewriter, values: Array, element: DType) -> None:
    """Decline unless every zero point is a whole number that ``element`` holds."""
    wide = values.astype(np.float64)
    off = wide[wide != np.rint(wide)]
    if off.size:
        raise rw.declined(
            f"{off.size} of {wide.size} zero points are no whole numbers ({off[0]:g} is the first): no kernel counts "
            "codes from between two of them",
            code="QC204",
            fix="quantize with integer zero points",
        )
    if wide.size and (wide.min() < element.qmin or wide.max() > element.qmax):
        far = wide.max() if wide.max() > element.qmax else wide.min()
        raise rw.declined(f"a zero point is {far:g}, outside of {element}", code="QC204")


def nought(rw: Rewriter, beside: Value, element: DType, shape: tuple[int, ...]) -> Value:
    """A constant of zeros in the type of the codes, one for each ``beside``."""
    name = f"{beside.name}.{element}.zero"
    known = beside.graph.local(name)
    if known is not None and known.is_const:
        return known
    return rw.const(name, constant(np.zeros(shape, element.storage), element), beside.graph)


def dequantized(rw: Rewriter, codes: Value, p: Parameters, element: DType | None = None, hint: str = "") -> Value:
    """``q.dequantize`` of ``codes``, in the type of the scale unless given."""
    kind = TensorType(element or p.scale.tensor.dtype, codes.tensor.shape)
    name = hint or f"{codes.name}_dq"
    return rw.op("q.dequantize", codes, p.scale, p.zero, type=kind, hint=name, scheme=p.scheme)


def quantized(rw: Rewriter, x: Value, p: Parameters, hint: str = "") -> Value:
    """``q.quantize`` of ``x``."""
    kind = TensorType(p.scheme.dtype, x.tensor.shape)
    return rw.op("q.quantize", x, p.scale, p.zero, type=kind, hint=hint or f"{x.name}_q", scheme=p.scheme)


def code_type(codes: Value, zero: Value | None = None) -> DType:
    """The type of the codes, or of the zero point beside them; uint8 where neither is known."""
    return codes.tensor.dtype or (None if zero is None else zero.tensor.dtype) or TABLE["uint8"]


def constant_codes(rw: Rewriter, codes: Value | None, what: str = "codes") -> Value:
    """``codes`` as a constant; declines where a caller may change them."""
    if codes is None:
        raise rw.declined(f"it has no {what}", code="QC205")
    codes = settle(rw, codes)
    if codes.is_const and codes.payload is not None:
        return codes
    why = "a graph input with a default, which a caller may replace" if codes.is_input else "computed at run time"
    raise rw.declined(
        f"the {what} {codes!r} are {why}: a fused kernel packs them before it runs",
        code="QC205",
        fix="make them initializers that are no graph inputs",
    )


def float_bias(rw: Rewriter, bias: Value, factors: list[Value], n: int, element: DType) -> Value:
    """An int32 bias in steps of the product of ``factors`` as a float constant ``[n]``, rounded once.

    Declines where any of them is no constant.
    """
    values = [settle(rw, v) for v in (bias, *factors)]
    if not all(v.is_const and v.payload is not None for v in values):
        raise rw.declined("its int32 bias counts in steps that are known only at run time", code="QC205")
    arrays = [v.payload.array().astype(np.float64).reshape(-1) for v in values if v.payload is not None]
    out = np.broadcast_to(math.prod(arrays[1:], start=arrays[0]), (n,))
    return rw.const(f"{bias.name}.float", constant(np.ascontiguousarray(out), element), bias.graph)


def permuted_shape(shape: tuple[object, ...] | None, perm: tuple[int, ...]) -> tuple[object, ...] | None:
    """``shape`` with its axes in the order ``perm``."""
    return None if shape is None else tuple(shape[i] for i in perm)


def transposed(rw: Rewriter, matrix: Value) -> Value:
    """The transpose of a matrix, as the host op."""
    shape = permuted_shape(matrix.tensor.shape, (1, 0))
    return rw.op("onnx.Transpose", matrix, type=TensorType(matrix.tensor.dtype, shape), perm=(1, 0))  # type: ignore[arg-type]


def is_float(value: Value | None) -> bool:
    """A float constant."""
    return is_float_const(value)


def int_attr(op: Op, name: str, default: int) -> int:
    """An integer attribute; its default where absent or of another type."""
    value = op.attrs.get(name, default)
    return value if isinstance(value, int) else default
