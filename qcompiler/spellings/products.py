"""What a product in the pair form still lacks before a kernel can take it, by rules that change no value of a weight.

Each rule says what it costs in exactness: nothing, one rounding of f16, or the rounding of activations that a graph
states in a form which no kernel has. Where activations are left in float, a Clip keeps the range of their codes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from qcompiler.dtypes import BF16, F16, F32, TABLE, Array, DType
from qcompiler.ir import Attr, Hole, Loc, Op, TensorType, Value
from qcompiler.payload import computed, constant
from qcompiler.rewrite import Declined, Rewriter, rule
from qcompiler.scheme import Scheme
from qcompiler.spellings.expressions import settle
from qcompiler.spellings.operands import (
    ATEN_CONVS,
    ATEN_PRODUCTS,
    PRODUCTS,
    activation_of,
    slots,
    weight_of,
    with_operands,
)
from qcompiler.spellings.parts import code_type, is_float, nought, once, permuted_shape
from qcompiler.spellings.qdq import DEQUANTIZE, QUANTIZE
from qcompiler.target import Request
from qcompiler.views import LinearView, as_linear

COMPUTED = (
    *PRODUCTS,
    *(f"onnx.{n}" for n in ("Conv", "Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid")),
    *("onnx.LeakyRelu", "onnx.Softmax"),
)
FREED = "freed"
"""Key in the ``meta`` of a Clip that stands for a pair: it cuts off what the codes of the pair did."""
FLOAT_CODE, HALF_CODE, BFLOAT_CODE = 1, 10, 16
"""``to`` of a Cast to f32, f16 and bf16 (onnx TensorProto.DataType)."""


def range_of(scale: Array, zero: Array | None, element: DType) -> tuple[float, float]:
    """The smallest and the largest value that codes of ``element`` stand for."""
    middle = 0.0 if zero is None else float(zero.reshape(()))
    step = float(scale.reshape(()))
    ends = sorted(((element.qmin - middle) * step, (element.qmax - middle) * step))
    return ends[0], ends[1]


def clipped(rw: Rewriter, quantize: Op, element: DType) -> Value:
    """What ``quantize`` reads, cut off where its codes end; itself where the range is taken from the values.

    Declines for scales that are no constants.
    """
    x, scale, zero = quantize.operand(0), quantize.operand(1), quantize.operand(2)
    assert x is not None and scale is not None
    if scale.owner is not None and scale.owner.name == "q.choose_qparams":
        return x
    scale, zero = settle(rw, scale), None if zero is None else settle(rw, zero)
    arrays = [None if v is None or v.payload is None or not v.is_const else v.payload.array() for v in (scale, zero)]
    if arrays[0] is None or arrays[0].size != 1 or (zero is not None and arrays[1] is None):
        raise rw.declined("its activation is scaled by what is known only at run time", code="QC205")
    kind = x.tensor.dtype or F32
    ends = range_of(arrays[0], arrays[1], element)
    if x.graph.root.dialect == "aten":
        made = rw.op("aten.clamp.default", x, type=x.type, hint=f"{x.name}_clip", args=(Hole(0), *ends))
    else:
        bounds = [
            rw.const(f"{x.name}.{word}", constant(np.array(end), kind))
            for word, end in zip(("low", "high"), ends, strict=True)
        ]
        made = rw.op("onnx.Clip", x, *bounds, type=x.type, hint=f"{x.name}_clip")
    assert made.owner is not None
    made.owner.loc, made.owner.meta[FREED] = Loc("", rw.root.loc.scope, rw.root.loc.source), True
    return made


def _again(rw: Rewriter, *operands: Value | None, **attrs: Attr) -> Value:
    """The root on other operands; it stays the product of its site."""
    op = rw.root
    made = rw.op(op.name, *operands, type=op.result.type, **(op.attrs | attrs))
    assert made.owner is not None
    made.owner.meta.update(op.meta)
    return made


def wide_pair(op: Op) -> tuple[Op, DType] | None:
    """The QuantizeLinear that a DequantizeLinear undoes, and the type of its codes, where that has 16 bits."""
    codes = op.operand(0) if op.name in DEQUANTIZE else None
    q = None if codes is None else codes.owner
    element = None if codes is None else code_type(codes, op.operand(2))
    return (q, element) if q is not None and q.name in QUANTIZE and element is not None and element.bits == 16 else None


@rule(*DEQUANTIZE)
def drop_wide_pair(op: Op, rw: Rewriter) -> Value:
    """DequantizeLinear(QuantizeLinear(x)) of 16-bit codes  ->  clip(x)   moves a value by at most half a step"""
    found = wide_pair(op)
    if found is None:
        raise rw.declined("no pair of 16-bit codes", quiet=True)
    q, element = found
    if settle(rw, q.operands[1]) is not settle(rw, op.operands[1]):  # type: ignore[arg-type]  # a pair has scales
        raise rw.declined(f"'{q.label}' and '{op.label}' have different scales", code="QC201")
    return clipped(rw, q, element)


@rule(*PRODUCTS, *ATEN_PRODUCTS)
def free_activation(op: Op, rw: Rewriter) -> Value:
    """q.dequantize(q.quantize(x)) @ q.dequantize(w in blocks)  ->  clip(x) @ q.dequantize(w)

    and so for an activation with a scale a token. No integer kernel has scales in blocks or a token, so the product
    becomes a weight-only one, whose kernel may round its activation by itself. The rounding that the graph states goes:
    the result moves by at most half a step of the activation times the sum of the weight's magnitudes.
    """
    at, beside = slots(op)
    pair, w = activation_of(op.operand(at)), weight_of(op.operand(beside))
    blocks = w is not None and w.attrs["scheme"].granularity == "group"
    if pair is None or w is None or not (blocks or pair.attrs["scheme"].granularity == "token"):
        raise rw.declined("no quantized activation meets a weight in blocks", quiet=True)
    codes = pair.operands[0]
    q = None if codes is None else codes.owner
    if q is None or q.name != "q.quantize":
        raise rw.declined(
            f"'{op.label}' multiplies codes that are not quantized right before it with a weight in blocks, and no "
            "integer kernel has scales in blocks",
            code="QC303",
            fix="quantize the weight with one scale an output channel",
        )
    return _again(rw, *with_operands(op, {at: clipped(rw, q, q.attrs["scheme"].dtype)}))


@rule("onnx.MatMul", "onnx.Gemm", "onnx.Conv", *ATEN_PRODUCTS, *ATEN_CONVS)
def widen_codes(op: Op, rw: Rewriter) -> Value:
    """q.dequantize(x) @ q.dequantize(w in 4 or 2 bits)  ->  the same codes in 8 bits: exact, one byte a code"""
    at, beside = slots(op)
    dq = weight_of(op.operand(beside))
    scheme: Scheme | None = None if dq is None else dq.attrs["scheme"]
    if activation_of(op.operand(at)) is None or dq is None or scheme is None or scheme.bits >= 8:
        raise rw.declined("no quantized activation meets a weight of less than 8 bits", quiet=True)
    if scheme.granularity == "group":
        raise rw.declined("its weight is scaled in blocks", quiet=True)
    wide = TABLE["int8" if scheme.dtype.signed else "uint8"]
    attrs = {**dq.attrs, "scheme": Scheme(wide, scheme.granularity, scheme.symmetric, (), scheme.axis)}
    codes, scale, zero = dq.operands[0], dq.operands[1], dq.operand(2)
    assert codes is not None

    made = rw.op(
        "q.dequantize",
        _in_type(rw, codes, wide),
        scale,
        zero and _in_type(rw, zero, wide),
        type=dq.result.type,
        **attrs,
    )
    moved = moved_again(rw, op.operands[beside], dq.result, made)
    return rw.op(op.name, *with_operands(op, {beside: moved}), type=op.result.type, **op.attrs)


def moved_again(rw: Rewriter, value: Value | None, old: Value, new: Value) -> Value:
    """The movement that makes ``value`` of ``old``, on ``new``."""
    if value is old:
        return new
    assert value is not None and value.owner is not None
    op = value.owner
    source = moved_again(rw, op.operand(0), old, new)
    return rw.op(op.name, source, *op.operands[1:], type=value.type, **op.attrs)


@rule("onnx.MatMul")
def turn_left_weight(op: Op, rw: Rewriter) -> Value:
    """w @ x  ->  transpose(transpose(x) @ transpose(w))   for a weight on the left, over the last two axes"""
    a, x = op.operand(0), op.operand(1)
    dq = weight_of(a)
    if a is None or x is None or dq is None or weight_of(x) is not None or is_float(x):
        raise rw.declined("no weight on the left", quiet=True)
    rank = x.tensor.rank
    if rank is None or rank < 2 or a.tensor.rank != 2:
        raise rw.declined(f"'{op.label}' multiplies a weight with a tensor of unknown rank", code="QC203")
    if activation_of(x) is not None and dq.attrs["scheme"].granularity == "tensor":
        raise rw.declined("integer kernels take one scale on the left", quiet=True)
    swap = (*range(rank - 2), rank - 1, rank - 2)

    def flip(value: Value, perm: tuple[int, ...]) -> Value:
        kind: Any = permuted_shape(value.tensor.shape, perm)
        return rw.op("onnx.Transpose", value, type=TensorType(value.tensor.dtype, kind), perm=perm)

    out = op.result.tensor
    shape: Any = permuted_shape(out.shape, swap) if out.rank == rank else None
    y = rw.op("onnx.MatMul", flip(x, swap), flip(a, (1, 0)), type=TensorType(out.dtype, shape))
    last = rw.op("onnx.Transpose", y, type=op.result.type, perm=swap)
    if last.owner is not None:
        last.owner.loc = type(op.loc)("", op.loc.scope, op.loc.source)
    return last


@rule("onnx.Gemm")
def plain_gemm(op: Op, rw: Rewriter) -> Value:
    """alpha * x^T @ w + beta * b  ->  transpose(x) @ (alpha * w) + (beta * b)   alpha goes to the weight's scales"""
    alpha, beta = float(op.attrs.get("alpha", 1.0)), float(op.attrs.get("beta", 1.0))
    bias, dq = op.operand(2), weight_of(op.operand(1))
    x, weight = op.operand(0), op.operand(1)
    if dq is None or x is None or weight is None:
        raise rw.declined("no dequantized weight", quiet=True)
    if alpha == 1.0 and not op.attrs.get("transA", 0) and (bias is None or beta == 1.0):
        raise rw.declined("it is plain", quiet=True)
    if alpha == 0.0 or (bias is not None and beta != 1.0 and not is_float(bias)):
        raise rw.declined(f"Gemm '{op.label}' has alpha={alpha:g}, beta={beta:g}", code="QC203")
    if op.attrs.get("transA", 0):
        kind: Any = permuted_shape(x.tensor.shape, (1, 0))
        x = rw.op("onnx.Transpose", x, type=TensorType(x.tensor.dtype, kind), perm=(1, 0))
    if alpha != 1.0:
        codes, scale, zero = dq.operands[0], dq.operands[1], dq.operand(2)
        assert scale is not None
        made = rw.op("q.dequantize", codes, _times(rw, scale, alpha), zero, type=dq.result.type, **dq.attrs)
        weight = moved_again(rw, weight, dq.result, made)
    if bias is not None and beta != 1.0:
        bias = _times(rw, bias, beta)
    return rw.op("onnx.Gemm", x, weight, bias, type=op.result.type, transB=op.attrs.get("transB", 0))


