"""Quantizing new tokens into a KV cache, each token of each head with a scale of its own."""

import triton
import triton.language as tl

TINY = tl.constexpr(1.1754943508222875e-38)
"""The smallest normal f32."""
ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float of up to 2^22 is rounded to an integer, ties to even, by adding and subtracting it."""


@triton.jit
def rounded(x):
    """f32 -> the nearest integers, ties to even, for |x| below 2^22; int32."""
    return ((x + ROUNDER) - ROUNDER).to(tl.int32)


@triton.jit
def e4m3_of(x):
    """f32 -> the codes of float8_e4m3fn, to nearest, ties to even, saturating; uint8. By bits, for sm_80."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(x), 448.0)
    raw = size.to(tl.int32, bitcast=True)
    normal = ((raw + 0x7FFFF + ((raw >> 20) & 1)) >> 20) - (120 << 3)
    small = rounded(size * 512.0)  # steps of 2^-9; the eighth is the smallest normal number
    return (((bits >> 24) & 0x80) | tl.where(size < 0.015625, small, normal)).to(tl.uint8)


@triton.jit
def scale_of(largest, DIVISOR: tl.constexpr):
    """f32: largest / divisor, correctly rounded; 1 for zeros, at least the smallest normal number, NaN for NaN."""
    scale = tl.div_rn(largest, largest * 0.0 + DIVISOR)
    return tl.where(largest == 0.0, 1.0, tl.where(scale < TINY, TINY, scale))


@triton.jit
def write_kernel(
    values_ptr,
    position_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    count,  # tokens to write, S
    tokens,  # T of the cache
    heads,
    values_batch,  # strides, in elements
    values_head,
    values_token,
    values_feature,
    position_batch,
    codes_batch,
    codes_head,
    codes_token,
    scale_batch,
    scale_head,
    zero_batch,
    zero_head,
    FORM: tl.constexpr,
    BYTES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Quantize up to ``BLOCK`` tokens of one head, each with its own scale, into the cache at their positions.

    Positions outside the cache are skipped. Magnitudes are compared as integers, so that NaN is the largest of all.
    """
    pid = tl.program_id(0)
    head = (pid % heads).to(tl.int64)
    batch = (pid // heads).to(tl.int64)
    step = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)
    position = tl.load(position_ptr + batch * position_batch + step, mask=step < count, other=-1)
    there = (position >= 0) & (position < tokens)
    mask = (step < count)[:, None] & (column < BYTES)[None, :]
    row = values_ptr + batch * values_batch + head * values_head + step.to(tl.int64)[:, None] * values_token
    feature = column * 2 if FORM == "int4" else column
    x = tl.load(row + (feature * values_feature)[None, :], mask=mask, other=0.0).to(tl.float32)
    bits = tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1)
    if FORM == "int4":
        odd = tl.load(row + ((feature + 1) * values_feature)[None, :], mask=mask, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, tl.max(tl.abs(odd).to(tl.int32, bitcast=True), 1))
        low = tl.minimum(tl.min(tl.minimum(x, odd), 1), 0.0)
        high = tl.maximum(tl.max(tl.maximum(x, odd), 1), 0.0)
        scale = scale_of(high - low + bits.to(tl.float32, bitcast=True) * 0.0, 15.0)
        zero = tl.minimum(tl.maximum(rounded(tl.div_rn(-low, scale)), 0), 15)
        whole = tl.broadcast_to(scale[:, None], x.shape)
        even_code = tl.minimum(tl.maximum(rounded(tl.div_rn(x, whole)) + zero[:, None], 0), 15)
        odd_code = tl.minimum(tl.maximum(rounded(tl.div_rn(odd, whole)) + zero[:, None], 0), 15)
        codes = (even_code | (odd_code << 4)).to(tl.uint8)
        tl.store(zero_ptr + batch * zero_batch + head * zero_head + position, zero.to(tl.uint8), mask=there)
    else:
        scale = scale_of(bits.to(tl.float32, bitcast=True), 448.0 if FORM == "f8e4m3" else 127.0)
        ratio = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        if FORM == "f8e4m3":
            codes = e4m3_of(ratio)
        else:
            codes = tl.minimum(tl.maximum(rounded(ratio), -127), 127).to(tl.int8)
    tl.store(scale_ptr + batch * scale_batch + head * scale_head + position, scale, mask=there)
    at = codes_ptr + batch * codes_batch + head * codes_head + position[:, None] * codes_token + column[None, :]
    tl.store(at, codes, mask=there[:, None] & (column < BYTES)[None, :])
