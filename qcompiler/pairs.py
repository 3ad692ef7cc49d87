"""Pairs of quantize and dequantize: which are of activations, which have the same parameters."""

from __future__ import annotations

import numpy as np

from qcompiler.dtypes import Array
from qcompiler.ir import Op, Value
from qcompiler.payload import ArrayPayload
from qcompiler.scheme import Scheme


def same_value(a: Value | None, b: Value | None) -> bool:
    """True when both are one value, or constants of the same type whose bytes are at hand and equal."""
    if a is b:
        return True
    if a is None or b is None or not (a.is_const and b.is_const) or a.type != b.type:
        return False
    if a.payload is b.payload:
        return True
    if isinstance(a.payload, ArrayPayload) and isinstance(b.payload, ArrayPayload):
        return bool(np.array_equal(a.payload.array(), b.payload.array()))
    return False


def same_parameters(a: Op, b: Op) -> bool:
    """True when two Q or DQ ops have the same scheme, scale and zero point."""
    if a.attrs.get("scheme") != b.attrs.get("scheme"):
        return False
    return same_value(a.operand(1), b.operand(1)) and same_value(a.operand(2), b.operand(2))


def is_constant(value: Value | None) -> bool:
    """A constant, or codes of one that are not folded yet."""
    if value is None or value.is_const:
        return value is not None
    owner = value.owner
    return owner is not None and owner.name in ("q.quantize", "q.dequantize") and is_constant(owner.operand(0))


def is_activation(op: Op) -> bool:
    """True for a quantize or dequantize, per tensor or dynamic, of something that is computed, not stored."""
    scheme = op.attrs.get("scheme")
    known = isinstance(scheme, Scheme) and (scheme.granularity == "tensor" or scheme.dynamic)
    return known and not is_constant(op.operand(0))


def scalar_parameters(op: Op) -> tuple[Array, Array | None] | None:
    """Scale and zero point of a Q or DQ op whose parameters are constants of one element; else None."""
    scale, zero = op.operand(1), op.operand(2)
    if scale is None or scale.payload is None or not scale.is_const or scale.payload.size != 1:
        return None
    if zero is not None and (zero.payload is None or not zero.is_const):
        return None
    values = [None if v is None or v.payload is None else v.payload.array().reshape(()) for v in (scale, zero)]
    assert values[0] is not None
    return values[0], values[1]
