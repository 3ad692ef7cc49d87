"""Take away what hides a pattern and computes nothing: identities, opposite transposes, reshapes of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.dtypes import Array
from qcompiler.ir import Graph, Op, Value
from qcompiler.payload import Payload, computed
from qcompiler.pipeline import Context, Pass
from qcompiler.rewrite import Rewriter, apply_rules, rule
from qcompiler.spec import is_float_const


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


@rule("onnx.Reshape", "onnx.Squeeze", "onnx.Unsqueeze", "onnx.Flatten", "onnx.Cast")
def fold_weight_movement(op: Op, rw: Rewriter) -> Value:
    """reshape(const)  ->  const of that shape; cast(const)  ->  const of that type   for float matrices and more"""
    weight, result = op.operand(0), op.result
    if weight is None or not is_float_const(weight) or (weight.tensor.rank or 0) < 2 or result.is_output:
        raise rw.declined("it moves no weight", quiet=True)
    shape, element = result.tensor.static_shape, result.tensor.dtype
    if shape is None or element is None or not element.is_float or weight.payload is None:
        raise rw.declined(f"'{op.label}' gives the weight {weight!r} a shape that is known only at run time")

    def moved(p: Payload) -> Array:
        return p.array().reshape(shape).astype(element.storage, copy=False)

    label = f"{op.name.removeprefix('onnx.').lower()}[{', '.join(map(str, shape))}]"
    made = rw.const(weight.name, computed(label, moved, [weight.payload], element, shape), weight.graph)
    made.meta["origin"] = weight.meta.get("origin", weight.name)
    return made


@dataclass(frozen=True)
class Normalise(Pass):
    """Drop identities and cancelling transposes; give reshaped and cast weights their final shape and type."""

    name: ClassVar[str] = "normalise"

    def run(self, graph: Graph, ctx: Context) -> None:
        apply_rules(graph, [drop_identity, drop_double_transpose, fold_weight_movement], log=ctx.refusals)
