"""Ops that commute with quantizing: data movement, which copies elements, and clamps, which are monotone.

For a per-tensor scheme and any op ``m`` that only copies elements, ``quantize(m(x)) == m(quantize(x))`` and
``dequantize(m(c)) == m(dequantize(c))``. A clamp is monotone, and so is quantizing, hence
``quantize(clip(x, lo, hi)) == clip(quantize(x), quantize(lo), quantize(hi))``; where ``quantize(lo)`` is the smallest
code and ``quantize(hi)`` the largest, the clip does nothing.

ONNX and aten spell them differently; everything here reads both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from qcompiler.ir import Op, OpaqueType, Value
from qcompiler.views import call_args

Kind = Literal["permute", "repeat", "select", "pad", "concat"]


def _named(names: str) -> frozenset[str]:
    return frozenset(f"onnx.{name}" for name in names.split())


def _aten(names: str) -> frozenset[str]:
    return frozenset(f"aten.{name}" for name in names.split())


PERMUTE = _named("Transpose Reshape Squeeze Unsqueeze Flatten Identity DepthToSpace SpaceToDepth") | _aten(
    "view.default _unsafe_view.default reshape.default flatten.using_ints unflatten.int t.default numpy_T.default "
    "transpose.int permute.default movedim.int squeeze.default squeeze.dim squeeze.dims unsqueeze.default "
    "contiguous.default clone.default alias.default detach.default pixel_shuffle.default pixel_unshuffle.default "
    "channel_shuffle.default roll.default flip.default"
)
"""Each element of the operand once, in another order."""
REPEAT = _named("Expand Tile Resize Upsample") | _aten(
    "expand.default repeat.default repeat_interleave.self_int upsample_nearest1d.vec upsample_nearest2d.vec "
    "upsample_nearest1d.default upsample_nearest2d.default"
)
"""Each element of the operand at least once, where they repeat to the nearest."""
SELECT = _named("Slice Split Gather GatherND GatherElements MaxPool") | _aten(
    "slice.Tensor select.int narrow.default split.Tensor split_with_sizes.default chunk.default unbind.int "
    "index_select.default max_pool1d.default max_pool2d.default"
)
"""Some of the elements of the operand."""
CONCAT = frozenset({"onnx.Concat", "aten.cat.default"})
RELU = frozenset({"onnx.Relu", "aten.relu.default"})
CODES_CLIP = {"onnx": "onnx.Clip", "aten": "aten.clamp.default"}
"""Dialect -> the op that clips codes."""

SINCE = {"onnx.MaxPool": 12, "onnx.DepthToSpace": 11, "onnx.Pad": 13, "onnx.Clip": 12, "onnx.Upsample": 7}
"""The opset from which an op takes 8-bit codes; the others always did, Resize since it exists."""


def opset(op: Op) -> int:
    """The version of the standard operators in the graph of ``op``; a graph without one has the newest."""
    found = dict(op.graph.root.meta.get("opset_import", ()))
    return int(found.get("", 0)) or 1 << 16


def movement_kind(op: Op) -> Kind | None:
    """How ``op`` copies the elements of its data operand(s); None where it does more, or cannot do it on codes."""
    name = op.name
    if not name.startswith(("onnx.", "aten.")) or opset(op) < SINCE.get(name, 0):
        return None
    if any(isinstance(r.type, OpaqueType) for r in op.results):
        return None  # a list that is passed on as one
    if name in PERMUTE:
        return "permute"
    if name in REPEAT:
        if name in ("onnx.Resize", "onnx.Upsample") and str(op.attrs.get("mode", "nearest")) != "nearest":
            return None
        return "repeat"
    if name == "onnx.Pad":
        return _pad(op)
    if name in CONCAT:
        return "concat"
    if name in SELECT and not (name == "onnx.MaxPool" and len(op.results) > 1):
        return "select"
    return None


def _pad(op: Op) -> Kind | None:
    """A pad by copies selects; one by zeros needs the zero point in their place; others are no movement."""
    if str(op.attrs.get("mode", "constant")) != "constant":
        return "select"
    value = op.operand(2)
    return "pad" if value is None or number(value) == 0 else None


def data_operands(op: Op) -> tuple[int, ...]:
    """The operands whose elements a movement or clamp copies."""
    return tuple(range(len(op.operands))) if op.name in CONCAT else (0,)


def permutation(op: Op) -> tuple[int, ...] | None:
    """The order of axes that a transpose of operand 0 gives; None for another op, or a rank that is not known."""
    source = op.operand(0)
    rank = None if source is None else source.tensor.rank
    if rank is None:
        return None
    order = list(range(rank))
    args: list[Any] = call_args(op)[1:]
    match op.name:
        case "onnx.Transpose":
            return tuple(op.attrs.get("perm") or order[::-1])
        case "aten.t.default" | "aten.numpy_T.default":
            return tuple(order[::-1])
        case "aten.transpose.int":
            a, b = args[0] % rank, args[1] % rank
            order[a], order[b] = order[b], order[a]
            return tuple(order)
        case "aten.permute.default":
            return tuple(d % rank for d in args[0])
    return None


def number(value: Value | None) -> float | None:
    """The one element of a constant that has just one and is no recorded computation; else None."""
    if value is None or not value.is_const or value.payload is None or value.payload.size != 1:
        return None
    if value.tensor.dtype is None or not (value.tensor.dtype.is_float or value.tensor.dtype.is_integer):
        return None
    return float(value.payload.array().reshape(()))


@dataclass(frozen=True, slots=True)
class Clamp:
    """``min(max(x, lo), hi)`` of operand 0, None where there is no bound."""

    lo: float | None
    hi: float | None


def clamp(op: Op) -> Clamp | None:
    """What ``op`` clamps its operand to; None where it is no clamp, or its bounds are no constants."""
    if op.name in RELU:
        return Clamp(0.0, None)
    if op.name in _ATEN_CLAMPS:
        return _aten_clamp(op)
    if op.name != "onnx.Clip":
        return None
    if len(op.operands) == 1:
        lo, hi = op.attrs.get("min"), op.attrs.get("max")
        return Clamp(None if lo is None else float(lo), None if hi is None else float(hi))
    bounds = [(v, number(v)) for v in (op.operand(1), op.operand(2))]
    if any(v is not None and n is None for v, n in bounds):
        return None
    return Clamp(bounds[0][1], bounds[1][1])


_ATEN_CLAMPS: dict[str, tuple[tuple[str, ...], tuple[float | None, float | None]]] = {
    "aten.clamp.default": (("min", "max"), (None, None)),
    "aten.clamp_min.default": (("min",), (None, None)),
    "aten.hardtanh.default": (("min_val", "max_val"), (-1.0, 1.0)),
    "aten.relu6.default": ((), (0.0, 6.0)),
}
"""Clamps of aten: the names of their bounds, and those that they have where the call says none."""


def _aten_clamp(op: Op) -> Clamp | None:
    names, bounds = _ATEN_CLAMPS[op.name]
    given: dict[str, Any] = dict(zip(names, call_args(op)[1:], strict=False)) | dict(op.attrs.get("kwargs", ()))
    found = [given.get(n, known) for n, known in zip((*names, "", "")[:2], bounds, strict=True)]
    if not all(f is None or isinstance(f, int | float) for f in found):
        return None
    return Clamp(*(None if f is None else float(f) for f in found))


def clips_codes(op: Op) -> bool:
    """True where the graph of ``op`` may hold a Clip of 8-bit codes."""
    return opset(op) >= SINCE["onnx.Clip"]


_NONNEGATIVE = _named("Sigmoid Softmax") | _aten("sigmoid.default softmax.int _softmax.default hardsigmoid.default")
_MEANS = _named("AveragePool GlobalAveragePool") | _aten("avg_pool2d.default adaptive_avg_pool2d.default mean.dim")


def is_nonnegative(value: Value) -> bool:
    """True where ``value`` has no negative elements: a Relu, Clip, Sigmoid or Softmax, and copies or means of one."""
    while (op := value.owner) is not None:
        bounds = clamp(op)
        if op.name in _NONNEGATIVE or (bounds and bounds.lo is not None and bounds.lo >= 0.0):
            return True
        copies = movement_kind(op) in ("permute", "repeat", "select", "pad") or op.name in SELECT
        source = op.operand(0)
        if source is None or not (copies or op.name in _MEANS):
            return False
        value = source
    return False
