"""What aten ops on constants give, computed with NumPy in the types that the graph states: casts, masks, shifts, moves.

Only ops that exporters leave around packed codes, scales and zero points are here. Integers wrap as torch's do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qcompiler.dtypes import Array, DType
from qcompiler.ir import Attr, Hole, Op

_TWO: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: b - a,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "remainder": np.mod,
    "floor_divide": np.floor_divide,
    **dict.fromkeys(("bitwise_and", "__and__"), lambda a, b: a & b),
    **dict.fromkeys(("bitwise_or", "__or__"), lambda a, b: a | b),
    **dict.fromkeys(("bitwise_xor", "__xor__"), lambda a, b: a ^ b),
    **dict.fromkeys(("bitwise_right_shift", "__rshift__"), lambda a, b: a >> b),
    **dict.fromkeys(("bitwise_left_shift", "__lshift__"), lambda a, b: a << b),
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MOVES = _words("view reshape _unsafe_view flatten unflatten unsqueeze squeeze contiguous clone alias detach")
_CASTS = _words("to _to_copy type_as")
_OTHER = _words("t numpy_T permute transpose cat stack expand neg slice select repeat_interleave")


def base_of(op: Op) -> str:
    """``mul`` of ``aten.mul.Tensor``; empty for an op of another dialect."""
    if op.name in ("prims.convert_element_type.default", "quantized_decomposed.convert_element_type.no_fuse"):
        return "to"
    parts = op.name.split(".")
    return parts[1] if parts[0] == "aten" and len(parts) == 3 else ""


def is_known(op: Op) -> bool:
    """:func:`run_aten` computes ``op``, where its operands are constants."""
    base = base_of(op)
    if op.name == "aten.view.dtype" or any(k not in ("dtype", "memory_format") for k, _ in op.attrs.get("kwargs", ())):
        return False
    return base in _TWO or base in _MOVES or base in _CASTS or base in _OTHER


def run_aten(op: Op, arrays: Sequence[Array], shape: tuple[int, ...], element: DType) -> Array:
    """The result of ``op``, of ``shape`` and ``element``, for its operands in order."""

    def filled(arg: Attr) -> Any:
        if isinstance(arg, Hole):
            return arrays[arg.index]
        return [filled(a) for a in arg] if isinstance(arg, tuple) else arg

    args = [filled(a) for a in op.attrs["args"]]  # an op that is gone keeps its attributes, not its operands
    with np.errstate(over="ignore"):
        out = _compute(base_of(op), args, shape, element)
    return np.ascontiguousarray(np.asarray(out).astype(element.storage, copy=False)).reshape(shape)


def _compute(base: str, args: list[Any], shape: tuple[int, ...], element: DType) -> Any:
    x = args[0]
    if base in _TWO:
        if not element.is_float:
            args = [np.asarray(a).astype(element.storage) for a in args[:2]]
        return _TWO[base](args[0], args[1])
    match base:
        case "t" | "numpy_T":
            return x.T
        case "permute":
            return x.transpose(args[1])
        case "transpose":
            return np.swapaxes(x, args[1], args[2])
        case "cat":
            return np.concatenate(x, axis=args[1] if len(args) > 1 else 0)
        case "stack":
            return np.stack(x, axis=args[1] if len(args) > 1 else 0)
        case "expand":
            return np.broadcast_to(x, shape)
        case "neg":
            return -x
        case "repeat_interleave":
            return np.repeat(x, args[1], axis=args[2] if len(args) > 2 else None)
        case "select":
            return np.take(x, args[2], axis=args[1])
        case "slice":
            rest: list[Any] = [0, None, None, 1]
            axis, start, stop, step = [*args[1:], *rest[len(args) - 1 :]]
            cut = [slice(None)] * x.ndim
            cut[axis] = slice(start or 0, None if stop is None else min(stop, 1 << 62), step)
            return x[tuple(cut)]
    return x.reshape(shape)
