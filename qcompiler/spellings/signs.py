"""int8 activations counted from 128 higher, as uint8: the same values, on kernels that take a fraction of the time.

``(c + 128) - (z + 128) == c - z``, so nothing that is computed from the codes changes. It is done for a whole graph or
not at all, since ops that join activations want their codes in one type.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qcompiler.dtypes import INT8, UINT8, Array
from qcompiler.ir import Graph, Op, TensorType, Value
from qcompiler.payload import Payload, computed, constant
from qcompiler.rewrite import Rewriter, rule
from qcompiler.scheme import Scheme
from qcompiler.spellings.parts import once

POINTWISE = frozenset(f"onnx.{n}" for n in ("Add", "Mul", "Concat"))


def _is_signed(op: Op) -> bool:
    scheme = op.attrs.get("scheme")
    return isinstance(scheme, Scheme) and scheme.dtype == INT8 and scheme.granularity == "tensor"


def _constant(value: Value | None) -> bool:
    return value is None or (value.is_const and value.payload is not None)


def _ends(op: Op) -> bool:
    """A quantize whose codes only dequantizes read."""
    users = op.result.users
    return not op.result.is_output and all(u.name == "q.dequantize" and _is_signed(u) for u in users)


def count_from_zero(graph: Graph) -> int:
    """Make every int8 activation of ``graph`` uint8; returns how many quantizes that were, 0 where one cannot be."""
    pairs = [op for op in graph.walk() if op.name in ("q.quantize", "q.dequantize") and _is_signed(op)]
    activations = [op for op in pairs if not _constant(op.operand(0))]
    if any(not (_constant(op.operand(1)) and _constant(op.operand(2))) for op in activations):
        return 0
    quantizes = [op for op in activations if op.name == "q.quantize"]
    sources = {op.result for op in quantizes}
    if not all(map(_ends, quantizes)) or any(
        op.operand(0) not in sources for op in activations if op.name == "q.dequantize"
    ):
        return 0
    joined = [
        op for op in pairs if op not in activations and op.result.users and all(_joins(u) for u in op.result.users)
    ]
    for op in (*activations, *joined):
        _raise(op)
    return len(quantizes)


def _joins(op: Op) -> bool:
    return op.name in POINTWISE


def _raise(op: Op) -> None:
    """The op in uint8."""
    scheme: Scheme = op.attrs["scheme"]
    codes, scale, zero = op.operands[0], op.operands[1], op.operand(2)
    assert codes is not None and scale is not None
    if op.name == "q.dequantize" and codes.is_const:
        codes = _higher(codes)
    op.set_operands([codes, scale, _middle(scale) if zero is None else _higher(zero)])
    op.attrs["scheme"] = replace(scheme, dtype=UINT8, symmetric=False, zero="int")
    if op.name == "q.quantize":
        op.result.type = TensorType(UINT8, op.result.tensor.shape)


def _higher(value: Value) -> Value:
    """Constant codes or zero points, 128 higher."""
    name = f"{value.name}.higher"
    known = value.graph.local(name)
    if known is not None and known.is_const:
        return known
    assert value.payload is not None
    payload: Payload = value.payload

    def fn(p: Payload) -> Array:
        return np.asarray(p.array().view(np.uint8) + np.uint8(128)).reshape(p.shape)

    if payload.size == 1:
        return value.graph.add_const(value.graph.fresh(name), constant(fn(payload), UINT8))
    return value.graph.add_const(value.graph.fresh(name), computed("higher", fn, [payload], UINT8, payload.shape))


def _middle(beside: Value) -> Value:
    """The code 128."""
    name = f"{beside.name}.middle"
    known = beside.graph.local(name)
    if known is not None and known.is_const:
        return known
    return beside.graph.add_const(beside.graph.fresh(name), constant(np.array(128), UINT8))


@rule("onnx.MatMul", "onnx.Gemm", "onnx.Conv")
def sign_weight(op: Op, rw: Rewriter) -> Value:
    """q.dequantize(x int8) @ q.dequantize(w uint8, z)  ->  .. @ q.dequantize(w - 128 int8, z - 128)   exact"""
    x, dq = (None if v is None else v.owner for v in (op.operand(0), op.operand(1)))
    if x is None or dq is None or x.name != "q.dequantize" or dq.name != "q.dequantize":
        raise rw.declined("no product of codes", quiet=True)
    scheme: Scheme = dq.attrs["scheme"]
    codes, scale, zero = dq.operands[0], dq.operands[1], dq.operand(2)
    if not _is_signed(x) or _constant(x.operand(0)) or scheme.dtype != UINT8 or codes is None or zero is None:
        raise rw.declined("no int8 activation meets a uint8 weight", quiet=True)
    if not codes.is_const or not zero.is_const:
        raise rw.declined("its weight is no constant", quiet=True)
    attrs = {**dq.attrs, "scheme": replace(scheme, dtype=INT8)}
    made = rw.op("q.dequantize", _lower(rw, codes), scale, _lower(rw, zero), type=dq.result.type, **attrs)
    return rw.op(op.name, op.operands[0], made, *op.operands[2:], type=op.result.type, **op.attrs)


def _lower(rw: Rewriter, value: Value) -> Value:
    """Constant uint8 codes or zero points, 128 lower, as int8."""

    def fn(p: Payload) -> Array:
        return np.asarray((p.array() - np.uint8(128)).view(np.int8)).reshape(p.shape)

    return once(rw, value, "lower", lambda p: computed("lower", fn, [p], INT8, p.shape))


RULES = (sign_weight,)