def _times(rw: Rewriter, value: Value, factor: float) -> Value:
    """A constant times a number, rounded once."""

    def make(p: Any) -> Any:
        shape, element = p.shape, p.dtype
        return computed(
            f"times {factor:g}",
            lambda q: (q.array().astype(np.float64) * factor).astype(element.storage),
            [p],
            element,
            shape,
        )

    return once(rw, value, f"times{factor:g}", make)


def _linear(rw: Rewriter) -> LinearView:
    """The root as a linear layer; its refusals are told by the pass that fuses."""
    try:
        return as_linear(rw.root)
    except Declined as e:
        raise rw.declined(e.reason.message, quiet=True) from None


# -- groups and widths that no kernel has --------------------------------------------------------------------


@rule(*PRODUCTS, *ATEN_PRODUCTS)
def refit_weight(op: Op, rw: Rewriter) -> Value:
    """x @ q.dequantize(w) that no kernel takes  ->  the same values in smaller groups, or in wider codes, that one does

    A scale of a large group is repeated for its parts, codes of 2 bits are stored in 4 or 8: exact, for some bytes.
    """
    lin = _linear(rw)
    dq = rw.expect(lin.weight, "q.dequantize")
    scheme: Scheme = dq.attrs["scheme"]
    codes, scale, zero = dq.operands[0], dq.operands[1], dq.operand(2)
    constant_weight = all(v is None or v.is_const for v in dq.operands)
    if rw.target is None or not constant_weight or activation_of(lin.x) is not None or codes is None or scale is None:
        raise rw.declined("no weight-only product for a known target", quiet=True)
    if scheme.granularity != "group" or (scheme.axis or 0) % 2 != lin.axis:
        raise rw.declined("its weight has no groups along the reduction", quiet=True)

    def taken(candidate: Scheme) -> bool:
        assert rw.target is not None
        asked = Request(
            "q.linear", candidate.with_axis(1), lin.n, lin.k, lin.x.tensor.dtype or F32, lin.bias is not None
        )
        return not rw.target.why_not(asked, rw.phases)

    if taken(scheme):
        raise rw.declined("a kernel takes it", quiet=True)
    found = next((c for c in _others(scheme) if taken(c)), None)
    if found is None:
        raise rw.declined("no kernel takes it in other groups or wider codes either", quiet=True)
    axis, size = lin.axis, lin.k
    if found.group != scheme.group:
        scale = _split_groups(rw, scale, axis, scheme.groups(size), found.groups(size), scheme.group[0], found.group[0])
        zero = zero and _split_groups(
            rw, zero, axis, scheme.groups(size), found.groups(size), scheme.group[0], found.group[0]
        )
    if found.dtype != scheme.dtype:
        codes, zero = _in_type(rw, codes, found.dtype), zero and _in_type(rw, zero, found.dtype)
    made = rw.op("q.dequantize", codes, scale, zero, type=dq.result.type, **{**dq.attrs, "scheme": found})
    beside = slots(op)[1]
    return _again(rw, *with_operands(op, {beside: moved_again(rw, op.operands[beside], dq.result, made)}))


