"""Where standard ONNX holds quantized weights, tables and biases so that runtimes fuse them: see ``lower-qdq``.

Each function takes an op whose operands come from ``q.dequantize`` and moves constants; nothing is read.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qcompiler.dtypes import F32, INT32, Array
from qcompiler.errors import InputError
from qcompiler.ir import Loc, Op, TensorType, Value
from qcompiler.payload import ComputedPayload, Payload, computed
from qcompiler.rewrite import Declined, erase_dead
from qcompiler.scheme import Scheme
from qcompiler.spec import is_float_const
from qcompiler.views import as_embedding, as_linear, is_row
from qcompiler.weights import transposed

LARGEST = (1 << 31) - 1


# -- weights -------------------------------------------------------------------------------------------------


def _flipped(payload: Payload) -> Payload:
    """The transpose of a matrix, not read now."""
    if isinstance(payload, ComputedPayload) and (other := transposed(payload)) is not None:
        return other
    return computed("transpose", lambda p: p.array().T, [payload], payload.dtype, payload.shape[::-1])


def stored_weight(value: Value | None) -> Op | None:
    """The dequantize of constants that makes ``value``."""
    op = None if value is None else value.owner
    if op is None or op.name != "q.dequantize":
        return None
    return op if all(v is None or (v.is_const and v.payload is not None) for v in op.operands) else None


def _const(near: Value, hint: str, payload: Payload) -> Value:
    return near.graph.add_const(near.graph.fresh(hint), payload)


def _dequantize(before: Op, dq: Op, operands: list[Value | None], scheme: Scheme, type: TensorType, hint: str) -> Value:
    while operands[-1] is None:
        operands.pop()
    attrs = {"scheme": scheme}
    name = before.graph.fresh(hint)
    return before.graph.create("q.dequantize", operands, attrs, [(name, type)], loc=dq.loc, before=before).result


def turn_weight(op: Op) -> None:
    """linear(x, q.dequantize(c[N, K], s, z)^T)  ->  linear(x, q.dequantize(c[K, N], s, z))"""
    try:
        lin = as_linear(op)
    except Declined:
        return
    dq = stored_weight(lin.weight)
    if dq is None or (not lin.transposed and op.operand(1) is dq.result):
        return
    scheme: Scheme = dq.attrs["scheme"]
    parts: list[Value | None] = []
    for value in (dq.operand(0), dq.operand(1), dq.operand(2)):
        flip = lin.transposed and value is not None and value.tensor.rank == 2
        payload = None if value is None else value.payload
        if value is None or payload is None or not flip:
            parts.append(value)
            continue
        name = f"{value.name}_kn"
        known = value.graph.local(name)
        parts.append(known if known is not None and known.is_const else _const(value, name, _flipped(payload)))
    if lin.transposed and scheme.axis is not None:
        scheme = scheme.with_axis(1 - scheme.axis % 2)
    type = TensorType(dq.result.tensor.dtype, (lin.k, lin.n))
    made = _dequantize(op, dq, parts, scheme, type, f"{dq.result.name}_kn")
    old = op.operand(1)
    op.set_operand(1, made)
    if "transB" in op.attrs:
        op.attrs["transB"] = 0
    if old is not None and old.owner is not None:
        erase_dead(old.owner)


def look_up_codes(op: Op) -> Value | None:
    """gather(q.dequantize(c, s, z), i)  ->  q.dequantize(gather(c, i), gather(s, i), gather(z, i))

    The scales of rows become those of one block a row. None for codes of less than 8 bits: no Gather takes them.
    """
    try:
        emb = as_embedding(op)
    except Declined:
        return None
    dq = stored_weight(emb.table)
    if dq is None or op.operand(0) is not dq.result:
        return None
    scheme: Scheme = dq.attrs["scheme"]
    if scheme.bits < 8 or (scheme.axis is not None and scheme.axis % 2 != (scheme.granularity == "group")):
        return None
    lead = emb.indices.tensor.shape
    parts: list[Value | None] = []
    for i, value in enumerate((dq.operand(0), dq.operand(1), dq.operand(2))):
        payload = None if value is None else value.payload
        if value is None or payload is None or (i and scheme.granularity == "tensor"):
            parts.append(value)
            continue
        if i and scheme.granularity == "channel":
            column = computed("column", lambda p: p.array().reshape(-1, 1), [payload], payload.dtype, (emb.n, 1))
            value = _const(value, f"{value.name}_column", column)
        width = value.tensor.shape[-1] if value.tensor.shape else None
        type = TensorType(value.tensor.dtype, None if lead is None else (*lead, width))
        loc = Loc(f"{op.label}.{('codes', 'scales', 'zeros')[i]}", op.loc.scope, op.loc.source)
        name = op.graph.fresh(f"{op.result.name}_{('codes', 'scale', 'zero')[i]}")
        parts.append(
            op.graph.create("onnx.Gather", [value, emb.indices], {"axis": 0}, [(name, type)], loc=loc, before=op).result
        )
    moved = scheme
    if scheme.granularity == "channel":
        size = 16
        while size < emb.k:
            size *= 2
        if size > 1024:
            return None
        moved = replace(scheme, granularity="group", group=(size,))
    if moved.granularity == "group":
        moved = moved.with_axis(None if lead is None else len(lead))
        if moved.axis is None:
            return None
    out = _dequantize(op, dq, parts, moved, TensorType(op.result.tensor.dtype, op.result.tensor.shape), op.result.name)
    assert out.owner is not None
    out.owner.loc = op.loc
    return out


# -- biases --------------------------------------------------------------------------------------------------


def _static_scale(value: Value | None) -> Value | None:
    """The constant scale of a dequantized activation."""
    op = None if value is None else value.owner
    if op is None or op.name != "q.dequantize" or stored_weight(value) is not None:
        return None
    scale = op.operands[1]
    return scale if scale is not None and scale.is_const and scale.payload is not None else None


def _is_quantized(value: Value) -> bool:
    """Only a quantize reads ``value``, or what a Relu or Clip makes of it."""
    users = value.users
    if len(users) == 1 and users[0].name in ("onnx.Relu", "onnx.Clip") and not value.is_output:
        users = users[0].result.users
    return bool(users) and all(u.name == "q.quantize" for u in users)


def bias_place(op: Op) -> tuple[Op, int, Value] | None:
    """Where a constant row is added to the product ``op`` in a way that the runtime joins with it: op, slot, bias."""
    x = op.operand(0)
    if op.name == "onnx.Gemm":
        bias = op.operand(2)
        return None if bias is None or op.attrs.get("beta", 1.0) != 1.0 else (op, 2, bias)
    shape = None if x is None else x.tensor.shape
    if shape is None or (len(shape) != 2 and not all(isinstance(d, int) for d in shape)):
        return None
    add = op.result.users[0] if len(op.result.uses) == 1 and op.result.users else None
    if add is None or add.name != "onnx.Add":
        return None
    slot = 1 if add.operand(0) is op.result else 0
    bias = add.operand(slot)
    return None if bias is None else (add, slot, bias)


def plain_bias(op: Op) -> None:
    """product(x, w) + b[1, N]  ->  product(x, w) + b[N]   for constants, since only those are joined with a product"""
    place, dq = bias_place(op), stored_weight(op.operand(1))
    if place is None or dq is None:
        return
    owner, slot, bias = place
    n = (dq.result.tensor.static_shape or (0,))[-1]
    shape, payload = bias.tensor.static_shape, bias.payload
    rank = op.result.tensor.rank
    if payload is None or not is_float_const(bias) or shape is None or len(shape) < 2 or rank is None:
        return
    if shape[-1] == n == payload.size and len(shape) <= rank:
        row = computed("row", lambda p: p.array().reshape(-1), [payload], payload.dtype, (n,))
        owner.set_operand(slot, _const(bias, f"{bias.name}_row", row))


def round_bias(op: Op) -> None:
    """product(x, w) + b  ->  product(x, w) + q.dequantize(round(b / (xs * ws)), xs * ws)   where the result is float"""
    dq, scale = stored_weight(op.operand(1)), _static_scale(op.operand(0))
    place = bias_place(op)
    if dq is None or scale is None or place is None or dq.attrs["scheme"].granularity == "group":
        return
    owner, slot, bias = place
    weight_scale, n = dq.operands[1], (dq.result.tensor.static_shape or (0, 0))[-1]
    if not is_float_const(bias) or not is_row(bias, n) or _is_quantized(owner.result):
        return
    assert weight_scale is not None
    sources = [bias.payload, scale.payload, weight_scale.payload]
    label = op.label

    def step(x: Array, w: Array) -> Array:
        return np.broadcast_to(x.astype(np.float64) * w.astype(np.float64), (n,)).astype(np.float32)

    def codes(b: Payload, x: Payload, w: Payload) -> Array:
        rounded = np.rint(np.broadcast_to(b.array().reshape(-1), (n,)) / step(x.array(), w.array()).astype(np.float64))
        if np.abs(rounded).max(initial=0.0) > LARGEST:
            top = float(np.abs(rounded).max())
            raise InputError(f"'{label}': its bias is {top:.3g} steps of x scale times w scale, beyond int32; skip it")
        return rounded.astype(np.int32)

    made = computed("bias_codes", codes, sources, INT32, (n,))  # type: ignore[arg-type]
    steps = computed("bias_scale", lambda x, w: step(x.array(), w.array()), sources[1:], F32, (n,))  # type: ignore[arg-type]
    home = owner.graph
    pair = [_const(bias, f"{bias.name}_codes", made), _const(bias, f"{bias.name}_scale", steps)]
    result = [(home.fresh(f"{bias.name}_dq"), TensorType(F32, (n,)))]
    name = Loc(f"{label}.bias", op.loc.scope, op.loc.source)
    new = home.create("onnx.DequantizeLinear", pair, {"axis": 0}, result, loc=name, before=op)
    owner.set_operand(slot, new.result)
