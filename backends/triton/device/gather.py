"""Rows of a quantized table, decoded: the same layout of weights as that of products, read where indices point."""

import triton
import triton.language as tl

from qcompiler.backends.triton.device.unpack import bits_of, scale_values, weight_tile


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

    Codes become exact float16, but for those of nf4, which are rounded to it; scales are f32, and the product is rounded
    once. ``stride`` is the number of rows of the layout; an index outside it gives NaN.
    """
    item = tl.program_id(0) * BN + tl.arange(0, BN)
    tile = tl.program_id(1)
    column = tl.arange(0, 128)
    WORDS: tl.constexpr = 4 * bits_of(FORM)
    index = tl.load(index_ptr + item, mask=item < count, other=0).to(tl.int64)
    known = (index >= 0) & (index < stride)
    row = tl.where(known, index, 0)
    base = tile.to(tl.int64) * stride * WORDS
    words = tl.load(codes_ptr + base + row[:, None] * WORDS + tl.arange(0, WORDS)[None, :])
    weights = weight_tile(words, scales_ptr, zeros_ptr, row, tile, stride, FORM, BN, GROUP, ZEROS, False, False, False)
    if GROUP == 0:
        raw = tl.load(scales_ptr + row)[:, None]
    else:
        group = (tile * 128 + column) // GROUP
        raw = tl.load(scales_ptr + group[None, :].to(tl.int64) * stride + row[:, None])
    scale = scale_values(raw, FORM)
    if global_ptr is not None:
        scale *= tl.load(global_ptr)
    y = tl.where(known[:, None], weights.to(tl.float32) * scale, float("nan"))
    feature = tile * 128 + column
    at = y_ptr + item[:, None].to(tl.int64) * K + feature[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(item < count)[:, None] & (feature < K)[None, :])
