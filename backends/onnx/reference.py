"""What ONNX Runtime's low-bit nodes should compute, in float64, and how far off a sound kernel may be.

The bound is not a tolerance picked by hand. A kernel that quantizes its activation to int8 in blocks rounds each
element by a uniform error of at most half a step, ``step = max|block| / 127``; the error of an output is the sum of
those times the weights, with variance ``sum(step^2 / 12 * w^2)`` for independent errors, and ten standard deviations
are allowed. To that come the rounding errors of f32 sums (``K`` of them) and of the result's type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler.backends.onnx.nodes import DEFAULT, MS, LowBit
from qcompiler.dtypes import Array, unpack_bits
from qcompiler.integer_numerics import convolve

SIGMAS = 10.0
EPS32, EPS16 = 2.0**-24, 2.0**-11


@dataclass(frozen=True)
class Expected:
    """The float64 result, and the largest error that a sound kernel makes, element by element."""

    value: Array
    bound: Array


def expected(node: LowBit, operands: Sequence[Array | None], n: int) -> Expected | None:
    """The result of ``node`` (of ``n`` output rows) on ``operands``; None where no reference is written."""
    a = [None if o is None else np.asarray(o) for o in operands] + [None] * 10
    match node.op.name:
        case "com.microsoft.MatMulNBits":
            return _nbits(node, a, n)
        case "com.microsoft.GatherBlockQuantized":
            return _table(node, a, n)
        case "com.microsoft.MatMulIntegerToFloat":
            return _float_result(node, a[0], a[1], a[2], a[3], a[4], a[5], a[6])
        case "com.microsoft.DynamicQuantizeMatMul":
            return _dynamic(node, a)
        case "com.microsoft.QGemm":
            return _gemm(node, a)
        case "onnx.QLinearMatMul":
            return _codes_result(node, a)
        case "onnx.MatMulInteger":
            return _integers(a)
        case "onnx.QLinearConv" | "com.microsoft.QLinearConv":
            return _conv(node, a)
        case "onnx.ConvInteger":
            value = convolve(f64(a[0]) - _zero(a[2]), f64(a[1]) - _zero(a[3]), None, node.op.attrs)
            return Expected(value, np.zeros_like(value))
    return None


def f64(array: Array | None) -> Array:
    assert array is not None
    return array.astype(np.float64)


def _unpacked(raw: Array, bits: int, rows: int, columns: int) -> Array:
    """Codes ``[rows, columns]`` of packed uint8 rows, unsigned."""
    flat = np.ascontiguousarray(raw).reshape(rows, -1)
    codes = unpack_bits(flat, bits, flat.size * 8 // bits, signed=False).reshape(rows, -1)
    return codes[:, :columns]


def nbits_weight(node: LowBit, a: Sequence[Array | None], n: int) -> Array:
    """The float64 weight ``[n, K]`` of a MatMulNBits."""
    assert node.block is not None and a[1] is not None and a[2] is not None
    k, block, bits = node.k, node.block, node.bits
    groups = -(-k // block)
    codes = f64(_unpacked(a[1], bits, n, groups * block)[:, :k])
    index = np.arange(k) // block if a[4] is None else a[4][:k].astype(np.int64)
    scales = f64(a[2]).reshape(n, groups)[:, index]
    if a[3] is None:
        return (codes - (1 << (bits - 1))) * scales
    if a[3].dtype.kind == "f":
        zeros = f64(a[3]).reshape(n, groups)
    else:
        zeros = f64(_unpacked(a[3].reshape(n, -1), bits, n, groups))
    return (codes - zeros[:, index]) * scales


def _nbits(node: LowBit, a: Sequence[Array | None], n: int) -> Expected:
    x, w = f64(a[0]).reshape(-1, node.k), nbits_weight(node, a, n)
    value = x @ w.T + (0.0 if a[5] is None else f64(a[5]))
    bound = _sums(x, w.T, node.k)
    if node.accuracy == 4:
        bound = bound + SIGMAS * np.sqrt(_noise(x, w, node.block or node.k))
    return Expected(value, _rounded(bound, value, a[0]))


def _noise(x: Array, w: Array, block: int) -> Array:
    """Variance ``[M, N]`` of the outputs when ``x`` is rounded to int8 in blocks of K."""
    m, k = x.shape
    pad = -k % block
    xs = np.pad(x, ((0, 0), (0, pad))).reshape(m, -1, block)
    ws = np.pad(w, ((0, 0), (0, pad))).reshape(len(w), -1, block)
    steps = (np.abs(xs).max(axis=2) / 127) ** 2 / 12
    return np.asarray(steps @ (ws**2).sum(axis=2).T)


def _sums(x: Array, w: Array, k: int) -> Array:
    """The worst rounding of a sum of ``k`` f32 products, and of the f32 weights themselves."""
    return (k + 4) * EPS32 * (np.abs(x) @ np.abs(w)) + 1e-30


def _rounded(bound: Array, value: Array, like: Array | None) -> Array:
    """Add what storing the result in the activation's type rounds."""
    half = like is not None and like.dtype == np.float16
    return bound + (4 * EPS16 if half else 4 * EPS32) * np.abs(value)


