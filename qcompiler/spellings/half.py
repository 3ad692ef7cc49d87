"""Codes that a model scales in f16: computed in f32, the only scales of the integer kernels, then cast back."""

from __future__ import annotations

from qcompiler.dtypes import F16, F32
from qcompiler.ir import Op, TensorType, Value
from qcompiler.rewrite import Rewriter, rule
from qcompiler.spellings.operands import activation_of
from qcompiler.spellings.parts import is_float
from qcompiler.spellings.products import COMPUTED, FLOAT_CODE, HALF_CODE, single


@rule("q.quantize")
def quantize_single(op: Op, rw: Rewriter) -> Value:
    """q.quantize(x f16, s f16)  ->  q.quantize(cast(x), s f32)   the integer kernels have f32 scales alone

    A value that was rounded to f16 just before is taken from before that, which may move its code by one.
    """
    x, scale = op.operand(0), op.operand(1)
    if x is None or scale is None or scale.tensor.dtype != F16 or not scale.is_const or x.is_const:
        raise rw.declined("no f16 activation", quiet=True)
    maker = x.owner
    source = maker.operand(0) if maker is not None and maker.name == "onnx.Cast" else None
    if source is None or source.tensor.dtype != F32:
        source = rw.op("onnx.Cast", x, type=TensorType(F32, x.tensor.shape), to=FLOAT_CODE)
    return rw.op("q.quantize", source, single(rw, scale), op.operand(2), type=op.result.type, **op.attrs)


@rule(*COMPUTED)
def compute_single(op: Op, rw: Rewriter) -> Value:
    """f(q.dequantize(a) f16, q.dequantize(b) f16)  ->  cast(f(q.dequantize(a) f32, q.dequantize(b) f32))"""
    values = [v for v in op.operands if v is not None]
    dqs = [None if is_float(v) else v.owner for v in values]
    if not values or op.result.tensor.dtype not in (None, F16) or activation_of(values[0]) is None:
        raise rw.declined("it has no f16 codes", quiet=True)
    if not all(d is None or (d.name == "q.dequantize" and d.result.tensor.dtype == F16) for d in dqs):
        raise rw.declined("not all of it is f16 codes", quiet=True)
    if all(v.tensor.dtype != F16 for v in values):
        raise rw.declined("it is not f16", quiet=True)
    wide = []
    for value, dq in zip(values, dqs, strict=True):
        if dq is None:
            wide.append(single(rw, value))
            continue
        codes, scale = dq.operands[0], dq.operands[1]
        assert scale is not None
        if not scale.is_const:
            raise rw.declined("its f16 scales are known only at run time", code="QC205")
        kind = TensorType(F32, value.tensor.shape)
        wide.append(rw.op("q.dequantize", codes, single(rw, scale), dq.operand(2), type=kind, **dq.attrs))
    y = rw.op(op.name, *wide, type=TensorType(F32, op.result.tensor.shape), **op.attrs)
    return rw.op("onnx.Cast", y, type=TensorType(F16, op.result.tensor.shape), to=HALF_CODE)


@rule("q.dequantize")
def dequantize_single(op: Op, rw: Rewriter) -> Value:
    """q.dequantize(c, s f16)  ->  cast(q.dequantize(c, s f32))   for codes that are computed"""
    codes, scale = op.operand(0), op.operand(1)
    if codes is None or codes.is_const or scale is None or scale.tensor.dtype != F16 or not scale.is_const:
        raise rw.declined("no f16 activation", quiet=True)
    kind = TensorType(F32, op.result.tensor.shape)
    y = rw.op("q.dequantize", codes, single(rw, scale), op.operand(2), type=kind, **op.attrs)
    return rw.op("onnx.Cast", y, type=op.result.type, to=HALF_CODE)


RULES = (quantize_single, compute_single)
LAST = (dequantize_single,)
"""For what the others have left."""
