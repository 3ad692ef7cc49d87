"""Take away what hides a pattern and computes nothing: identities, transposes of transposes, reshapes of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from qcompiler.dtypes import Array
from qcompiler.functional import drop_checks, make_functional, share_views
from qcompiler.ir import Graph, Hole, Op, Value
from qcompiler.payload import Payload, computed
from qcompiler.pipeline import Context, Pass
from qcompiler.rewrite import Rewriter, apply_rules, rule
from qcompiler.shape_values import size_of, sizes
from qcompiler.spec import is_float_const
from qcompiler.views import call_args, through_transposes


@rule("onnx.Identity", "aten.alias.default", "aten.detach.default", "aten.dropout.default")
def drop_identity(op: Op, rw: Rewriter) -> Value:
    """identity(x)  ->  x   and dropout(x) outside of training"""
    x = op.operand(0)
    if op.name == "aten.dropout.default" and call_args(op)[2:3] != [False]:
        raise rw.declined(f"'{op.label}' drops elements: the model is in training mode", quiet=True)
    if x is None or op.result.is_output or x.graph is not op.graph:
        raise rw.declined("an output keeps its name, and a value of an enclosing graph its copy", quiet=True)
    return x


@rule("aten.max_pool2d_with_indices.default")
def drop_indices(op: Op, rw: Rewriter) -> Sequence[Value]:
    """max_pool2d_with_indices(x), whose indices nothing reads  ->  max_pool2d(x)"""
    if len(op.results) != 2 or op.results[1].uses:
        raise rw.declined("its indices are read", quiet=True)
    attrs = {k: v for k, v in op.attrs.items() if k != "unpack"}
    return rw.op("aten.max_pool2d.default", *op.operands, type=op.results[0].type, **attrs), op.results[1]


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


@rule("onnx.Transpose")
def join_transposes(op: Op, rw: Rewriter) -> Value:
    """transpose(transpose(x, p), q)  ->  transpose(x, p q)   where nothing else reads the inner one"""
    inner = rw.expect(op.operand(0), "onnx.Transpose")
    outer_perm, inner_perm = op.attrs.get("perm"), inner.attrs.get("perm")
    if outer_perm is None or inner_perm is None or not _read_once(inner.result) or inner.graph is not op.graph:
        raise rw.declined("the inner one stays, or the permutations are not written out", quiet=True)
    return rw.op("onnx.Transpose", inner.operand(0), type=op.result.type, perm=tuple(inner_perm[i] for i in outer_perm))


@rule("onnx.Reshape")
def fold_matrix_transpose(op: Op, rw: Rewriter) -> Value:
    """reshape(transpose(reshape(x, [-1, m, n]), 0 2 1), [.., n, m])  ->  transpose(x)   of its last two axes, m and n

    That is how torch's exporter writes the transposed keys of an attention.
    """
    middle = rw.expect(op.operand(0), "onnx.Transpose")
    flat = rw.expect(middle.operand(0), "onnx.Reshape")
    x = flat.operand(0)
    rank = 0 if x is None else x.tensor.rank or 0
    if x is None or rank < 3 or tuple(middle.attrs.get("perm", ())) != (0, 2, 1):
        raise rw.declined("it is no transpose of matrices", quiet=True)
    if (
        not (_read_once(flat.result) and _read_once(middle.result))
        or not x.graph is flat.graph is middle.graph is rw.graph
    ):
        raise rw.declined("what lies between stays", quiet=True)
    perm = (*range(rank - 2), rank - 1, rank - 2)
    before, after = sizes(flat.operand(1)), sizes(op.operand(1))
    want = [size_of(x, axis) for axis in perm]
    if before is None or after is None or 0 in want or len(before) != 3 or len(after) != rank:
        raise rw.declined("its shapes are not known", quiet=True)
    if list(before[1:]) != [want[-1], want[-2]] or any(n not in (w, -1) for n, w in zip(after, want, strict=True)):
        raise rw.declined("it moves more than the last two axes", quiet=True)
    return rw.op("onnx.Transpose", x, type=op.result.type, perm=perm)


def _read_once(value: Value) -> bool:
    return len(value.uses) == 1 and not value.is_output


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


@rule("aten.bmm.default")
def drop_batches(op: Op, rw: Rewriter) -> Value:
    """bmm(x, expand(w))  ->  matmul(x, w)   for a constant matrix, which torch repeats for inputs with strides"""
    x, value = op.operand(0), op.operand(1)
    while value is not None and value.tensor.rank == 3 and value.owner is not None and value.owner.name in _REPEATS:
        source, sizes_of = value.owner.operand(0), value.tensor.shape or ()
        if source is None or (source.tensor.shape or ())[-2:] != sizes_of[-2:]:
            break
        value = source
    if x is None or value is None or value.tensor.rank != 2 or not is_float_const(through_transposes(value)[0]):
        raise rw.declined("it multiplies no repeated matrix", quiet=True)
    return rw.op("aten.matmul.default", x, value, type=op.result.type, args=(Hole(0), Hole(1)))


_REPEATS = frozenset(f"aten.{n}.default" for n in ("expand", "view", "_unsafe_view", "reshape", "unsqueeze", "clone"))

RULES = (
    drop_identity,
    drop_batches,
    drop_indices,
    drop_double_transpose,
    join_transposes,
    fold_matrix_transpose,
    fold_weight_movement,
)


@dataclass(frozen=True)
class Normalise(Pass):
    """Drop identities and cancelling transposes, join others; give reshaped weights their final shape and type.

    Of aten graphs also: writes in place become functional, equal views one, and checks of known types go.
    """

    name: ClassVar[str] = "normalise"

    def run(self, graph: Graph, ctx: Context) -> None:
        if graph.dialect == "aten":
            make_functional(graph)
            drop_checks(graph)
        apply_rules(graph, RULES, log=ctx.refusals)
        if graph.dialect == "aten":
            share_views(graph)