def _others(scheme: Scheme) -> list[Scheme]:
    """Schemes that hold the same values: smaller groups first, then wider codes."""
    words = [w for w in (2, 4, 8) if w >= scheme.bits]
    groups = [g for g in (256, 128, 64, 32, 16) if g <= scheme.group[0]]
    prefix = "int" if scheme.dtype.signed else "uint"
    return [replace(scheme, dtype=TABLE[f"{prefix}{w}"], group=(g,)) for w in words for g in groups]


def _split_groups(rw: Rewriter, small: Value, axis: int, have: int, want: int, old: int, new: int) -> Value:
    """Each parameter once for every part of its group."""
    shape = small.tensor.static_shape or ()
    out = tuple(want if i == axis else d for i, d in enumerate(shape))
    at = np.arange(want) * new // old
    assert have > int(at.max(initial=0))
    label = f"groups of {new}"
    return once(rw, small, f"g{new}", lambda p: computed(label, lambda q: q.array().take(at, axis), [p], p.dtype, out))


def _in_type(rw: Rewriter, value: Value, element: DType) -> Value:
    """Codes, or their zero points, in a wider type of the same sign."""
    shape = value.tensor.static_shape or ()
    return once(rw, value, str(element), lambda p: computed(str(element), lambda q: q.array(), [p], element, shape))


