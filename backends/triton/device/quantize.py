"""Kernels that quantize activations: dynamic per token or per 128 columns, and static, with what comes just before."""

import triton
import triton.language as tl

ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float of up to 2^22 added to it is rounded to an integer, ties to even, in the lowest bits."""
SMALLEST = tl.constexpr(1.1754943508222875e-38)
"""The smallest normal f32: scales are never below it."""


@triton.jit
def to_codes(x, scale, code: tl.constexpr, LARGEST: tl.constexpr, BOUNDED: tl.constexpr):
    """``x / scale`` as codes: rounded to nearest in f32, saturated, rounded to nearest, ties to even.

    ``scale`` broadcasts. The quotient is x times the reciprocal, corrected by its remainder (Markstein, "Computation of
    elementary functions on the IBM RISC System/6000 processor", 1990): a third of the instructions of a division. What
    is too large for the correction saturates anyway. ``BOUNDED``: no x is over the largest code and a half, times its
    scale. NaN has the code of some number.
    """
    by = tl.zeros_like(x) + scale
    inverse = tl.zeros_like(x) + tl.div_rn(tl.zeros_like(scale) + 1.0, scale)
    rough = x * inverse
    ratio = tl.fma(tl.fma(-rough, by, x), inverse, rough)
    if not BOUNDED:
        ratio = tl.where(tl.abs(rough) < 131072.0, ratio, rough)
    if code == tl.int8:
        bounded = tl.minimum(ratio, 127.0)
        if not BOUNDED:
            bounded = tl.maximum(bounded, -128.0)
        return (bounded + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
    elif BOUNDED:
        return ratio.to(code)
    else:
        return tl.minimum(tl.maximum(ratio, -LARGEST), LARGEST).to(code)


@triton.jit
def magnitudes(x):
    """Bits of |x|, int32: as integers they are in the order of the floats, with NaN above all."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def scale_of(bits, DIVISOR: tl.constexpr):
    """The scale of values whose largest magnitude has these bits: 1 for zeros, NaN for NaN."""
    largest = bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, tl.zeros_like(largest) + DIVISOR)
    return tl.where(bits == 0, 1.0, tl.where(scale < SMALLEST, SMALLEST, scale))


@triton.jit
def columns(x_ptr, row, cols, K):
    """Columns of a row, 0 outside; in the dtype of x."""
    return tl.load(x_ptr + row + cols, mask=cols < K, other=0.0)


@triton.jit
def prepared(x, cols, K, rms, norm_ptr, smooth_ptr, HAS_NORM: tl.constexpr, HAS_SMOOTH: tl.constexpr):
    """Columns as the quantizer sees them, f32: normed and rescaled, each rounded to the dtype of x."""
    y = x.to(tl.float32)
    if HAS_NORM:
        y = (y * rms * tl.load(norm_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)).to(x.dtype).to(tl.float32)
    if HAS_SMOOTH:
        y = (y * tl.load(smooth_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)).to(x.dtype).to(tl.float32)
    return y


