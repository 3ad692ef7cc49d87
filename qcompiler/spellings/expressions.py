"""Expressions of constants alone, as recorded computations: what an exporter left for the runtime to fold.

Scales that are cast from another type, codes that are unpacked by masks and shifts, weights that are transposed: each
is a few host ops on constants. :func:`settle` gives the constant that they amount to. Integers are computed in the type
that the graph states, floats in theirs, as the ONNX operators of the same names define it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler.dtypes import Array, DType
from qcompiler.ir import Op, Value
from qcompiler.payload import Payload, computed, constant
from qcompiler.rewrite import Rewriter
from qcompiler.spellings.aten_values import is_known, run_aten

STEPS = 24
"""Ops of one expression that are followed."""
SMALL = 1 << 16
"""Results of at most so many elements are computed at once."""


def _shift(a: Array, b: Array, attrs: Mapping[str, Any]) -> Array:
    return np.asarray(a << b if attrs.get("direction") == "LEFT" else a >> b)


def _divide(a: Array, b: Array, attrs: Mapping[str, Any]) -> Array:
    if a.dtype.kind == "f":
        return np.asarray(a / b)
    quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return np.asarray(quotient * np.sign(a.astype(np.int64)) * np.sign(b.astype(np.int64)))


_BINARY: dict[str, Callable[[Array, Array, Mapping[str, Any]], Array]] = {
    "onnx.Add": lambda a, b, _: a + b,
    "onnx.Sub": lambda a, b, _: a - b,
    "onnx.Mul": lambda a, b, _: a * b,
    "onnx.Div": _divide,
    "onnx.BitwiseAnd": lambda a, b, _: a & b,
    "onnx.BitwiseOr": lambda a, b, _: a | b,
    "onnx.BitwiseXor": lambda a, b, _: a ^ b,
    "onnx.BitShift": _shift,
    "onnx.Mod": lambda a, b, attrs: np.fmod(a, b) if attrs.get("fmod", 0) else np.mod(a, b),
}
_MOVED = frozenset({"onnx.Reshape", "onnx.Squeeze", "onnx.Unsqueeze", "onnx.Flatten", "onnx.Identity", "onnx.Cast"})
FOLDABLE = frozenset(_BINARY) | _MOVED | {"onnx.Transpose", "onnx.Concat", "onnx.Neg", "onnx.Expand"}
"""Ops that :func:`expression` knows."""


def _run(op: Op, arrays: Sequence[Array], shape: tuple[int, ...], element: DType) -> Array:
    if op.name.startswith(("aten.", "prims.", "quantized_decomposed.")):
        return run_aten(op, arrays, shape, element)
    first = arrays[0]
    if op.name in _BINARY:
        with np.errstate(over="ignore"):
            out = _BINARY[op.name](first, arrays[1], op.attrs)
    elif op.name == "onnx.Transpose":
        out = first.transpose(op.attrs.get("perm") or tuple(range(first.ndim))[::-1])
    elif op.name == "onnx.Concat":
        out = np.concatenate(arrays, axis=op.attrs["axis"])
    elif op.name == "onnx.Neg":
        out = -first
    elif op.name == "onnx.Expand":
        out = np.broadcast_to(first, shape)
    else:
        out = first.reshape(shape)
    return np.ascontiguousarray(out.astype(element.storage, copy=False)).reshape(shape)


def expression(value: Value, steps: int = STEPS) -> Payload | None:
    """``value`` as a payload, where constants alone make it; None elsewhere. Nothing big is read."""
    if value.is_const:
        return value.payload
    op, shape, element = value.owner, value.tensor.static_shape, value.tensor.dtype
    aten = op is not None and is_known(op)
    if op is None or not (aten or op.name in FOLDABLE) or shape is None or element is None or steps < 1:
        return None
    every = aten or op.name in _BINARY or op.name == "onnx.Concat"
    operands = list(op.operands) if every else list(op.operands[:1])
    inputs = [None if v is None else expression(v, steps - 1) for v in operands]
    if not inputs or any(p is None for p in inputs):
        return None
    sources = [p for p in inputs if p is not None]
    if max(p.size for p in sources) <= SMALL:
        return constant(_run(op, [p.array() for p in sources], shape, element), element)

    def run(*payloads: Payload) -> Array:
        return _run(op, [p.array() for p in payloads], shape, element)

    return computed(op.name.rpartition(".")[2].lower(), run, sources, element, shape)


def settle(rw: Rewriter, value: Value) -> Value:
    """``value``, or the constant that a few ops on constants amount to."""
    if value.is_const or value.owner is None:
        return value
    payload = expression(value)
    if payload is None:
        return value
    name = f"{value.name}.folded"
    known = rw.graph.local(name)
    if known is not None and known.is_const:
        return known
    return rw.const(name, payload)
