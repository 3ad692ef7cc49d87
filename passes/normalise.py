"""Take away what hides a pattern and computes nothing: identities and pairs of opposite transposes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir import Graph, Op, Value
from qcompiler.pipeline import Context, Pass
from qcompiler.rewrite import Rewriter, apply_rules, rule


@rule("onnx.Identity", "aten.alias.default", "aten.detach.default")
def drop_identity(op: Op, rw: Rewriter) -> Value:
    """identity(x)  ->  x"""
    x = op.operand(0)
    if x is None or op.result.is_output or x.graph is not op.graph:
        raise rw.declined("an output keeps its name, and a value of an enclosing graph its copy", quiet=True)
    return x


@rule("onnx.Transpose")
def drop_double_transpose(op: Op, rw: Rewriter) -> Value:
    """transpose(transpose(x, p), q)  ->  x   where q undoes p"""
    inner = rw.expect(op.operand(0), "onnx.Transpose")
    x = inner.operand(0)
    outer_perm, inner_perm = op.attrs.get("perm"), inner.attrs.get("perm")
    if x is None or outer_perm is None or inner_perm is None or op.result.is_output:
        raise rw.declined("the permutations are not written out", quiet=True)
    if x.graph is not op.graph or any(inner_perm[i] != n for n, i in enumerate(outer_perm)):
        raise rw.declined("the transposes do not cancel", quiet=True)
    return x


@dataclass(frozen=True)
class Normalise(Pass):
    """Drop identities and cancelling transposes."""

    name: ClassVar[str] = "normalise"

    def run(self, graph: Graph, ctx: Context) -> None:
        apply_rules(graph, [drop_identity, drop_double_transpose], log=ctx.refusals)