def _table(node: LowBit, a: Sequence[Array | None], n: int) -> Expected | None:
    table, indices, scales = a[0], a[1], a[2]
    axis = node.op.attrs.get("quantize_axis", 1)
    if (
        table is None
        or indices is None
        or scales is None
        or node.attr("gather_axis", 0) != 0
        or table.dtype.kind not in "iu"
    ):
        return None
    unsigned_bytes = table.dtype == np.uint8 and node.codes is not None and str(node.codes.tensor.dtype) == "uint8"
    width = scales.shape[axis] * (node.block or 1)
    if unsigned_bytes:
        rows = table.reshape(-1, table.shape[-1])
        codes = _unpacked(rows, node.bits, len(rows), rows.shape[1] * 8 // node.bits).reshape(*table.shape[:-1], -1)
    else:
        codes = table
    default = 1 << (node.bits - 1) if unsigned_bytes else 0
    s, z = f64(scales), np.full(scales.shape, float(default))
    if a[3] is not None:
        packed = a[3]
        if unsigned_bytes:
            flat = packed.reshape(-1, packed.shape[-1])
            z = f64(_unpacked(flat, node.bits, len(flat), scales.shape[-1]).reshape(scales.shape))
        else:
            z = f64(packed)
    if codes.ndim != s.ndim or axis % codes.ndim != codes.ndim - 1 or width < codes.shape[-1]:
        return None
    wide = np.repeat(np.stack([s, z]), node.block or 1, axis=-1)[..., : codes.shape[-1]]
    rows = (codes - wide[1]) * wide[0]
    inside = (indices >= -len(rows)) & (indices < len(rows))  # the kernel gives zeros for an index outside
    value = np.where(inside[(..., *[None] * (rows.ndim - 1))], rows[np.where(inside, indices, 0)], 0.0)
    return Expected(value, _rounded(np.full(value.shape, 1e-30), value, scales))


def _zero(array: Array | None) -> Array | float:
    return 0.0 if array is None else f64(array)


def _blocked(small: Array | None, codes: Array | None) -> Array | float:
    """Scales or zeros in blocks along K, at the shape of the codes."""
    if small is None or codes is None or small.ndim < 2:
        return _zero(small)
    return np.repeat(f64(small), -(-codes.shape[0] // small.shape[0]), axis=0)[: codes.shape[0]]


def _product(a: Array | None, az: Array | None, b: Array | None, bz: Array | None) -> Array:
    """``(A - az) @ (B - bz)`` of codes, exact: sums stay far below 2^53."""
    return np.asarray((f64(a) - _zero(az)) @ (f64(b) - _zero(bz)))


def _float_result(
    node: LowBit,
    a: Array | None,
    b: Array | None,
    sa: Array | None,
    sb: Array | None,
    za: Array | None,
    zb: Array | None,
    bias: Array | None,
) -> Expected:
    if sb is not None and sb.ndim > 1 and sb.size > 1:  # blocks along K, which the kernel does not know
        value = ((f64(a) - _zero(za)) * f64(sa)) @ ((f64(b) - _blocked(zb, b)) * _blocked(sb, b)) + _zero(bias)
    else:
        value = _product(a, za, b, zb) * (f64(sa) * f64(sb)) + _zero(bias)
    return Expected(value, 8 * EPS32 * (np.abs(value) + np.abs(_zero(bias))) + 1e-6 * np.abs(value) + 1e-30)


def _dynamic(node: LowBit, a: Sequence[Array | None]) -> Expected:
    """A is quantized to uint8 over its own range; half a step more or less at a tie is no fault."""
    x = f64(a[0])
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    step = (high - low) / 255 or 1.0
    zero = np.clip(np.round(-low / step), 0, 255)
    codes = np.clip(np.round(x / step) + zero, 0, 255)
    w = (f64(a[1]) - _blocked(a[3], a[1])) * _blocked(a[2], a[1])
    value = ((codes - zero) * step) @ w + _zero(a[4])
    ties = np.abs(np.abs(x / step - np.round(x / step)) - 0.5) < 1e-4
    slack = (ties * step) @ np.abs(w)
    return Expected(value, slack + 1e-4 * (np.abs(x) @ np.abs(w)) / np.sqrt(len(w)) + 1e-30)


def _gemm(node: LowBit, a: Sequence[Array | None]) -> Expected | None:
    if node.op.attrs.get("transA", 0) or a[0] is None or a[3] is None:
        return None
    b = a[3].T if node.op.attrs.get("transB", 0) else a[3]
    alpha = float(node.op.attrs.get("alpha", 1.0))
    scale = f64(a[1]) * f64(a[4]) * alpha
    value = (_product(a[0], a[2], b, a[5]) + _zero(a[6])) * scale
    if a[7] is None:
        return Expected(value, 1e-5 * np.abs(value) + 1e-30)
    return _requantized(value, a[7], a[8], a[0])


def _codes_result(node: LowBit, a: Sequence[Array | None]) -> Expected:
    w = (f64(a[3]) - _blocked(a[5], a[3])) * _blocked(a[4], a[3])
    value = ((f64(a[0]) - _zero(a[2])) @ w) * f64(a[1])
    return _requantized(value, a[6], a[7], a[7])


def _conv(node: LowBit, a: Sequence[Array | None]) -> Expected:
    """Scales of the weight are one or one a channel; the int32 bias counts in steps of x scale times w scale."""
    last = bool(node.attr("channels_last", 0))
    x = (f64(a[0]) - _zero(a[2])) * f64(a[1])
    column = (-1, *[1] * (x.ndim - 1))
    w = (f64(a[3]) - np.reshape(_zero(a[5]), column)) * f64(a[4]).reshape(column)
    bias = None if a[8] is None else f64(a[8]) * f64(a[1]) * f64(a[4])
    value = convolve(np.moveaxis(x, -1, 1) if last else x, w, bias, node.op.attrs)
    return _requantized(np.moveaxis(value, 1, -1) if last else value, a[6], a[7], a[0])


def _requantized(value: Array, scale: Array | None, zero: Array | None, like: Array | None) -> Expected:
    info = np.iinfo(np.uint8 if like is None or like.dtype == np.uint8 else np.int8)
    codes = np.clip(np.round(value / f64(scale)) + _zero(zero), info.min, info.max)
    return Expected(codes, np.ones_like(codes))


def _integers(a: Sequence[Array | None]) -> Expected:
    value = _product(a[0], a[2], a[1], a[3])
    return Expected(value, np.zeros_like(value))


KNOWN = frozenset(
    MS + n for n in ("MatMulNBits", "GatherBlockQuantized", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
) | {
    MS + "QGemm",
    MS + "QLinearConv",
    DEFAULT + "QLinearMatMul",
    DEFAULT + "MatMulInteger",
    DEFAULT + "QLinearConv",
    DEFAULT + "ConvInteger",
}
"""Ops whose result is known here."""
