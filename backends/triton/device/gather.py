"""Rows of a quantized table, decoded: the same layout of weights as that of products, read where indices point."""

import triton
import triton.language as tl

from qcompiler.backends.triton.device.unpack import FLOAT_ZEROS, NO_ZEROS, bits_of, scale_values, weight_tile
from qcompiler.backends.triton.device.unpack_float import byte_scale_at, has_byte_scales


@triton.jit(do_not_specialize=["count"])
def gather_kernel(
    index_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    global_ptr,
    y_ptr,
    count,
    K,
    stride,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    BN: tl.constexpr,
):
    """``y [count, K]``: rows ``index`` of the table, one program for ``BN`` of them and 128 columns.

    Codes, less a whole zero point, become exact float16, but for those of nf4, which are rounded to it; the rest is
    f32, rounded once. ``stride`` is the number of rows of the layout; an index outside it gives NaN.
    """
    item = tl.program_id(0) * BN + tl.arange(0, BN)
    tile = tl.program_id(1)
    WORDS: tl.constexpr = 4 * bits_of(FORM)
    index = tl.load(index_ptr + item, mask=item < count, other=0).to(tl.int64)
    known = (index >= 0) & (index < stride)
    row = tl.where(known, index, 0)
    base = tile.to(tl.int64) * stride * WORDS
    words = tl.load(codes_ptr + base + row[:, None] * WORDS + tl.arange(0, WORDS)[None, :])
    INSIDE: tl.constexpr = NO_ZEROS if ZEROS == FLOAT_ZEROS else ZEROS
    codes = weight_tile(words, scales_ptr, zeros_ptr, row, tile, stride, FORM, BN, GROUP, INSIDE, False, False, False)
    feature = tile * 128 + tl.arange(0, 128)
    at = row[:, None]
    if GROUP != 0:
        at = (feature // GROUP)[None, :].to(tl.int64) * stride + at
    scale_at = at
    if has_byte_scales(FORM):
        scale_at = byte_scale_at(row[:, None], tile, stride, (tl.arange(0, 128) // GROUP)[None, :], FORM)
    scale = scale_values(tl.load(scales_ptr + scale_at), FORM)
    if global_ptr is not None:
        scale *= tl.load(global_ptr)
    values = codes.to(tl.float32)
    if ZEROS == FLOAT_ZEROS:
        values -= tl.load(zeros_ptr + at).to(tl.float32)
    y = tl.where(known[:, None], values * scale, float("nan"))
    at = y_ptr + item[:, None].to(tl.int64) * K + feature[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(item < count)[:, None] & (feature < K)[None, :])