@triton.jit
def inverse_rms(squares, K, eps):
    """1 / sqrt(mean of squares + eps)."""
    mean = tl.sum(squares, 0) / K + eps
    return tl.div_rn(tl.full((), 1.0, tl.float32), tl.sqrt_rn(mean))


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    smooth_ptr,
    norm_ptr,
    y_ptr,
    scale_ptr,
    K,
    stride,
    eps,
    DIVISOR: tl.constexpr,
    LARGEST: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """One row with one scale: ``WIDTH`` columns at a time, read once where they are the ``WHOLE`` row."""
    code = y_ptr.dtype.element_ty
    index = tl.program_id(0).to(tl.int64)
    row = index * stride
    lanes = tl.arange(0, WIDTH)
    if WHOLE:
        raw = columns(x_ptr, row, lanes, K)
        rms = 1.0
        if HAS_NORM:
            rms = inverse_rms(raw.to(tl.float32) * raw.to(tl.float32), K, eps)
        x = prepared(raw, lanes, K, rms, norm_ptr, smooth_ptr, HAS_NORM, HAS_SMOOTH)
        scale = scale_of(tl.max(magnitudes(x), 0), DIVISOR)
        tl.store(scale_ptr + index, scale)
        tl.store(y_ptr + index * K + lanes, to_codes(x, scale, code, LARGEST, True), mask=lanes < K)
    else:
        rms = 1.0
        if HAS_NORM:
            squares = tl.zeros((WIDTH,), tl.float32)
            for start in range(0, K, WIDTH):
                part = columns(x_ptr, row, start + lanes, K).to(tl.float32)
                squares += part * part
            rms = inverse_rms(squares, K, eps)
        largest = tl.zeros((WIDTH,), tl.int32)
        for start in range(0, K, WIDTH):
            raw = columns(x_ptr, row, start + lanes, K)
            x = prepared(raw, start + lanes, K, rms, norm_ptr, smooth_ptr, HAS_NORM, HAS_SMOOTH)
            largest = tl.maximum(largest, magnitudes(x))
        scale = scale_of(tl.max(largest, 0), DIVISOR)
        tl.store(scale_ptr + index, scale)
        for start in range(0, K, WIDTH):
            cols = start + lanes
            x = prepared(columns(x_ptr, row, cols, K), cols, K, rms, norm_ptr, smooth_ptr, HAS_NORM, HAS_SMOOTH)
            tl.store(y_ptr + index * K + cols, to_codes(x, scale, code, LARGEST, True), mask=cols < K)


@triton.jit
def quantize_blocks_kernel(
    x_ptr,
    smooth_ptr,
    norm_ptr,
    y_ptr,
    scale_ptr,
    K,
    stride,
    eps,
    DIVISOR: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """One row with a scale for each ``BLOCK`` columns, ``WIDTH`` columns at a time."""
    code = y_ptr.dtype.element_ty
    index = tl.program_id(0).to(tl.int64)
    row = index * stride
    lanes = tl.arange(0, WIDTH)
    rms = 1.0
    if HAS_NORM:
        squares = tl.zeros((WIDTH,), tl.float32)
        for start in range(0, K, WIDTH):
            part = columns(x_ptr, row, start + lanes, K).to(tl.float32)
            squares += part * part
        rms = inverse_rms(squares, K, eps)
    blocks = tl.cdiv(K, BLOCK)
    for start in range(0, K, WIDTH):
        cols = start + lanes
        x = prepared(columns(x_ptr, row, cols, K), cols, K, rms, norm_ptr, smooth_ptr, HAS_NORM, HAS_SMOOTH)
        parts = tl.reshape(x, (WIDTH // BLOCK, BLOCK))
        scale = scale_of(tl.max(magnitudes(parts), 1), DIVISOR)
        at = start // BLOCK + tl.arange(0, WIDTH // BLOCK)
        tl.store(scale_ptr + index * blocks + at, scale, mask=at < blocks)
        codes = to_codes(parts, scale[:, None], code, LARGEST, True)
        tl.store(y_ptr + index * K + cols, tl.reshape(codes, (WIDTH,)), mask=cols < K)


@triton.jit
def quantize_static_kernel(
    x_ptr,
    scale_ptr,
    smooth_ptr,
    y_ptr,
    K,
    stride,
    LARGEST: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
):
    """``WIDTH`` columns of one row by the one scale of the tensor."""
    index = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    x = prepared(columns(x_ptr, index * stride, cols, K), cols, K, 1.0, smooth_ptr, smooth_ptr, False, HAS_SMOOTH)
    codes = to_codes(x, tl.load(scale_ptr), y_ptr.dtype.element_ty, LARGEST, False)
    tl.store(y_ptr + index * K + cols, codes, mask=cols < K)
