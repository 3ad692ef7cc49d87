"""Products with weights that are decoded on the way to the tensor cores; they are the left operand, in registers.

One layout and one loop serve all M. What differs is where scales come in. *On the weights*: each is rounded once more
to 16 bits. *On the products*: weights are exact, and each 128 columns' sums are scaled in f32 before they are added.
*At the end*: one scale a row, on the sums.
"""

import triton
import triton.language as tl

from qcompiler.backends.triton.device.epilogue import finish
from qcompiler.backends.triton.device.unpack import bits_of, lane_columns, scale_values, weight_tile


@triton.jit
def place(block, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUPED: tl.constexpr):
    """Row and column of output tile number ``block``: ``GROUPED`` rows of tiles share columns of weights in L2."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = block // (GROUPED * columns) * GROUPED
    height = tl.minimum(rows - first, GROUPED)
    inside = block % (GROUPED * columns)
    return first + inside % height, inside // height


@triton.jit
def accumulate(
    x_ptr,
    x_rows,
    x_inside,
    x_stride,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    weight_rows,
    first,
    last,
    K,
    stride,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    LATE: tl.constexpr,
    WHOLE: tl.constexpr,
    LANES: tl.constexpr,
    ONCE: tl.constexpr,
    BF16: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SYNC: tl.constexpr = False,
):
    """f32 ``[BN, BM]``: rows ``weight_rows [BN]`` of the weights times rows ``x_rows [BM]`` of x over k-tiles
    ``first .. last``, scaled.

    ``x_inside [BM]`` masks rows of x, which lie ``x_stride`` apart; ``stride`` is N', the rows of the layout. ``LATE``:
    scales of groups of 128 and more go on the products. ``WHOLE``: K is a multiple of 128. ``ONCE``: nobody else reads
    these weights soon. ``SYNC``: products are ``mma.sync``. ``x_rows`` and ``weight_rows`` are int64 where that is
    needed.
    """
    WORDS: tl.constexpr = 4 * bits_of(FORM)
    SCALED: tl.constexpr = GROUP != 0 and not LATE
    FEW: tl.constexpr = BN == 64 or (BM >= 64 and not SYNC)
    # Sums of a k-tile are added apart wherever ptxas (12.8, 12.9) otherwise waits after each wgmma (C7515).
    APART: tl.constexpr = not SYNC and (BM <= 64 or (BM <= 128 and (WORDS == 32 or (GROUP != 0 and GROUP < 128))))
    word = tl.arange(0, WORDS)
    columns = lane_columns(LANES)
    acc = tl.zeros((BN, BM), tl.float32)
    codes = codes_ptr + weight_rows[:, None] * WORDS + word[None, :]
    x_at = x_ptr + x_rows[None, :] * x_stride + columns[:, None]
    for tile in range(first, last):
        step = tl.cast(tile, tl.int64) * stride * WORDS
        words = tl.load(codes + step, eviction_policy="evict_first") if ONCE else tl.load(codes + step)
        inside = x_inside[None, :]
        if not WHOLE:
            inside = inside & (tile * 128 + columns < K)[:, None]
        x = tl.load(x_at + tile * 128, mask=inside, other=0.0)
        x = x.to(tl.bfloat16) if BF16 else x.to(tl.float16)
        weights = weight_tile(
            words, scales_ptr, zeros_ptr, weight_rows, tile, stride, FORM, BN, GROUP, ZEROS, SCALED, BF16, LANES, FEW
        )
        if LATE:
            scale = tl.load(scales_ptr + (tile // (GROUP // 128)) * stride + weight_rows)
            acc += tl.dot(weights, x) * scale_values(scale, FORM)[:, None]
        elif APART:  # not acc + dot, which Triton would make one
            acc = tl.fma(tl.dot(weights, x), 1.0, acc)
        else:
            acc = tl.dot(weights, x, acc)
    if GROUP == 0:
        acc *= scale_values(tl.load(scales_ptr + weight_rows), FORM)[:, None]
    return acc


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    global_ptr,
    bias_ptr,
    mul_ptr,
    residual_ptr,
    y_ptr,
    partial_ptr,
    M,
    N,
    K,
    x_stride,
    stride,
    FORM: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    ACT: tl.constexpr,
    LATE: tl.constexpr,
    WHOLE: tl.constexpr,
    LANES: tl.constexpr,
    ONCE: tl.constexpr,
    BF16: tl.constexpr,
    SYNC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """``y [M, N] = act(x [M, K] W^T + bias) * mul + residual``; grid ``(tiles, SPLIT)``.

    With ``SPLIT`` > 1, blocks take shares of K and store f32 sums to ``partial [SPLIT, M, N]``; the rest is
    :func:`epilogue.reduce_kernel`'s. ``stride`` is N', a multiple of 64: rows of the layout beyond it are not read.
    """
    row, column = place(tl.program_id(0), M, N, BM, BN, GROUPED)
    rows = row * BM + tl.arange(0, BM)
    features = column * BN + tl.arange(0, BN)
    weight_rows = tl.minimum(features, stride - 1) if BN > 64 else features
    tiles = tl.cdiv(K, 128)
    share = tl.cdiv(tiles, SPLIT)
    first = tl.program_id(1) * share
    acc = accumulate(
        x_ptr,
        rows.to(tl.int64),
        rows < M,
        x_stride,
        codes_ptr,
        scales_ptr,
        zeros_ptr,
        weight_rows,
        first,
        tl.minimum(first + share, tiles),
        K,
        stride,
        FORM,
        GROUP,
        ZEROS,
        LATE,
        WHOLE,
        LANES,
        ONCE,
        BF16,
        BM,
        BN,
        SYNC,
    )
    if global_ptr is not None:
        acc *= tl.load(global_ptr)
    inside = (rows < M)[None, :] & (features < N)[:, None]
    at = rows.to(tl.int64)[None, :] * N + features[:, None]
    if SPLIT == 1:
        acc = finish(acc, rows[None, :], features[:, None], inside, N, bias_ptr, mul_ptr, residual_ptr, ACT)
        tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        at += tl.program_id(1).to(tl.int64) * M * N
        tl.store(partial_ptr + at, acc, mask=inside)
