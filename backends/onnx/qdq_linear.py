"""MatMul and Gemm on dequantized operands: the low-bit node that ONNX Runtime makes of them, or why it makes none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompiler.backends.onnx.kernels import CPU_ROWS
from qcompiler.backends.onnx.qdq import (
    BYTES,
    DYNAMIC,
    Fusion,
    NotFused,
    Q,
    activation_of,
    behind_movement,
    block_scales,
    code_type,
    constant_array,
    dequantize_of,
    element,
    is_constant,
    need_activation,
    need_bytes,
    need_result,
    only_user,
    rank,
    shape_of,
    tail_of,
    weight_of,
)
from qcompiler.dtypes import Array
from qcompiler.ir import Op, Value

NBITS = frozenset({"int2", "uint2", "int4", "uint4", "int8", "uint8"})
CHANNEL_BLOCK = 32
"""The block size that the optimizer gives a MatMulNBits whose weight has one scale a channel or a tensor."""
BLOCKS = sorted({g for row in CPU_ROWS if row.op == "q.linear" for g in row.groups})


@dataclass(frozen=True)
class Product:
    """A MatMul or Gemm with the Add that the optimizer joins to it."""

    op: Op
    last: Op
    x: Value | None
    w: Value | None
    bias: Value | None
    gemm: bool
    covered: tuple[Op, ...]


def product(op: Op) -> Product:
    """``op`` as the optimizer sees it after it has joined MatMul and Add: two matrices, or shapes all known."""
    x, w, gemm = op.operand(0), op.operand(1), op.name == "onnx.Gemm"
    plain = Product(op, op, x, w, op.operand(2) if gemm else None, gemm, (op,))
    add = None if gemm else only_user(op.results[0])
    if add is None or add.name != "onnx.Add" or not _joined(op, x, w):
        return plain
    other = add.operand(1) if add.operand(0) is op.results[0] else add.operand(0)
    if other is None or rank(other) is None or (rank(other) or 0) > (2 if rank(x) == 2 else 1):
        return plain
    return Product(op, add, x, w, other, True, (op, add))


def _joined(op: Op, x: Value | None, w: Value | None) -> bool:
    if x is None or w is None or rank(w) != 2:
        return False
    shape = shape_of(x)
    return rank(x) == 2 or (shape is not None and all(isinstance(d, int) for d in shape))


def fuse_linear(op: Op) -> Fusion | None:
    """The node that becomes of a MatMul or Gemm; None when nothing quantized is near; raises NotFused."""
    p = product(op)
    x, w = activation_of(p.x), weight_of(p.w)
    left = weight_of(p.x)
    if x is None and w is None:
        return None
    if w is None:
        if left is not None and is_constant(left[0].operand(0)):
            raise NotFused("its weight is on the left, and the kernels take it on the right")
        return None
    if x is None:
        return weight_only(p, *w)
    return both(p, *x, *w)


# -- weight only: MatMulNBits --------------------------------------------------------------------------------


def weight_only(p: Product, dq: Op, path: tuple[Op, ...]) -> Fusion:
    """DequantizeLinear(w) -> MatMul  ->  MatMulNBits with int8 activations (accuracy_level 4)."""
    if p.gemm and p.op.name == "onnx.Gemm":
        _plain_gemm(p.op)
    if p.gemm and p.bias is not None and dequantize_of(p.bias) is None:
        _row_bias(p, dq, path)
    _alone(dq, path)
    _codes(dq)
    block = _blocks(dq, path)
    tail = tail_of(p.last)
    if tail.quantize is not None or any(u.name in Q for u in behind_movement(p.last.results[0])):
        raise NotFused("its result is quantized, and the pattern for weight-only products has no quantized result")
    return Fusion(p.op, "MatMulNBits", frozenset((*p.covered, *path)), p.last.results[0], dq, block)


def _plain_gemm(op: Op) -> None:
    for name, plain in (("transB", 0), ("transA", 0), ("alpha", 1.0), ("beta", 1.0)):
        if op.attrs.get(name, plain) != plain and not (name == "beta" and op.operand(2) is None):
            raise NotFused(f"Gemm '{op.label}' has {name}={op.attrs[name]}, and only a plain product is fused")


def _row_bias(p: Product, dq: Op, path: tuple[Op, ...]) -> None:
    codes = dq.operand(0)
    shape = None if codes is None else codes.tensor.static_shape
    n = None if shape is None else shape[0 if path else -1]
    assert p.bias is not None
    if p.bias.tensor.static_shape != (n,):
        raise NotFused(f"what is added to it has shape {p.bias.tensor.shape}, not that of a bias [{n}]")


def _alone(dq: Op, path: tuple[Op, ...]) -> None:
    """The weight, its scale and its dequantize serve this product alone."""
    value = dq.results[0]
    for step in (*reversed(path), None):
        if len(value.uses) != 1 or value.is_output:
            raise NotFused(f"'{dq.label}' is read {len(value.uses)} times, and it is fused only with one reader")
        if step is not None:
            value = step.results[0]
    for what, operand in (("codes", dq.operand(0)), ("scale", dq.operand(1))):
        if not is_constant(operand):
            raise NotFused(f"the {what} of '{dq.label}' can change at run time: no constant initializer")
        assert operand is not None
        if len(operand.uses) > 1 or (what == "scale" and _twin(operand)):
            raise NotFused(f"the {what} of '{dq.label}' serves several weights, and only one of its own is fused")
    if dq.operand(2) is not None and not is_constant(dq.operand(2)):
        raise NotFused(f"the zero point of '{dq.label}' can change at run time: no constant initializer")


def _twin(scale: Value) -> bool:
    """Another scalar constant of the same value: the optimizer makes them one."""
    if scale.payload is None or scale.payload.size != 1:
        return False
    mine = scale.payload.array().reshape(-1)[0]
    for other in scale.graph.consts.values():
        if other is scale or other.payload is None or other.payload.size != 1 or other.type != scale.type:
            continue
        if other.payload.array().reshape(-1)[0] == mine:
            return True
    return False


def _codes(dq: Op) -> None:
    kind, codes = code_type(dq), dq.operand(0)
    if kind not in NBITS:
        raise NotFused(f"'{dq.label}' has {kind or 'unknown'} codes, and MatMulNBits takes 2, 4 and 8 bits")
    if rank(codes) != 2:
        raise NotFused(f"'{dq.label}' has codes of rank {rank(codes)}, and only matrices are fused")
    if element(dq.operand(1)) not in ("f32", "f16"):
        raise NotFused(f"'{dq.label}' has {element(dq.operand(1)) or 'unknown'} scales, not f32 or f16")


def _blocks(dq: Op, path: tuple[Op, ...]) -> int:
    """The block size of the node; raises NotFused for what is not fused."""
    block, scale = dq.attrs.get("block_size", 0), dq.operand(1)
    if block:
        if path or dq.attrs.get("axis", 1) != 0:
            raise NotFused(f"'{dq.label}' has blocks along axis 1 of [N, K]; only [K, N] with axis 0 is fused")
        if block not in BLOCKS:
            raise NotFused(f"'{dq.label}' has blocks of {block}, and MatMulNBits takes {', '.join(map(str, BLOCKS))}")
        return int(block)
    if path and (len(path) > 1 or code_type(dq) not in BYTES | {"uint4"}):
        raise NotFused(f"the transpose '{path[0].label}' stands between '{dq.label}' and the product")
    if rank(scale) == 0:
        return CHANNEL_BLOCK
    codes = dq.operand(0)
    shape = None if codes is None else codes.tensor.static_shape
    axis = dq.attrs.get("axis", 1) % 2
    if shape is None or scale is None or scale.tensor.static_shape != (shape[0 if path else 1],):
        have = None if scale is None else scale.tensor.shape
        raise NotFused(f"'{dq.label}' has scales of shape {have}, not one a channel")
    if axis != (0 if path else 1):
        raise NotFused(f"'{dq.label}' has one scale a row of K (axis {axis}), not one an output channel")
    return CHANNEL_BLOCK


# -- weight and activation: QLinearMatMul and its like -------------------------------------------------------


def both(p: Product, xdq: Op, moved: bool, wdq: Op, path: tuple[Op, ...]) -> Fusion:
    """Dequantized x and w -> product  ->  QLinearMatMul, MatMulIntegerToFloat, QGemm or DynamicQuantizeMatMul."""
    need_bytes(wdq, f"the weight of '{wdq.label}'")
    need_activation(xdq, moved)
    if path and block_scales(wdq):
        raise NotFused(f"the transpose '{path[0].label}' stands between '{wdq.label}' and the product")
    maker = None if xdq.operand(0) is None else xdq.operand(0).owner  # type: ignore[union-attr]  # None is asked first
    dynamic = maker is not None and maker.name == DYNAMIC
    tail = tail_of(p.last)
    need_result(tail)
    if tail.quantize is not None and code_type(tail.quantize) != code_type(xdq):
        raise NotFused(f"its result is quantized to {code_type(tail.quantize)}, its input to {code_type(xdq)}")
    wrong = ""
    if block_scales(wdq):
        wrong = "its weight has scales in blocks, which the integer kernels read as if there were one a channel"
    if p.gemm:
        wrong = _gemm(p, xdq, wdq, dynamic, quantized=tail.quantize is not None) or wrong
        kernel = "QGemm"
    elif dynamic:
        kernel = "DynamicQuantizeMatMul"
    else:
        kernel = "QLinearMatMul" if tail.quantize is not None else "MatMulIntegerToFloat"
    covered = frozenset((*p.covered, *path, *tail.covered))
    return Fusion(p.op, kernel, covered, tail.result, wdq, None, wrong)


def _gemm(p: Product, xdq: Op, wdq: Op, dynamic: bool, *, quantized: bool) -> str:
    """Raise NotFused unless a QGemm comes of it; the text says why its numbers will be wrong, if they will."""
    if dynamic:
        raise NotFused("a product with a bias on dynamically quantized activations becomes a float Gemm")
    if wdq.operand(2) is None or xdq.operand(2) is None:
        bare = wdq if wdq.operand(2) is None else xdq
        raise NotFused(f"'{bare.label}' has no zero point input, which a QGemm needs")
    if p.op.name == "onnx.Gemm" and (p.op.attrs.get("beta", 1.0) != 1.0 or p.op.attrs.get("transA", 0)):
        raise NotFused(f"Gemm '{p.op.label}' has a beta or transA that a QGemm does not have")
    if p.bias is None:
        return ""
    dq = dequantize_of(p.bias)
    if dq is None:
        if not quantized or not is_constant(p.bias) or rank(p.bias) != 1:
            raise NotFused("its bias is float, which only a constant vector with a quantized result may be")
        return ""
    if code_type(dq) != "int32":
        raise NotFused(f"its bias has {code_type(dq)} codes, not int32")
    return (
        ""
        if bias_scale_fits(dq, xdq, wdq)
        else (
            f"the scale of its bias '{dq.label}' is not the product of the scales of '{xdq.label}' and '{wdq.label}', "
            "and the kernel takes it to be"
        )
    )


def bias_scale_fits(bias: Op, x: Op, w: Op) -> bool:
    """The int32 bias counts in steps of x scale times w scale; True where that cannot be read."""
    return scales_fit(*(constant_array(d.operand(1)) for d in (bias, x, w)))


def scales_fit(bias: Array | None, x: Array | None, w: Array | None) -> bool:
    """``bias == x * w`` up to the rounding of f32; True where one is not constant."""
    if bias is None or x is None or w is None:
        return True
    product = x.astype(np.float64).reshape(-1) * w.astype(np.float64).reshape(-1)
    return bool(np.all(np.abs(bias.astype(np.float64).reshape(-1) - product) <= 1e-3 * np.abs(product)))


def weight_shape(fusion: Fusion) -> tuple[int, int]:
    """Output features and reduction length of a fused weight; 0 where unknown."""
    found = weight_of(fusion.op.operand(1))
    codes = None if found is None else found[0].operand(0)
    shape = None if codes is None else codes.tensor.static_shape
    if found is None or shape is None or len(shape) < 2:
        return 0, 0
    if fusion.kernel == "QLinearConv":
        return shape[0], int(np.prod(shape[1:], dtype=np.int64))
    flip = bool(fusion.op.attrs.get("transB", 0)) != bool(len(found[1]) % 2)
    return (shape[-2], shape[-1]) if flip else (shape[-1], shape[-2])