@rule(*PRODUCTS)
def lift_bfloat(op: Op, rw: Rewriter) -> Value:
    """x bf16 @ q.dequantize(w) bf16  ->  cast(cast(x) @ q.dequantize(w) f32)   where kernels take f32 alone"""
    lin = _linear(rw)
    dq = rw.expect(lin.weight, "q.dequantize")
    scale = dq.operand(1)
    if rw.target is None or scale is None or scale.tensor.dtype != BF16 or lin.x.tensor.dtype != BF16:
        raise rw.declined("it is not bf16", quiet=True)
    served = {a for row in rw.target.rows_for("q.linear") for a in row.activations}
    if "bf16" in served or not scale.is_const or (lin.bias is not None and not lin.bias.is_const):
        raise rw.declined("a kernel takes bf16, or its scales are no constants", quiet=True)
    wide = TensorType(F32, dq.result.tensor.shape)
    made = rw.op("q.dequantize", dq.operands[0], single(rw, scale), dq.operand(2), type=wide, **dq.attrs)
    x = rw.op("onnx.Cast", lin.x, type=TensorType(F32, lin.x.tensor.shape), to=FLOAT_CODE)
    weight = moved_again(rw, op.operands[1], dq.result, made)
    rest = [None if v is None else single(rw, v) for v in op.operands[2:]]
    y = rw.op(op.name, x, weight, *rest, type=TensorType(F32, op.result.tensor.shape), **op.attrs)
    return rw.op("onnx.Cast", y, type=op.result.type, to=BFLOAT_CODE)


