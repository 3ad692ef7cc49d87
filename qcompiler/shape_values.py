"""What vectors of sizes hold before anything runs: numbers, and sizes of axes that only a run knows."""

from __future__ import annotations

from typing import TypeAlias

from qcompiler.ir import Op, Value

Size: TypeAlias = int | tuple[Value, int]
"""A number, or the size of an axis of a value. Sizes that are equal here are equal in every run."""
LONGEST = 16
"""Elements of the longest vector that is followed."""
DEPTH = 16


def size_of(value: Value, axis: int) -> Size:
    """The size of ``axis`` (from 0) of ``value``, whose rank is known."""
    known = (value.tensor.shape or ())[axis]
    return known if isinstance(known, int) else (value, axis)


def sizes(value: Value | None, depth: int = DEPTH) -> tuple[Size, ...] | None:
    """The elements of an integer vector or scalar: of a constant, of ``onnx.Shape``, and of what only moves those; None
    where one of them is something else."""
    if value is None or depth == 0:
        return None
    if value.is_const:
        return _numbers(value)
    op = value.owner
    return None if op is None else _made(op, depth - 1)


def _numbers(value: Value | None) -> tuple[int, ...] | None:
    """The elements of a small constant of integers."""
    payload = None if value is None or not value.is_const else value.payload
    if value is None or payload is None or payload.size > LONGEST or len(payload.shape) > 1:
        return None
    element = value.tensor.dtype
    if element is None or not element.is_integer:
        return None
    return tuple(int(n) for n in payload.array().reshape(-1))


def _made(op: Op, depth: int) -> tuple[Size, ...] | None:
    match op.name:
        case "onnx.Shape":
            x = op.operand(0)
            if x is None or x.tensor.rank is None:
                return None
            found: tuple[Size, ...] = tuple(size_of(x, axis) for axis in range(x.tensor.rank))
            return found[op.attrs.get("start", 0) : op.attrs.get("end", len(found))]
        case "onnx.Concat":
            parts = [sizes(v, depth) for v in op.operands]
            if any(p is None for p in parts):
                return None
            return tuple(n for p in parts if p is not None for n in p)
        case "onnx.Identity" | "onnx.Unsqueeze" | "onnx.Squeeze":
            return sizes(op.operand(0), depth)
        case "onnx.Slice":
            return _sliced(op, sizes(op.operand(0), depth))
        case "onnx.Gather":
            taken, all_of_them = _numbers(op.operand(1)), sizes(op.operand(0), depth)
            if (
                taken is None
                or all_of_them is None
                or any(not -len(all_of_them) <= i < len(all_of_them) for i in taken)
            ):
                return None
            return tuple(all_of_them[i] for i in taken)
    return None


def _sliced(op: Op, whole: tuple[Size, ...] | None) -> tuple[Size, ...] | None:
    """A slice whose bounds are constant operands; older opsets have them as attributes and are not followed."""
    starts, ends, steps = _numbers(op.operand(1)), _numbers(op.operand(2)), _numbers(op.operand(4))
    if whole is None or starts is None or ends is None or len(starts) != 1 or len(ends) != 1:
        return None
    if op.operand(4) is not None and (steps is None or steps[0] <= 0):
        return None
    return whole[starts[0] : ends[0] : steps[0] if steps else 1]
