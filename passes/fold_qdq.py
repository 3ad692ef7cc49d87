"""Fold redundant quantize/dequantize pairs, where doing so is exact."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir import Graph, Op, Value
from qcompiler.pairs import same_parameters
from qcompiler.payload import ArrayPayload
from qcompiler.pipeline import Context, Pass
from qcompiler.rewrite import Rewriter, apply_rules, erase_dead, rule


@rule("q.quantize")
def fold_requantize(op: Op, rw: Rewriter) -> Value:
    """q.quantize(q.dequantize(c, s, z), s, z)  ->  c"""
    dq = rw.expect(op.operand(0), "q.dequantize")
    codes = dq.operand(0)
    if codes is None or not same_parameters(op, dq):
        raise rw.declined(f"'{op.label}' requantizes with other parameters, which is not exact")
    if op.result.is_output:
        maker = codes.owner
        if maker is None or codes.is_output or codes.graph is not op.graph or not maker.name.startswith("q."):
            raise rw.declined(f"'{op.label}' is an output of the graph, which keeps its name")
        rw.made.append(maker)  # what is made here takes the name of the output
    elif codes.owner is not None and "y_scheme" in codes.owner.attrs and not codes.is_output:
        rw.made.append(codes.owner)  # the kernel that gives the codes now: they keep the name that they had
    return codes


def _identity(value: Value | None) -> Hashable:
    """Equal for one value, and for constants of one type whose equal bytes are at hand."""
    if value is None or not value.is_const or value.payload is None:
        return value
    if isinstance(value.payload, ArrayPayload):
        return value.type, value.payload.array().tobytes()
    return value.payload


def share_equal(graph: Graph) -> int:
    """Of two equal quantizes of one value, or dequantizes of one tensor of codes at one site, keep the first.

    ``q.quantize(x, s, z), q.quantize(x, s, z)  ->  the first of them``; returns how many went.
    """
    gone = 0
    for g in graph.graphs():
        first: dict[Hashable, Op] = {}
        for op in g:
            if op.name not in ("q.quantize", "q.dequantize") or op.result.is_output:
                continue
            parameters = tuple(_identity(v) for v in (op.operand(1), op.operand(2)))
            key = (op.name, op.operand(0), parameters, op.attrs.get("scheme"), op.attrs.get("site"))
            kept = first.setdefault(key, op)
            if kept is not op and kept.attrs.get("sites") == op.attrs.get("sites"):
                op.result.replace_uses(kept.result)
                erase_dead(op)
                gone += 1
    return gone


@dataclass(frozen=True)
class FoldQdq(Pass):
    """Fold a quantize of what was just dequantized alike, and equal quantizes and dequantizes of one tensor."""

    name: ClassVar[str] = "fold-qdq"

    def run(self, graph: Graph, ctx: Context) -> None:
        apply_rules(graph, [fold_requantize], log=ctx.refusals)
        while share_equal(graph) and apply_rules(graph, [fold_requantize]):
            pass