# -- types and zero points ------------------------------------------------------------------------------------


def single(rw: Rewriter, value: Value) -> Value:
    """A constant of f16 or bf16 in f32; exact."""
    if value.tensor.dtype not in (F16, BF16):
        return value
    shape = value.tensor.static_shape or ()

    def make(p: Any) -> Any:
        if p.size <= 1:
            return constant(p.array().astype(np.float32), F32)
        return computed("f32", lambda q: q.array().astype(np.float32), [p], F32, shape)

    return once(rw, value, "f32", make)


@rule("onnx.Add", "onnx.Mul", "onnx.Concat")
def agree_on_zeros(op: Op, rw: Rewriter) -> Value:
    """add(q.dequantize(a, s), q.dequantize(b, t, z))  ->  add(q.dequantize(a, s, 0), q.dequantize(b, t, z))

    Kernels that join codes want them alike: all with a zero point, or none.
    """
    dqs = [None if v is None else v.owner for v in op.operands]
    if not all(d is not None and d.name == "q.dequantize" for d in dqs):
        raise rw.declined("not all of it is codes", quiet=True)
    schemes: list[Scheme] = [d.attrs["scheme"] for d in dqs if d is not None]
    if len({s.dtype for s in schemes}) > 1 or len({s.symmetric for s in schemes}) == 1:
        raise rw.declined("their codes are alike, or of other types", quiet=True)
    if any(s.granularity != "tensor" for s in schemes):
        raise rw.declined("not scaled per tensor", quiet=True)
    alike = []
    for value, dq in zip(op.operands, dqs, strict=True):
        assert dq is not None and dq.operands[1] is not None
        scheme: Scheme = dq.attrs["scheme"]
        if not scheme.symmetric:
            alike.append(value)
            continue
        zero = nought(rw, dq.operands[1], scheme.dtype, ())
        attrs = {**dq.attrs, "scheme": replace(scheme, symmetric=False, zero="int")}
        alike.append(rw.op("q.dequantize", *dq.operands[:2], zero, type=dq.result.type, **attrs))
    return rw.op(op.name, *alike, type=op.result.type, **op.attrs)


RULES = (
    plain_gemm,
    turn_left_weight,
    widen_codes,
    lift_bfloat,
    refit_weight,
)
FREE = (drop_wide_pair, free_activation, lift_bfloat, refit_weight)
"""Those that leave an activation in float, and what the weight-only product that comes of it needs."""
LAST = (agree_on_zeros,)
"""For what the others have left."""
