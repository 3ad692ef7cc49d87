"""Fuse the dequantize of a weight into the linear layer that reads it, where the target has a kernel for the pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.canonical import canonical_operands
from qcompiler.dtypes import F32, Array
from qcompiler.ir import Graph, Op, Value
from qcompiler.pairs import is_activation
from qcompiler.payload import Payload, computed
from qcompiler.pipeline import Context, Pass
from qcompiler.rewrite import Rewriter, apply_rules, rule
from qcompiler.scheme import Scheme
from qcompiler.spec import is_float_const
from qcompiler.target import Request
from qcompiler.views import LINEAR_OPS, as_linear, is_row


def request(op: str, scheme: Scheme, n: int, k: int, x: Value, *, bias: bool) -> Request:
    """What the target is asked; an activation of unknown dtype is taken for f32."""
    return Request(op, scheme, n, k, x.tensor.dtype or F32, bias)


def row(bias: Value, n: int, rw: Rewriter) -> Value:
    """``bias`` as ``[n]``: itself, or a constant of its values broadcast, not read now."""
    if bias.tensor.static_shape == (n,):
        return bias
    assert bias.payload is not None

    def spread(p: Payload) -> Array:
        return np.ascontiguousarray(np.broadcast_to(p.array().reshape(-1), (n,)))

    return rw.const(f"{bias.name}_row", computed("row", spread, [bias.payload], bias.payload.dtype, (n,)), bias.graph)


@rule(*sorted(LINEAR_OPS))
def fuse_dequant_into_linear(op: Op, rw: Rewriter) -> Value:
    """linear(x, q.dequantize(c, s, z), b)  ->  q.linear(x, c, s, z, b)"""
    lin = rw.view(as_linear)
    dq = rw.expect(lin.weight, "q.dequantize")
    site = op.meta.get("site", op.label)
    scheme, codes, scale, zero = canonical_operands(dq, rw, n_axis=1 - lin.axis)
    if rw.target is not None:
        asked = request("q.linear", scheme, lin.n, lin.k, lin.x, bias=lin.bias is not None)
        rw.require(*rw.target.why_not(asked, rw.phases))
    bias = None if lin.bias is None else row(lin.bias, lin.n, rw)
    out = rw.op("q.linear", lin.x, codes, scale, zero, bias, type=lin.result.type, scheme=scheme, site=site)
    assert out.owner is not None
    rw.revisit(out.owner)
    return out


@rule("onnx.Add", "aten.add.Tensor")
def fuse_bias(op: Op, rw: Rewriter) -> Value:
    """add(q.linear(x, c, s, z), b)  ->  q.linear(x, c, s, z, b)   for a constant b that broadcasts to [N]"""
    for product, bias in ((op.operand(0), op.operand(1)), (op.operand(1), op.operand(0))):
        lin = None if product is None else product.owner
        if lin is None or bias is None or product is None or lin.name != "q.linear" or not is_float_const(bias):
            continue
        n = lin.operands[1].tensor.static_shape[0]  # type: ignore[index,union-attr]
        wider = (bias.tensor.rank or 0) > (product.tensor.rank or 1)
        if lin.operand(4) is not None or not is_row(bias, n) or wider or len(product.uses) != 1:
            continue
        if op.name.startswith("aten.") and dict(op.attrs.get("kwargs", ())).get("alpha", 1) != 1:
            raise rw.declined(f"'{op.label}' scales what it adds", quiet=True)
        scheme, x = lin.attrs["scheme"], lin.operands[0]
        k = lin.operands[1].tensor.static_shape[1]  # type: ignore[index,union-attr]
        if rw.target is not None:
            rw.require(*rw.target.why_not(request("q.linear", scheme, n, k, x, bias=True), rw.phases))  # type: ignore[arg-type]
        operands = [*lin.operands, None, None][:4]
        added = row(bias, n, rw)
        return rw.op("q.linear", *operands, added, type=op.result.type, scheme=scheme, site=lin.attrs["site"])
    raise rw.declined("no bias of a fused linear layer", quiet=True)


def note_weight_only(graph: Graph, ctx: Context) -> None:
    """A weight-only linear behind an integer kernel reads what was dequantized for it: its site says so."""
    for op in graph.walk():
        x, site = op.operand(0), str(op.attrs.get("site", ""))
        if op.name == "q.linear" and x is not None and x.owner is not None and site in ctx.ledger:
            if x.owner.name == "q.dequantize" and is_activation(x.owner):
                ctx.ledger[site].reason = "its activation is dequantized before it: only its weight is quantized here"


@dataclass(frozen=True)
class FuseLinear(Pass):
    """Fuse dequantized weights, then biases, into ``q.linear`` by the target's kernel rows."""

    name: ClassVar[str] = "fuse-linear"

    def run(self, graph: Graph, ctx: Context) -> None:
        rules = [fuse_dequant_into_linear, fuse_bias]
        apply_rules(graph, rules, target=ctx.target, phases=ctx.phases, log=ctx.refusals)
        note_weight_only(graph, ctx)
