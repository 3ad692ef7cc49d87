"""Write quantize and dequantize as the standard ONNX ops, in the places where runtimes fuse them by themselves.

Weights stand as codes behind a DequantizeLinear: ``[K, N]`` before products, ``[O, I / group, ..]`` before
convolutions, and behind the lookup of rows of a table, so that only those rows are expanded. Activations stand between
a QuantizeLinear and a DequantizeLinear as earlier passes have placed them; ranges of each input come from a
DynamicQuantizeLinear. A bias is int32 in steps of x scale times w scale where ONNX Runtime's fusion asks for it: behind
a product of codes whose result stays float.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from qcompiler.conv_views import as_conv
from qcompiler.dtypes import F32, UINT8
from qcompiler.errors import InputError
from qcompiler.ir import Graph, Loc, Op, TensorType, Value
from qcompiler.movement import opset
from qcompiler.passes.fuse_integer import FuseInteger
from qcompiler.payload import constant
from qcompiler.pipeline import Context, Pass
from qcompiler.rewrite import Declined, erase_dead
from qcompiler.scheme import Scheme
from qcompiler.sites import Ledger
from qcompiler.standard_places import bias_place, look_up_codes, plain_bias, round_bias, stored_weight, turn_weight
from qcompiler.subgraph import duplicate

SINCE = {"int8": 10, "uint8": 10, "int4": 21, "uint4": 21, "int2": 25, "uint2": 25}
"""The opset in which QuantizeLinear and DequantizeLinear took each type of codes."""
BLOCKS, CHANNELS = 21, 13
"""The opsets in which they took scales in blocks, and one scale a channel."""
LINEARS = ("onnx.MatMul", "onnx.Gemm")


# -- what has a standard form --------------------------------------------------------------------------------


def needed_opset(scheme: Scheme) -> int | None:
    """The opset that can say ``scheme`` of a stored tensor or a static activation; None where none can."""
    since = SINCE.get(scheme.dtype.name)
    if since is None or scheme.zero == "float" or scheme.dynamic or scheme.granularity in ("token", "block"):
        return None
    return max(since, {"group": BLOCKS, "channel": CHANNELS}.get(scheme.granularity, 0))


def _check_form(op: Op) -> None:
    """Raise InputError where standard ONNX cannot say what ``op`` does."""
    scheme, have = op.attrs["scheme"], opset(op)
    if scheme.dynamic:
        if (scheme.dtype, scheme.granularity, scheme.zero) == (UINT8, "tensor", "int"):
            return
        raise InputError(
            f"'{op.label}' is quantized as <{scheme.text}>, and the only standard op that chooses parameters at run "
            "time, DynamicQuantizeLinear, gives 'uint8 tensor asym dynamic'; choose that, or leave emit.format=qdq out"
        )
    need = needed_opset(scheme)
    if need is None:
        raise InputError(
            f"'{op.label}' is quantized as <{scheme.text}>, which QuantizeLinear and DequantizeLinear cannot say: they "
            "take 2, 4 and 8-bit integers with integer zero points; choose such a scheme, or leave emit.format=qdq out"
        )
    if have < need:
        raise InputError(
            f"'{op.label}' is quantized as <{scheme.text}>, which needs opset {need}; the model has {have}"
        )


# -- lowering ------------------------------------------------------------------------------------------------


def _zero(op: Op, scheme: Scheme, *, stated: bool) -> Value | None:
    """The zero point of ``op``; where the scheme has none, zeros where they have to be ``stated``."""
    have = op.operand(2)
    if have is not None or not stated:
        return have
    scale = op.operands[1]
    shape = None if scale is None else scale.tensor.static_shape
    zeros = constant(np.zeros(shape or (), scheme.dtype.storage), scheme.dtype)
    return op.graph.add_const(op.graph.fresh(f"{op.result.name}_zero"), zeros)


def _attributes(scheme: Scheme) -> dict[str, Any]:
    if scheme.granularity == "tensor":
        return {}
    block = {"block_size": scheme.group[0]} if scheme.granularity == "group" else {}
    return {"axis": int(scheme.axis or 0), **block}


def _write(op: Op) -> None:
    """q.quantize(x, s, z)  ->  QuantizeLinear(x, s, z);  q.dequantize(c, s, z)  ->  DequantizeLinear(c, s, z)"""
    scheme: Scheme = op.attrs["scheme"]
    quantize = op.name == "q.quantize"
    # QuantizeLinear takes its type from the zero point, and QGemm is fused only where there are zero points.
    stated = quantize or (scheme.bits == 8 and scheme.granularity != "group")
    zero = _zero(op, scheme, stated=stated)
    op.set_operands([v for v in (op.operand(0), op.operand(1), zero) if v is not None])
    op.name = "onnx.QuantizeLinear" if quantize else "onnx.DequantizeLinear"
    op.loc = Loc("", op.loc.scope, op.loc.source)  # the site's name goes to the product
    op.attrs = _attributes(scheme)


def _write_dynamic(op: Op) -> None:
    """q.choose_qparams(x) and the q.quantize of x by it  ->  DynamicQuantizeLinear(x)"""
    x, home = op.operands[0], op.graph
    assert x is not None
    readers = [u for u in x.users if u.name == "q.quantize" and u.operands[1:] == tuple(op.results)]
    codes_type = TensorType(UINT8, x.tensor.shape)
    types = [codes_type, TensorType(F32, ()), TensorType(UINT8, ())]
    names = [home.fresh(f"{x.name}_{word}") for word in ("dynamic", "dynamic_scale", "dynamic_zero")]
    made = home.create("onnx.DynamicQuantizeLinear", [x], {}, list(zip(names, types, strict=True)), before=op)
    made.loc = Loc(f"{x.name}.quantize", op.loc.scope, op.loc.source)
    old: list[tuple[Value, Value]] = [*zip(op.results, made.results[1:], strict=True)]
    for reader in readers:
        reader.result.replace_uses(made.results[0])
        old.append((reader.result, made.results[0]))
        reader.erase()
    for before, after in old[:2]:
        before.replace_uses(after)
    op.erase()
    for before, after in old[:3]:  # the new values take the names of the old ones
        home.rename(after, before.name)


@dataclass(frozen=True)
class LowerQdq(Pass):
    """Write every quantize, dequantize and rescale as standard ONNX ops; what has no such form is refused."""

    name: ClassVar[str] = "lower-qdq"
    kind: ClassVar[Literal["exact", "lossy", "layout"]] = "layout"

    def run(self, graph: Graph, ctx: Context) -> None:
        for op in graph.walk():
            if op.name in ("q.quantize", "q.dequantize", "q.choose_qparams"):
                _check_form(op)
            elif op.name.startswith("q.") and op.name != "q.scale":
                raise InputError(f"{op.name} '{op.label}' has no standard form; run lower-qdq before passes that fuse")
        _name_islands(graph, ctx)
        for op in list(graph.walk()):
            if op.erased:
                continue
            turn_weight(op)
            if (rows := look_up_codes(op)) is not None:
                _settle_table(op, rows, ctx.ledger)
        for op in graph.walk():
            if op.name in LINEARS:
                plain_bias(op)
                round_bias(op)
            _settle(op, ctx.ledger)
        for op in list(graph.walk()):
            if op.name == "q.choose_qparams":
                _write_dynamic(op)
        for op in graph.walk():
            if op.name in ("q.quantize", "q.dequantize"):
                _write(op)
            elif op.name == "q.scale":
                op.name = "onnx.Mul"


FORETOLD = "foretold"
"""Key in the ``stats`` of a site: the labels of its product and of what the runtime joins with it. It is fused only if
the runtime is seen, or foretold, to make a kernel's node of one of them."""


