"""Entry points: products of codes of activations as ``qcompiler::a8_linear``, behind what quantizes the activation.

An activation that several layers read is quantized once. What comes right before, an RMS norm and factors that multiply
(those that SmoothQuant could not fold), is computed by the quantizer where nothing else reads its result.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.backends.torch.building import Builder
from qcompiler.backends.torch.payload import TO_TORCH
from qcompiler.backends.triton import ops as _registered  # noqa: F401  (the calls name its operators)
from qcompiler.backends.triton.forms import form_called
from qcompiler.backends.triton.lower import Weight
from qcompiler.backends.triton.norms import rms_norm_behind
from qcompiler.dtypes import F32, Array
from qcompiler.ir import Op, TensorType, Value
from qcompiler.scheme import Scheme
from qcompiler.target import Choice

QUANTIZE = "qcompiler.quantize_rows.default"
PRODUCT = "qcompiler.a8_linear.default"


def linear_dyn(op: Op, choice: Choice) -> Value:
    """q.linear_dyn(x, codes, s, z?, bias?)  ->  a8_linear(*quantize_rows(x), codes, s, z?, bias?)"""
    b = Builder(op)
    scheme: Scheme = op.attrs["x_scheme"]
    block = scheme.group[1] if scheme.granularity == "block" else 0
    codes, scale = quantized_rows(b, b.at(0), scheme, block)
    return _product(b, codes, scale, 1, block)


def linear_static(op: Op, choice: Choice) -> Value:
    """q.linear_static(c, s, None, codes, s, z?, bias?)  ->  a8_linear(c, s, codes, s, z?, bias?)"""
    b = Builder(op)
    return _product(b, b.at(0), _scalar(b, 1), 3, 0)


def quantize(op: Op, choice: Choice) -> Value:
    """q.quantize(x, s)  ->  quantize_static(x, s)"""
    b = Builder(op)
    scheme: Scheme = op.attrs["scheme"]
    x, factors = factored(b.at(0), op)
    out: Any = TO_TORCH[scheme.dtype]
    made: Value = b.call("qcompiler.quantize_static.default", x, _scalar(b, 1), factors, out, type=op.result.type)
    return made


def quantized_rows(b: Builder, x: Value, scheme: Scheme, block: int) -> tuple[Value, Value]:
    """Codes and scales of the rows of ``x``, made once for all that read it so; ``block`` columns share one, 0: all."""
    element, shape = scheme.dtype, x.tensor.shape

    def make() -> list[Value]:
        plain, factors = factored(x, b.op)
        norm = rms_norm_behind(plain) if only_quantized(plain, b.op, x.owner if factors is not None else None) else None
        last = None if not shape else shape[-1]
        wide = -(-last // block) if block and isinstance(last, int) else 1
        scales = TensorType(F32, None if shape is None else (*shape[:-1], wide))
        out: Any = TO_TORCH[element]
        before = (plain, factors, None, 0.0) if norm is None else (norm.x, factors, norm.weight, norm.eps)
        arguments = (*before, out, block)
        return list(b.call(QUANTIZE, *arguments, type=[TensorType(element, shape), scales], suffix="quantize"))

    codes, scales = b.shared(x, ("rows", element.name, block), make)
    return codes, scales


def factored(x: Value, reader: Op) -> tuple[Value, Value | None]:
    """What ``x`` is a multiple of, and the constant row of factors, where only quantizers like ``reader`` read it."""
    maker = x.owner
    if (
        maker is None
        or maker.name != "aten.mul.Tensor"
        or not only_quantized(x, reader)
        or rms_norm_behind(x) is not None
    ):
        return x, None
    for inner, row in ((maker.operand(0), maker.operand(1)), (maker.operand(1), maker.operand(0))):
        if inner is None or row is None or not row.is_const or row.tensor.rank != 1:
            continue
        wide, kind = x.tensor.shape, x.tensor.dtype
        fits = wide is not None and row.tensor.shape == wide[-1:] and inner.tensor.shape == wide
        if fits and inner.tensor.dtype == row.tensor.dtype == kind:
            return inner, row
    return x, None


def only_quantized(x: Value, reader: Op, multiplied: Op | None = None) -> bool:
    """Nothing reads ``x`` but ops like ``reader``, quantizers, and the product with factors that they take in."""
    if x.is_output:
        return False
    return all(u is multiplied or (u.name in (reader.name, QUANTIZE) and u.operand(0) is x) for u in x.users)


def _product(b: Builder, x: Value, x_scale: Value, first: int, block: int) -> Value:
    """The call of the kernel; the weight is in operands ``first`` on."""
    w = Weight.of(b, first)
    if form_called(w.form).bits < 8:
        codes, scales, zeros, _ = w.tensors()
        group = w.group
    else:
        codes, scales, zeros, group = b.at(first), _row(w), None, 0
    bias = b.op.operand(first + 3)
    out: Any = TO_TORCH[b.op.result.tensor.dtype or F32]
    weight = (codes, scales, zeros, bias, None, None)
    made: Value = b.call(PRODUCT, x, x_scale, *weight, w.n, group, block, w.form, "none", out, type=b.op.result.type)
    return made


def _row(w: Weight) -> Value:
    """f32 scales of 8-bit codes: ``[N]``, ``[1]`` of a tensor's one scale, blocks as they are."""
    b, scheme = w.builder, w.scheme
    payload = b.payload(w.first + 1, "scale")
    shape = payload.shape if scheme.granularity == "block" else (payload.shape[0],)

    def row(scales: Array) -> Array:
        return np.ascontiguousarray(scales.reshape(shape), np.float32)

    source = b.at(w.first + 1)
    return b.laid_out(source, ("f32", shape), lambda: b.derived("weight_scale", [payload], row, F32, shape))


def _scalar(b: Builder, index: int) -> Value:
    """The scale in operand ``index`` in f32, ``[]``."""
    value = b.at(index)
    if value.tensor.dtype == F32 and value.tensor.static_shape == ():
        return value
    if value.payload is None:
        return b.cast(value, F32, "scale")
    return b.derived("x_scale", [value.payload], lambda s: s.reshape(()).astype(np.float32), F32, ())
