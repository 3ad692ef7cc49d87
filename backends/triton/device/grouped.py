"""Products of sorted rows with the weights of their experts; the grid does not depend on how many rows each has."""

import triton
import triton.language as tl

from qcompiler.backends.triton.device.epilogue import finish
from qcompiler.backends.triton.device.unpack import bits_of
from qcompiler.backends.triton.device.weight_only import accumulate


@triton.jit
def expert_of(offsets_ptr, tile, T, EXPERTS: tl.constexpr, PADDED: tl.constexpr, BM: tl.constexpr):
    """Expert, first row and end of the rows of tile number ``tile``, where each expert has whole tiles of ``BM`` rows.

    Rows behind those of the last expert count as an expert more, number ``EXPERTS``. Tiles behind all are empty.
    """
    number = tl.arange(0, PADDED)
    end = tl.load(offsets_ptr + number, mask=number < EXPERTS, other=T)
    start = tl.load(offsets_ptr + number - 1, mask=(number > 0) & (number <= EXPERTS), other=0)
    end = tl.minimum(tl.maximum(end, 0), T)
    start = tl.minimum(tl.maximum(start, 0), T)
    tiles = tl.where(number <= EXPERTS, tl.cdiv(tl.maximum(end - start, 0), BM), 0)
    through = tl.cumsum(tiles, 0)
    expert = tl.sum((through <= tile).to(tl.int32), 0)
    mine = number == expert
    before = tl.sum(tl.where(number < expert, tiles, 0), 0)
    first = tl.sum(tl.where(mine, start, 0), 0) + (tile - before) * BM
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit(do_not_specialize=["T"])
def grouped_kernel(
    x_ptr,
    offsets_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    global_ptr,
    bias_ptr,
    y_ptr,
    T,
    N,
    K,
    x_stride,
    stride,
    scale_rows,
    global_stride,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,  # a power of two above EXPERTS
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
):
    """``y [T, N]``: rows of expert e, which end at ``offsets[e]``, times its weight, plus its bias, activated.

    Grid: (tiles of rows, of which ``T // BM + min(EXPERTS + 1, T)`` are always enough, tiles of N). Codes are ``[E,
    ceil(K / 128), N', words]``, scales and zero points ``[E, scale_rows, N']`` with N' = ``stride``. Rows behind those
    of the last expert become 0.
    """
    expert, first, end = expert_of(offsets_ptr, tl.program_id(0), T, EXPERTS, PADDED, BM)
    WORDS: tl.constexpr = 4 * bits_of(FORM)
    rows = first + tl.arange(0, BM)
    features = tl.program_id(1) * BN + tl.arange(0, BN)
    weight_rows = tl.minimum(features, stride - 1) if BN > 64 else features
    tiles = tl.cdiv(K, 128)
    known = expert < EXPERTS
    held = tl.where(known, expert, 0).to(tl.int64)
    laid = held * scale_rows * stride
    zeros_at = zeros_ptr
    if ZEROS != 0:
        zeros_at = zeros_ptr + laid
    acc = accumulate(
        x_ptr,
        rows.to(tl.int64),
        rows < end,
        x_stride,
        codes_ptr + held * tiles * stride * WORDS,
        scales_ptr + laid,
        zeros_at,
        weight_rows,
        0,
        tl.where(known & (first < end), tiles, 0),
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
        acc *= tl.load(global_ptr + held * global_stride)
    inside = (rows < end)[None, :] & (features < N)[:, None]
    bias_at = bias_ptr
    if bias_ptr is not None:
        bias_at = bias_ptr + held * N
    acc = finish(acc, rows[None, :], features[:, None], inside, N, bias_at, None, None, ACT)
    at = rows.to(tl.int64)[None, :] * N + features[:, None]
    tl.store(y_ptr + at, tl.where(known, acc, 0.0).to(y_ptr.dtype.element_ty), mask=inside)