def _name_islands(graph: Graph, ctx: Context) -> None:
    """Record the ops that compute in float between codes because the target has no integer kernel for them: those that
    fusing would leave."""
    if ctx.target is None:
        return
    trial = Context(ctx.target, ctx.phases)
    FuseInteger().run(duplicate(graph), trial)
    for site in trial.ledger:
        if site.op == "float":
            ctx.ledger.add(site)


def _sizes(dq: Op) -> dict[str, int]:
    parts = zip(("codes", "scales", "zeros"), (dq.operand(i) for i in range(3)), strict=True)
    return {name: v.payload.nbytes for name, v in parts if v is not None and v.payload is not None}


def _settle(op: Op, ledger: Ledger) -> None:
    """Call a product of dequantized weights like its site, and leave the verdict on it to the runtime."""
    site = str(op.meta.get("site", ""))
    if site not in ledger or ledger[site].status != "pending":
        return
    dq = next((d for d in map(stored_weight, op.operands) if d is not None), None)
    if dq is None and op.name.startswith("onnx."):
        try:
            dq = stored_weight(as_conv(op).weight)
        except Declined:
            return
    if dq is None:
        return
    op.loc = Loc(site, op.loc.scope, op.loc.source)
    place = bias_place(op) if op.name in LINEARS else None
    ledger[site].status, ledger[site].bytes = "fused", _sizes(dq)
    ledger[site].stats[FORETOLD] = (op.label,) if place is None else (op.label, place[0].label)


def _settle_table(op: Op, rows: Value, ledger: Ledger) -> None:
    """Put the looked-up rows in the place of the Gather's result; nothing of the table is expanded but them."""
    site, table = str(op.meta.get("site", "")), op.operands[0]
    dq = stored_weight(table)
    if site in ledger and dq is not None:
        ledger[site].status, ledger[site].bytes = "fused", _sizes(dq)
    old = op.result
    old.replace_uses(rows)
    erase_dead(op)
    old.graph.rename(rows, old.name)
