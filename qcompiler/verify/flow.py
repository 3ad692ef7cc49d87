"""Where values come from and which ops compute with them, data movement looked through, regions included."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import networkx as nx

from qcompiler.ir import Graph, Op, Value
from qcompiler.verify.op_kinds import LOOKUPS, MOVES, joins

STEPS = 32
"""How far back a value is followed to see whether it is constant."""


@dataclass(frozen=True)
class Reached:
    """An op that computes with a value: in operand ``slot``, after the data movement of ``path``."""

    op: Op
    slot: int
    path: tuple[Op, ...]


def movement(graph: Graph, dropped: AbstractSet[Op] = frozenset()) -> nx.DiGraph:
    """Value -> value edges through data movement, regions that are given operands, and ``dropped`` ops; each edge has
    its op."""
    out = nx.DiGraph()
    for op in graph.walk():
        for source, inner in _entered(op):
            out.add_edge(source, inner, op=op)
        if op.name not in MOVES and op not in dropped:
            continue
        for value in op.operands if joins(op) else op.operands[:1]:
            for result in op.results:
                if value is not None:
                    out.add_edge(value, result, op=op)
    return out


def _entered(op: Op) -> Iterator[tuple[Value, Value]]:
    """Operand and region input, for each pair that is one value: torch's regions see only what they are given, and
    their inputs are the last operands of the op."""
    for region in op.regions.values():
        inner = region.inputs
        for source, value in zip(op.operands[len(op.operands) - len(inner) :], inner, strict=False):
            if source is not None and len(op.operands) >= len(inner) and source.type == value.type:
                yield source, value


def given_by(value: Value) -> Value | None:
    """What the op around a region passes for its input ``value``; None for another value."""
    op = value.graph.parent if value.owner is None and value.is_input else None
    return None if op is None else next((source for source, inner in _entered(op) if inner is value), None)


def reached(value: Value, moves: nx.DiGraph) -> list[Reached]:
    """The ops that compute with ``value``, directly or after data movement, in breadth-first order.

    An op without results only checks something and computes nothing.
    """
    paths: dict[Value, tuple[Op, ...]] = {value: ()}
    if value in moves:
        for a, b in nx.bfs_edges(moves, value):
            paths[b] = (*paths[a], moves.edges[a, b]["op"])
    out = []
    for at, path in paths.items():
        movers = {moves.edges[at, b]["op"] for b in moves[at]} if at in moves else set()
        for use in at.uses:
            if isinstance(use.user, Op) and use.user.results and use.user not in movers:
                out.append(Reached(use.user, use.slot, path))
    return out


def source_of(value: Value) -> tuple[Value, bool]:
    """Where ``value`` comes from before data movement, and whether a lookup by run-time indices is on the way.

    A lookup by constant indices moves data, but for torch's embedding, which is of a table whatever its indices are.
    """
    looked_up = False
    while True:
        outside = given_by(value)
        op = value.owner
        if outside is not None:
            value = outside
        elif op is not None and op.name in MOVES and op.operands and op.operands[0] is not None:
            index = op.operand(1)
            table = op.name == "aten.embedding.default"
            looked_up |= op.name in LOOKUPS and (table or index is None or not is_constant(index))
            value = op.operands[0]
        else:
            return value, looked_up


def is_constant(value: Value) -> bool:
    """A constant, or computed from constants alone (a few steps)."""
    work, seen = [value], 0
    while work:
        seen += 1
        v = work.pop()
        if v.is_const:
            continue
        outside = given_by(v)
        if outside is not None:
            work.append(outside)
            continue
        if v.owner is None or seen > STEPS:
            return False
        work.extend(o for o in v.owner.operands if o is not None)
    return True


def count(value: Value) -> int:
    """Elements of a value of static shape, else 0."""
    shape = value.tensor.static_shape
    return 0 if shape is None else math.prod(shape)


def describe(value: Value) -> str:
    """``int4[4096, 4096]``, the class of tensors that it is a part of, and the bytes that it takes as f32."""
    t, cls = value.tensor, value.meta.get("class")
    shape = "[" + ", ".join("?" if d is None else str(d) for d in t.shape or ()) + "]"
    size = count(value) * 4
    inside = f" of a {cls}" if cls else ""
    return f"{t.dtype or 'codes'}{shape}{inside}" + (f", {size} bytes as f32" if size else "")
