"""Ops that commute with quantizing: data movement, which copies elements, and clamps, which are monotone.

For a per-tensor scheme and any op ``m`` that only copies elements, ``quantize(m(x)) == m(quantize(x))`` and
``dequantize(m(c)) == m(dequantize(c))``. A clamp is monotone, and so is quantizing, hence
``quantize(clip(x, lo, hi)) == clip(quantize(x), quantize(lo), quantize(hi))``; where ``quantize(lo)`` is the smallest
code and ``quantize(hi)`` the largest, the clip does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qcompiler.ir import Op, Value

Kind = Literal["permute", "repeat", "select", "pad", "concat"]


def _named(names: str) -> frozenset[str]:
    return frozenset(f"onnx.{name}" for name in names.split())


PERMUTE = _named("Transpose Reshape Squeeze Unsqueeze Flatten Identity DepthToSpace SpaceToDepth")
"""Each element of the operand once, in another order."""
REPEAT = _named("Expand Tile Resize Upsample")
"""Each element of the operand at least once, where they repeat to the nearest."""
SELECT = _named("Slice Split Gather GatherND GatherElements MaxPool")
"""Some of the elements of the operand."""

SINCE = {"onnx.MaxPool": 12, "onnx.DepthToSpace": 11, "onnx.Pad": 13, "onnx.Clip": 12, "onnx.Upsample": 7}
"""The opset from which an op takes 8-bit codes; the others always did, Resize since it exists."""


def opset(op: Op) -> int:
    """The version of the standard operators in the graph of ``op``; a graph without one has the newest."""
    found = dict(op.graph.root.meta.get("opset_import", ()))
    return int(found.get("", 0)) or 1 << 16


def movement_kind(op: Op) -> Kind | None:
    """How ``op`` copies the elements of its data operand(s); None where it does more, or cannot do it on codes."""
    name = op.name
    if not name.startswith("onnx.") or opset(op) < SINCE.get(name, 0):
        return None
    if name in PERMUTE:
        return "permute"
    if name in REPEAT:
        if name in ("onnx.Resize", "onnx.Upsample") and str(op.attrs.get("mode", "nearest")) != "nearest":
            return None
        return "repeat"
    if name == "onnx.Pad":
        return _pad(op)
    if name == "onnx.Concat":
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
    return tuple(range(len(op.operands))) if op.name == "onnx.Concat" else (0,)


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
    if op.name == "onnx.Relu":
        return Clamp(0.0, None)
    if op.name != "onnx.Clip":
        return None
    if len(op.operands) == 1:
        lo, hi = op.attrs.get("min"), op.attrs.get("max")
        return Clamp(None if lo is None else float(lo), None if hi is None else float(hi))
    bounds = [(v, number(v)) for v in (op.operand(1), op.operand(2))]
    if any(v is not None and n is None for v, n in bounds):
        return None
    return Clamp(bounds[0][1], bounds[1][1])


def clips_codes(op: Op) -> bool:
    """True where the graph of ``op`` may hold a Clip of 8-bit codes."""
    return opset(op) >= SINCE["onnx.Clip"]


def is_nonnegative(value: Value) -> bool:
    """True where ``value`` has no negative elements: a Relu, Clip, Sigmoid or Softmax, and copies or means of one."""
    while (op := value.owner) is not None:
        bounds = clamp(op)
        if op.name in ("onnx.Sigmoid", "onnx.Softmax") or (bounds and bounds.lo is not None and bounds.lo >= 0.0):
            return True
        copies = movement_kind(op) in ("permute", "repeat", "select", "pad") or op.name in SELECT
        source = op.operand(0)
        if source is None or not (copies or op.name in ("onnx.AveragePool", "onnx.GlobalAveragePool")):
            return False
        value = source
    return False
