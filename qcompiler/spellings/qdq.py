"""QuantizeLinear, DequantizeLinear and DynamicQuantizeLinear, of ONNX's own domain and com.microsoft's."""

from __future__ import annotations

import numpy as np

from qcompiler.dtypes import F32, INT32, TABLE, DType
from qcompiler.ir import Op, TensorType, Value
from qcompiler.payload import constant
from qcompiler.rewrite import Rewriter, rule
from qcompiler.scheme import Scheme
from qcompiler.spellings.expressions import settle
from qcompiler.spellings.parts import code_type, constant_codes, dequantized, int_attr, parameters, quantized

DEQUANTIZE = ("onnx.DequantizeLinear", "com.microsoft.DequantizeLinear")
QUANTIZE = ("onnx.QuantizeLinear", "com.microsoft.QuantizeLinear")
DYNAMIC = Scheme(TABLE["uint8"], "tensor", symmetric=False, dynamic=True)
"""What a DynamicQuantizeLinear gives: uint8 over the range of its input, 0 included (ONNX operators)."""


@rule(*DEQUANTIZE)
def lift_dequantize(op: Op, rw: Rewriter) -> Value:
    """DequantizeLinear(c, s, z)  ->  q.dequantize(c, s, z);  of an int32 constant: the float constant"""
    codes, scale, zero = op.operand(0), op.operand(1), op.operand(2)
    if codes is None or scale is None:
        raise rw.declined("codes or scale are absent", quiet=True)
    codes = settle(rw, codes)
    element = code_type(codes, zero)
    if element == INT32:
        return _bias(op, rw, codes, scale, zero)
    if op.result.is_output and codes.is_const:
        raise rw.declined(
            "the expanded tensor is an output of the graph, so it must exist", code="QC101", fix="give out the codes"
        )
    if codes.is_const or codes.payload is not None:
        constant_codes(rw, codes)
        scale, zero = constant_codes(rw, scale, "scales"), _constant(rw, zero)
    elif element.bits != 8:
        raise rw.declined(f"{element} codes that are computed at run time have no kernel", code="QC201")
    p = parameters(rw, codes, element, scale, zero, axis=int_attr(op, "axis", 1), block=int_attr(op, "block_size", 0))
    if _dynamic(op):
        p = p._replace(scheme=DYNAMIC)
    return dequantized(rw, codes, p, op.result.tensor.dtype or p.scale.tensor.dtype)


def _constant(rw: Rewriter, zero: Value | None) -> Value | None:
    return None if zero is None else constant_codes(rw, zero, "zero points")


def _dynamic(op: Op) -> bool:
    """The scale and the codes come from one DynamicQuantizeLinear, lifted or not."""
    scale = op.operand(1)
    return scale is not None and scale.owner is not None and scale.owner.name == "q.choose_qparams"


def _bias(op: Op, rw: Rewriter, codes: Value, scale: Value, zero: Value | None) -> Value:
    """The bias of an integer kernel: few numbers, kept in float, from which the kernel's own steps are taken again."""
    scale, zero = settle(rw, scale), None if zero is None else settle(rw, zero)
    known = [v for v in (codes, scale, zero) if v is not None]
    if not all(v.is_const and v.payload is not None for v in known) or (codes.tensor.rank or 0) > 1:
        raise rw.declined("int32 codes that are no constant vector have no kernel", code="QC201")
    if op.result.is_output:
        raise rw.declined("an output keeps its op", quiet=True)
    assert codes.payload is not None and scale.payload is not None
    values = codes.payload.array().astype(np.float64)
    if zero is not None and zero.payload is not None:
        values = values - zero.payload.array().astype(np.float64)
    element: DType = scale.tensor.dtype or F32
    out = np.broadcast_to(values * scale.payload.array().astype(np.float64), values.shape)
    return rw.const(f"{codes.name}.float", constant(np.array(out), element), codes.graph)


@rule(*QUANTIZE)
def lift_quantize(op: Op, rw: Rewriter) -> Value:
    """QuantizeLinear(x, s, z)  ->  q.quantize(x, s, z)"""
    x, scale, zero = op.operand(0), op.operand(1), op.operand(2)
    if x is None or scale is None:
        raise rw.declined("input or scale are absent", quiet=True)
    element = code_type(op.result, zero)
    p = parameters(rw, x, element, scale, zero, axis=int_attr(op, "axis", 1), block=int_attr(op, "block_size", 0))
    return quantized(rw, x, p, hint=f"{op.result.name}_c")


@rule("onnx.DynamicQuantizeLinear")
def lift_dynamic(op: Op, rw: Rewriter) -> tuple[Value, Value, Value]:
    """DynamicQuantizeLinear(x)  ->  q.quantize(x, s, z), s, z   of  s, z = q.choose_qparams(x)"""
    x = op.operand(0)
    if x is None or x.tensor.dtype not in (None, F32):
        raise rw.declined("DynamicQuantizeLinear takes f32", code="QC201")
    scale, zero = chosen(rw, x)
    codes = rw.op(
        "q.quantize", x, scale, zero, type=TensorType(DYNAMIC.dtype, x.tensor.shape), scheme=DYNAMIC, hint=x.name + "_c"
    )
    return codes, scale, zero


def chosen(rw: Rewriter, x: Value) -> tuple[Value, Value]:
    """Scale and zero point of ``x`` at run time."""
    graph = rw.graph
    results = [
        (graph.fresh(f"{x.name}_scale"), TensorType(x.tensor.dtype or F32, ())),
        (graph.fresh(f"{x.name}_zero"), TensorType(DYNAMIC.dtype, ())),
    ]
    made = graph.create("q.choose_qparams", [x], {"scheme": DYNAMIC}, results, loc=rw.root.loc, before=rw.root)
    rw.made.append(made)
    return made.results[0], made.results[1]


RULES = (lift_dequantize, lift_quantize, lift_dynamic)
