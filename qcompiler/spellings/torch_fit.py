"""What weights in the pair form still lack before one of torch's kernels takes them; for graphs of the aten dialect.

Centring changes no value. Rounding of scales moves weights by at most 2**-9 of themselves, which is what the only
kernel of 4-bit codes keeps of a scale (bf16).
"""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np

from qcompiler.dtypes import BF16, INT8, UINT8, Array
from qcompiler.ir import Op, Value
from qcompiler.payload import Payload, computed
from qcompiler.rewrite import Rewriter, rule
from qcompiler.scheme import Scheme
from qcompiler.spellings.operands import ATEN_PRODUCTS, activation_of, slots, weight_of, with_operands
from qcompiler.spellings.parts import once
from qcompiler.spellings.products import moved_again

ROUNDED = "rounded"
"""Key in the ``meta`` of a product: the scales of its weight were rounded."""
WHY_ROUNDED = "its scales are rounded to 8 significant bits, all that its kernel keeps: weights move by 0.2 % at most"


@rule("q.dequantize")
def center_codes(op: Op, rw: Rewriter) -> Value:
    """q.dequantize(c uint8, s, 128)  ->  q.dequantize(c - 128 int8, s)   exact: signed codes need no zero point"""
    codes, scale, zero = op.operand(0), op.operand(1), op.operand(2)
    scheme: Scheme = op.attrs["scheme"]
    if rw.graph.root.dialect != "aten" or scheme.dtype != UINT8 or codes is None or not codes.is_const or zero is None:
        raise rw.declined("no unsigned codes of a weight", quiet=True)
    if not zero.is_const or zero.payload is None or (zero.payload.array() != 128).any():
        raise rw.declined("its zero points are not the middle code", quiet=True)

    def lower(p: Payload) -> Array:
        return np.asarray((p.array() - np.uint8(128)).view(np.int8)).reshape(p.shape)

    made = once(rw, codes, "lower", lambda p: computed("lower", lower, [p], INT8, p.shape))
    attrs = {**op.attrs, "scheme": replace(scheme, dtype=INT8, symmetric=True, zero="none")}
    return rw.op("q.dequantize", made, scale, type=op.result.type, **attrs)


@rule(*ATEN_PRODUCTS)
def round_scales(op: Op, rw: Rewriter) -> Value:
    """x @ q.dequantize(c, s)  ->  x @ q.dequantize(c, bf16(s))   for codes of at most 4 bits"""
    at, beside = slots(op)
    dq = weight_of(op.operand(beside))
    scale = None if dq is None else dq.operand(1)
    few = dq is not None and dq.attrs["scheme"].bits <= 4
    if dq is None or not few or activation_of(op.operand(at)) is not None or scale is None or not scale.is_const:
        raise rw.declined("no weight of few bits beside a float", quiet=True)
    if scale.payload is None or scale.tensor.dtype == BF16 or _is_short(scale.payload):
        raise rw.declined("its scales have 8 significant bits", quiet=True)
    element = scale.payload.dtype

    def run(p: Payload) -> Array:
        return p.array().astype(ml_dtypes.bfloat16).astype(element.storage)

    short = once(rw, scale, "bf16", lambda p: computed("bf16", run, [p], element, p.shape))
    weight = rw.op("q.dequantize", dq.operands[0], short, dq.operand(2), type=dq.result.type, **dq.attrs)
    operands = with_operands(op, {beside: moved_again(rw, op.operands[beside], dq.result, weight)})
    made = rw.op(op.name, *operands, type=op.result.type, **op.attrs)
    assert made.owner is not None
    made.owner.meta.update(op.meta | {ROUNDED: True})
    return made


def _is_short(scales: Payload) -> bool:
    values = scales.array()
    return bool((values.astype(ml_dtypes.bfloat16).astype(values.dtype) == values).all())


CENTER, ROUND = (center_codes,), (round_scales,)
