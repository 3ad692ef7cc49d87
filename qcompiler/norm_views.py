"""The view of a normalisation with constant factors, whatever it is written as: one node or several.

``result = normalised(input) * scale + bias`` along one axis: the last one, or axis 1 for BatchNormalization. A factor
``[K]`` on the result folds into ``scale`` and ``bias``, exactly but for float rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qcompiler.ir import Hole, Op, Value
from qcompiler.rewrite import Declined
from qcompiler.spec import is_float_const
from qcompiler.target import Reason
from qcompiler.views import call_args

_LAYER = ("onnx.LayerNormalization", "aten.layer_norm.default", "aten.native_layer_norm.default")
_RMS = ("onnx.SimplifiedLayerNormalization", "com.microsoft.SimplifiedLayerNormalization")
_RMS_ATEN = ("onnx.RMSNormalization", "aten.rms_norm.default")
_SKIP = ("com.microsoft.SkipLayerNormalization", "com.microsoft.SkipSimplifiedLayerNormalization")
_BATCH = "onnx.BatchNormalization"
_MULTIPLY = ("onnx.Mul", "aten.mul.Tensor")
_ADD = ("onnx.Add", "aten.add.Tensor")
_PLAIN = ("onnx.Cast", "onnx.Reciprocal", "onnx.Expand", "onnx.Identity", "onnx.CastLike", "aten.reciprocal.default")
_PLAIN_ATEN = ("aten.to.dtype", "aten._to_copy.default", "aten.type_as.default")
_ROOTS = ("onnx.Sqrt", "aten.sqrt.default", "aten.rsqrt.default")
_DIVIDE = ("onnx.Div", "onnx.Mul", "aten.div.Tensor", "aten.mul.Tensor")

NORM_OPS = frozenset((*_LAYER, *_RMS, *_RMS_ATEN, *_SKIP, _BATCH, *_MULTIPLY, *_ADD))
"""Ops that may be the last one of a normalisation."""


@dataclass(frozen=True, slots=True)
class NormView:
    """``result = normalised(input) * scale + bias``.

    ``scale`` and ``bias`` are float constants of ``k`` elements, ``[k]`` or ``[1, .., 1, k]``; ``bias`` is None where
    there is none. ``op`` is the op that makes ``result``; operand ``scale_slot`` of ``scale_op`` reads the scale,
    operand ``bias_slot`` of ``bias_op`` the bias (an absent operand has no slot: both are None). ``axis`` is that of
    the channels in ``result``: -1, or 1 for a batch normalisation. ``kind`` is layer, rms, batch, or, for the
    multiplication behind a normalisation in several ops, parts: there ``input`` is what is multiplied.
    """

    op: Op
    kind: str
    input: Value
    scale: Value
    bias: Value | None
    k: int
    axis: int
    result: Value
    scale_op: Op
    scale_slot: int
    bias_op: Op | None
    bias_slot: int | None


def as_norm(op: Op) -> NormView:
    """The normalisation whose last op is ``op``; raises Declined with the reason why it is none."""
    if op.name not in NORM_OPS:
        raise Declined(f"{op.name} is no normalisation", quiet=True)
    if op.name in (*_MULTIPLY, *_ADD):
        return _in_parts(op)
    kind = _kind(op)
    _one_axis(op, kind)
    scale_slot, bias_slot = _slots(op)
    if scale_slot is None:
        raise _no_scale(op)
    has_bias = bias_slot is not None and op.operand(bias_slot) is not None
    return _view(op, kind, op.operand(0), op, scale_slot, op if has_bias else None, bias_slot if has_bias else None)


def _kind(op: Op) -> str:
    if op.name == _BATCH:
        return "batch"
    return "layer" if op.name in (*_LAYER, _SKIP[0]) else "rms"


def _slots(op: Op) -> tuple[int | None, int | None]:
    """The operands that hold scale and bias; None where the op has no such operand."""
    if op.name.startswith("aten."):
        args: Any = op.attrs.get("args", ())
        scale, bias = [a.index if isinstance(a, Hole) else None for a in (*args, None, None)[2:4]]
        return scale, bias if op.name in _LAYER else None
    if op.name in _SKIP:
        return 2, 3 if op.name == _SKIP[0] else None
    return 1, None if op.name in (*_RMS, *_RMS_ATEN) else 2


def _no_scale(op: Op) -> Declined:
    return Declined(Reason("", f"{op.name} '{op.label}' has no constant scale [K] that a factor could go into"))


def _one_axis(op: Op, kind: str) -> None:
    """Decline normalisations over several axes, and batch normalisations in training."""
    if kind == "batch":
        if op.attrs.get("training_mode", 0) or any(r.uses for r in op.results[1:]):
            raise Declined(Reason("", f"{op.name} '{op.label}' is in training mode: its statistics are not constant"))
        return
    rank = op.results[0].tensor.rank
    axis = op.attrs.get("axis", -1)
    if isinstance(axis, int) and axis != -1 and (rank is None or axis != rank - 1):
        raise Declined(Reason("", f"{op.name} '{op.label}' normalises axes {axis}.., not the last one alone"))


def _view(
    op: Op, kind: str, source: Value | None, scale_op: Op, scale_slot: int, bias_op: Op | None, bias_slot: int | None
) -> NormView:
    scale = scale_op.operand(scale_slot)
    bias = None if bias_op is None or bias_slot is None else bias_op.operand(bias_slot)
    if source is None or scale is None or (k := row_length(scale)) is None:
        raise _no_scale(op)
    if bias is not None and row_length(bias) != k:
        message = f"{op.name} '{op.label}' adds {bias!r}, which is no constant of {k} elements"
        raise Declined(Reason("", message))
    axis = 1 if kind == "batch" else -1
    return NormView(op, kind, source, scale, bias, k, axis, op.results[0], scale_op, scale_slot, bias_op, bias_slot)


def row_length(value: Value | None) -> int | None:
    """K of a float constant ``[K]`` or ``[1, .., 1, K]`` with K > 1; None for anything else."""
    if not is_float_const(value) or value is None:
        return None
    shape = value.tensor.static_shape
    if not shape or set(shape[:-1]) - {1}:
        return None
    return shape[-1] if shape[-1] > 1 else None


def _in_parts(op: Op) -> NormView:
    """``mul(x / sqrt(..), scale)``, and ``add`` of a constant behind it."""
    bias_op, bias_slot, multiply = None, None, op
    if op.name in _ADD:
        if dict(op.attrs.get("kwargs", ())).get("alpha", 1) != 1:
            raise Declined(f"{op.name} is no normalisation", quiet=True)
        bias_slot = _constant_slot(op)
        inner = None if bias_slot is None else op.operand(1 - bias_slot)
        if inner is None or inner.owner is None or len(inner.uses) != 1 or inner.owner.name not in _MULTIPLY:
            raise Declined(f"{op.name} is no normalisation", quiet=True)
        bias_op, multiply = op, inner.owner
    for scale_op, scale_slot, source in _scales(multiply):
        k = row_length(scale_op.operand(scale_slot))
        known = [s[-1] for s in (source.tensor.shape, op.result.tensor.shape) if s and isinstance(s[-1], int)]
        if all(length == k for length in known):  # else the scale widens what it multiplies
            return _view(op, "parts", source, scale_op, scale_slot, bias_op, bias_slot)
    raise Declined(f"{op.name} is no normalisation", quiet=True)


def _scales(multiply: Op) -> Iterator[tuple[Op, int, Value]]:
    """Where a constant scales what a root divides: the op and slot that read it, and what is scaled.

    ``(x / root) * scale``, or ``x * (1 / root * scale)``, as Flax writes it.
    """
    slot = _constant_slot(multiply)
    if slot is not None:
        source = multiply.operand(1 - slot)
        if source is not None and _normalised(source):
            yield multiply, slot, source
        return
    for factor, source in zip(multiply.operands, multiply.operands[::-1], strict=True):
        inner = None if factor is None else factor.owner
        if inner is None or source is None or factor is source or inner.name not in _MULTIPLY:
            continue
        slot = _constant_slot(inner)
        if slot is not None and factor is not None and len(factor.uses) == 1 and _is_root(inner.operand(1 - slot)):
            yield inner, slot, source


def _constant_slot(op: Op) -> int | None:
    """The slot of the operand that is a constant row; the other one must be none."""
    rows = [i for i in (0, 1) if row_length(op.operand(i)) is not None]
    return rows[0] if len(rows) == 1 and len(op.operands) == 2 else None


def _normalised(value: Value) -> bool:
    """True when ``value`` is a quotient by a square root, or a product with the inverse of one."""
    op = _behind(value).owner
    return op is not None and op.name in _DIVIDE and any(_is_root(v) for v in op.operands)


def _is_root(value: Value | None) -> bool:
    op = None if value is None else _behind(value).owner
    if op is None:
        return False
    if op.name in ("onnx.Div", "aten.div.Tensor") and len(op.operands) == 2:  # 1 / sqrt(..)
        below = op.operand(1)
        op = None if below is None else _behind(below).owner
    return op is not None and (op.name in _ROOTS or _is_power(op))


def _is_power(op: Op) -> bool:
    """True for a square root, or its inverse, written as a power."""
    if op.name not in ("onnx.Pow", "aten.pow.Tensor_Scalar"):
        return False
    if op.name.startswith("aten."):
        args = call_args(op)
        return len(args) == 2 and args[1] in (-0.5, 0.5)
    exponent = op.operand(1)
    if exponent is None or not exponent.is_const or exponent.payload is None or exponent.payload.size != 1:
        return False
    return abs(float(exponent.payload.array().reshape(()))) == 0.5


def _behind(value: Value) -> Value:
    """``value`` without the casts, expansions and reciprocals before it."""
    while (op := value.owner) is not None and op.name in (*_PLAIN, *_PLAIN_ATEN):
        source = op.operand(0)
        if source is None:
            break
        value = source
    return value
