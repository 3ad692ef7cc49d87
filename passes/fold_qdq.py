"""Fold redundant quantize/dequantize pairs, where doing so is exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.ir import Graph, Op, Value
from qcompiler.payload import ArrayPayload
from qcompiler.pipeline import Context, Pass
from qcompiler.rewrite import Rewriter, apply_rules, rule


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


@rule("q.quantize")
def fold_requantize(op: Op, rw: Rewriter) -> Value:
    """q.quantize(q.dequantize(c, s, z), s, z)  ->  c"""
    dq = rw.expect(op.operand(0), "q.dequantize")
    codes = dq.operand(0)
    if codes is None or not same_parameters(op, dq):
        raise rw.declined(f"'{op.label}' requantizes with other parameters, which is not exact")
    if op.result.is_output:
        raise rw.declined(f"'{op.label}' is an output of the graph, which keeps its name")
    return codes


@rule("q.dequantize")
def share_dequantize(op: Op, rw: Rewriter) -> Value:
    """two q.dequantize of one c with one s, z  ->  the first of them"""
    codes = op.operand(0)
    for other in [] if codes is None else codes.users:
        if other is op:
            break
        if other.name == op.name and other.graph is op.graph and same_parameters(op, other):
            if other.attrs.get("site") == op.attrs.get("site"):
                return other.result
    raise rw.declined("no earlier dequantize of the same codes", quiet=True)


@dataclass(frozen=True)
class FoldQdq(Pass):
    """Fold a quantize of what was just dequantized alike, and equal dequantizes of one tensor."""

    name: ClassVar[str] = "fold-qdq"

    def run(self, graph: Graph, ctx: Context) -> None:
        apply_rules(graph, [fold_requantize, share_dequantize], log=ctx.refusals)
