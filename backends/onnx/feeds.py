"""Inputs made up for a model that nobody described: shapes from symbols, values that its ops are likely to accept."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler.backends.onnx.nodes import low_bit
from qcompiler.dtypes import Array
from qcompiler.ir import Dim, Graph, Op, Value
from qcompiler.verify.op_kinds import LOOKUPS, MOVES

PAST = 1
"""How many tokens a key/value cache is given."""
IDS = 100
"""The largest made-up index is below this and below the smallest table that it looks into."""


INPUT_BYTES = 64 << 20
"""Bytes of inputs above which a model is not run."""


@dataclass(frozen=True)
class Plan:
    """A guess at what the symbols of the inputs stand for."""

    name: str
    size: Callable[[str, int, int], int]
    """(symbol, axis, how many symbols there are) -> size"""


def _by_name(m: int) -> Callable[[str, int, int], int]:
    def size(symbol: str, axis: int, symbols: int) -> int:
        word = symbol.lower()
        if "past" in word and "total" not in word:
            return PAST
        if "total" in word:
            return PAST + m
        if "batch" in word or word in ("b", "n"):
            return 1 if symbols > 1 else m
        if "seq" in word or "len" in word or "token" in word or word in ("m", "s", "t", "l"):
            return m
        return 1 if axis == 0 and symbols > 1 else m

    return size


def plans(m: int) -> tuple[Plan, ...]:
    """Guesses for a phase of ``m`` rows, the likeliest first."""
    return (
        Plan("by name", _by_name(m)),
        Plan("rows first", lambda symbol, axis, symbols: m if axis == 0 else 1),
        Plan("all of them m", lambda symbol, axis, symbols: m),
        Plan("all of them 1", lambda symbol, axis, symbols: 1),
    )


def made_up(graph: Graph, m: int, seed: int = 0) -> Iterator[dict[str, Array]]:
    """Candidate inputs for a phase of ``m`` rows; nothing when an input is too big or of a type not made up here."""
    inputs = [v for v in graph.inputs if v.payload is None]
    if any(unmakeable(v) for v in inputs):
        return
    seen: list[tuple[tuple[int, ...], ...]] = []
    for plan in plans(m):
        shapes = tuple(_shape(v, plan, _symbols(inputs)) for v in inputs)
        if shapes in seen or _bytes(inputs, shapes) > INPUT_BYTES:
            continue
        seen.append(shapes)
        yield values_of(inputs, shapes, seed)


def values_of(inputs: Sequence[Value], shapes: Sequence[tuple[int, ...]], seed: int = 0) -> dict[str, Array]:
    """Made-up values of these shapes by input name; the types are those that :func:`unmakeable` lets pass."""
    rng = np.random.default_rng(seed)
    return {v.name: _values(v, s, rng) for v, s in zip(inputs, shapes, strict=True)}


def shape_of(value: Value, size: Callable[[str, int], int]) -> tuple[int, ...]:
    """The shape of an input where ``size(symbol, axis)`` says what a symbol stands for; an axis without a name is
    called ``?axis``. Sums and products of symbols are computed."""
    return tuple(
        d if isinstance(d, int) else _evaluate(_key(d, axis), lambda s, a=axis: size(s, a))  # type: ignore[misc]
        for axis, d in enumerate(value.tensor.shape or ())
    )


def nbytes(feed: Mapping[str, Array]) -> int:
    """Bytes of one set of inputs."""
    return sum(a.nbytes for a in feed.values())


def _bytes(inputs: list[Value], shapes: tuple[tuple[int, ...], ...]) -> int:
    kinds = [v.tensor.dtype for v in inputs]
    return sum(math.prod(s) * (8 if k is None else max(1, k.bits // 8)) for k, s in zip(kinds, shapes, strict=True))


def unmakeable(value: Value) -> bool:
    """Whether the type of an input is one that no values are made up for."""
    element = value.tensor.dtype
    return (
        element is None
        or value.tensor.shape is None
        or element.kind == "complex"
        or element.packed
        or (element.is_float and element.name not in ("f16", "f32", "f64"))
    )


def _symbols(inputs: list[Value]) -> int:
    names = {_key(d, i) for v in inputs for i, d in enumerate(v.tensor.shape or ()) if not isinstance(d, int)}
    return len({n for n in names if not _expression(n)})


def _key(dim: Dim, axis: int) -> str:
    return dim if isinstance(dim, str) else f"?{axis}"


def _expression(name: str) -> bool:
    return any(c in name for c in "+-*/ ")


def _shape(value: Value, plan: Plan, symbols: int) -> tuple[int, ...]:
    return shape_of(value, lambda symbol, axis: plan.size(symbol, axis, symbols))


def _evaluate(text: str, size: Callable[[str], int]) -> int:
    """The size of a symbol, or of a sum, difference or product of symbols and numbers."""
    try:
        found = _node(ast.parse(text, mode="eval").body, size) if _expression(text) else size(text)
    except (SyntaxError, ValueError, ZeroDivisionError):
        found = size(text)
    return max(int(found), 0)


def _node(node: ast.expr, size: Callable[[str], int]) -> int:
    match node:
        case ast.Constant(value=int(v)):
            return v
        case ast.Name(id=name):
            return size(name)
        case ast.BinOp(left=a, op=ast.Add(), right=b):
            return _node(a, size) + _node(b, size)
        case ast.BinOp(left=a, op=ast.Sub(), right=b):
            return _node(a, size) - _node(b, size)
        case ast.BinOp(left=a, op=ast.Mult(), right=b):
            return _node(a, size) * _node(b, size)
        case ast.BinOp(left=a, op=ast.FloorDiv(), right=b):
            return _node(a, size) // _node(b, size)
    raise ValueError(f"cannot evaluate {ast.dump(node)}")


def _values(value: Value, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    element = value.tensor.dtype
    assert element is not None
    word = value.name.lower()
    if element.kind == "string":
        return np.full(shape, "a")
    if element.kind == "bool":
        return np.ones(shape, np.bool_)
    if element.is_float:
        if _is_scale(value):
            return rng.uniform(0.002, 0.02, shape).astype(element.storage)
        found = np.ones(shape) if "mask" in word else rng.standard_normal(shape)
        return found.astype(element.storage)
    if element.bits == 8:
        return rng.integers(element.qmin, element.qmax + 1, shape).astype(element.storage)
    if "mask" in word:
        return np.ones(shape, element.storage)
    if "position" in word and shape:
        return np.broadcast_to(np.arange(shape[-1], dtype=element.storage), shape).copy()
    return rng.integers(0, min(IDS, table_rows(value) or 2), shape).astype(element.storage)


def _is_scale(value: Value) -> bool:
    for op in value.users:
        node = low_bit(op)
        if (node is not None and node.scales is value) or (
            op.name.endswith("DequantizeLinear") and op.operand(1) is value
        ):
            return True
    return False


def table_rows(value: Value) -> int:
    """Rows of the smallest table that ``value`` looks into; 0 where it looks into none."""
    limit, work, seen = 0, [value], {value}
    while work:
        at = work.pop()
        for op in at.users:
            rows = _rows(op, at)
            limit = min(limit, rows) if limit and rows else limit or rows
            if op.name in MOVES and op.results and op.results[0] not in seen and op.operand(0) is at:
                seen.add(op.results[0])
                work.append(op.results[0])
    return limit


def _rows(op: Op, index: Value) -> int:
    lookup = op.name in LOOKUPS or op.name.endswith("GatherBlockQuantized")
    table = op.operand(0)
    if not lookup or table is None or op.operand(1) is not index or not table.tensor.shape:
        return 0
    axis = op.attrs.get("axis", op.attrs.get("gather_axis", 0))
    size = (
        table.tensor.shape[axis]
        if isinstance(axis, int) and -len(table.tensor.shape) <= axis < len(table.tensor.shape)
        else 0
    )
    return size if isinstance(size, int) else 0
