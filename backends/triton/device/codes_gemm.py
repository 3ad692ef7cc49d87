"""Products of codes: int8 by int8 in int32, 8-bit floats in f32, and 4-bit weights widened to the activation's codes.

Scales come in at the end where one spans K. Otherwise, and where ``PARTS`` asks for it, each 128 columns are a product
of their own, scaled and added in f32: 8-bit floats ask for it where K is long and the units do not keep all of f32.
"""

import triton
import triton.language as tl

from qcompiler.backends.triton.device.epilogue import finish
from qcompiler.backends.triton.device.weight_only import place


HIGHEST = tl.constexpr(0x80808080 - (1 << 32))
"""The highest bit of each byte of an int32."""


@triton.jit
def four_bytes(words, zero, HI: tl.constexpr):
    """Of each word the four codes ``8 HI`` columns on, minus ``zero`` (0..15), as the signed bytes of one word.

    Bytes do not borrow from each other: 128 is added to each before and taken off, by its highest bit, after.
    """
    spread = zero * 0x01010101
    return ((((words >> (4 * HI)) & 0x0F0F0F0F) | HIGHEST) - spread) ^ HIGHEST


@triton.jit
def one_float(words, zero, HI: tl.constexpr, LO: tl.constexpr, S: tl.constexpr):
    """The code at column ``8 HI + LO + 16 S`` minus ``zero``, f16: in the mantissa of 1024 a code is itself."""
    shifted = (((words >> (16 * LO + 4 * HI + 8 * S)) & 15) | 0x6400).to(tl.int16)
    return shifted.to(tl.float16, bitcast=True) - (zero + 1024).to(tl.float16)


@triton.jit
def half_word(words, zero, HI: tl.constexpr, code: tl.constexpr):
    """``[BN, 16]`` words to ``[BN, 16, s, lo]`` codes of the activation, exact."""
    if code == tl.int8:
        bytes = four_bytes(words, zero, HI)
        a = bytes.to(tl.int8)
        b = (bytes >> 8).to(tl.int8)
        c = (bytes >> 16).to(tl.int8)
        d = (bytes >> 24).to(tl.int8)
    else:
        a = one_float(words, zero, HI, 0, 0).to(code)
        b = one_float(words, zero, HI, 0, 1).to(code)
        c = one_float(words, zero, HI, 1, 0).to(code)
        d = one_float(words, zero, HI, 1, 1).to(code)
    return tl.join(tl.join(a, b), tl.join(c, d))


@triton.jit
def unpacked(words, zero, BN: tl.constexpr, code: tl.constexpr):
    """int32 fragments ``[BN, 16]`` of 4-bit codes to ``[BN, 128]`` codes of the activation; ``zero`` is ``[BN, 1]``."""
    halves = tl.join(half_word(words, zero, 0, code), half_word(words, zero, 1, code))
    split = tl.reshape(halves, (BN, 4, 4, 2, 2, 2))  # n, c, h, s, lo, hi
    return tl.reshape(tl.permute(split, (0, 2, 3, 5, 1, 4)), (BN, 128))


@triton.jit
def product(x, w, acc, SWAP: tl.constexpr):
    """``x[BM, BK] @ w[BN, BK]^T + acc``, or its transpose, in which the weights are the left operand."""
    if SWAP:
        return tl.dot(w, tl.trans(x), acc, out_dtype=acc.dtype)
    else:
        return tl.dot(x, tl.trans(w), acc, out_dtype=acc.dtype)


@triton.jit
def factor(by, ROWS: tl.constexpr, SWAP: tl.constexpr):
    """A vector along rows of x (or of w), so that it broadcasts over a product."""
    if ROWS == SWAP:
        return by[None, :]
    else:
        return by[:, None]


@triton.jit(do_not_specialize=["M"])
def codes_gemm_kernel(
    x_ptr,
    x_scale_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    mul_ptr,
    residual_ptr,
    y_ptr,
    partial_ptr,
    M,
    N,
    K,
    x_stride,
    scales_stride,
    SHARED: tl.constexpr,
    X_SCALE: tl.constexpr,
    W_SCALE: tl.constexpr,
    FOUR: tl.constexpr,
    SHIFT: tl.constexpr,
    PARTS: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUPED: tl.constexpr,
    ACT: tl.constexpr,
):
    """One tile of y; with ``SPLIT`` > 1 its scaled sum over one of so many runs of columns, into ``partial``, for
    :func:`epilogue.reduce_kernel`. Grid: ``(tiles, SPLIT)``. Pointers are None where there is nothing.

    ``X_SCALE``: of the tensor, a row, or a row and 128 columns (0, 1, 2). ``W_SCALE``: of the tensor, a row, 128 x 128,
    or a row and ``128 * SHARED`` columns (0, 1, 2, 3); ``scales_stride`` is from one row of scales to the next. With
    scales of 128 x 128, BN is at most 128.
    ``FOUR``: the codes are 4-bit fragments. ``EVEN``: K is a multiple of BK.
    """
    code = x_ptr.dtype.element_ty
    total = tl.int32 if code == tl.int8 else tl.float32
    down, right = place(tl.program_id(0), M, N, BM, BN, GROUPED)
    rows = down * BM + tl.arange(0, BM)
    cols = right * BN + tl.arange(0, BN)
    near_rows = tl.minimum(rows, M - 1).to(tl.int64)
    near_cols = tl.minimum(cols, N - 1).to(tl.int64)
    lanes = tl.arange(0, BK)
    x_at = x_ptr + near_rows[:, None] * x_stride
    turns = tl.cdiv(K, BK)
    each = tl.cdiv(turns, SPLIT)
    first = tl.program_id(1) * each
    if SWAP:
        zeros = tl.zeros((BN, BM), total)
        acc = tl.zeros((BN, BM), tl.float32 if PARTS else total)
    else:
        zeros = tl.zeros((BM, BN), total)
        acc = tl.zeros((BM, BN), tl.float32 if PARTS else total)
    if FOUR:
        slab = tl.full((), 1024, tl.int64) * tl.cdiv(N, 64)
        w_at = codes_ptr + near_cols[:, None] * 16 + tl.arange(0, 16)[None, :]
        zero = tl.full((BN, 1), SHIFT, tl.int32)
        if zeros_ptr is not None and W_SCALE == 1:
            zero = tl.load(zeros_ptr + near_cols).to(tl.int32)[:, None]
    else:
        w_at = codes_ptr + near_cols[:, None] * K
    for turn in range(first, tl.minimum(first + each, turns)):
        k = turn * BK + lanes
        if EVEN:
            x = tl.load(x_at + k[None, :])
        else:
            x = tl.load(x_at + k[None, :], mask=k[None, :] < K, other=0.0)
        if FOUR:
            if zeros_ptr is not None and W_SCALE == 3:
                zero = tl.load(zeros_ptr + (turn // SHARED) * scales_stride + near_cols).to(tl.int32)[:, None]
            w = unpacked(tl.load(w_at + turn * slab), zero, BN, code)
        elif EVEN:
            w = tl.load(w_at + k[None, :])
        else:
            w = tl.load(w_at + k[None, :], mask=k[None, :] < K, other=0.0)
        if PARTS:
            part = product(x, w, zeros, SWAP).to(tl.float32)
            if X_SCALE == 2:
                by = tl.load(x_scale_ptr + near_rows * tl.cdiv(K, 128) + turn)
                if W_SCALE == 2:
                    by *= tl.load(scales_ptr + right * BN // 128 * scales_stride + turn).to(tl.float32)
                part *= factor(by, True, SWAP)
            elif W_SCALE == 2:
                part *= tl.load(scales_ptr + right * BN // 128 * scales_stride + turn).to(tl.float32)
            if W_SCALE == 3:
                by_group = tl.load(scales_ptr + (turn // SHARED) * scales_stride + near_cols).to(tl.float32)
                part *= factor(by_group, False, SWAP)
            acc += part
        else:
            acc = product(x, w, acc, SWAP)
    y = acc.to(tl.float32)
    if X_SCALE == 0:
        y *= tl.load(x_scale_ptr)
    elif X_SCALE == 1:
        y *= factor(tl.load(x_scale_ptr + near_rows), True, SWAP)
    if W_SCALE == 0:
        y *= tl.load(scales_ptr).to(tl.float32)
    elif W_SCALE == 1:
        y *= factor(tl.load(scales_ptr + near_cols).to(tl.float32), False, SWAP)
    if SWAP:
        down_rows, along = rows[None, :], cols[:, None]
    else:
        down_rows, along = rows[:, None], cols[None, :]
    inside = (down_rows < M) & (along < N)
    at = down_rows.to(tl.int64) * N + along
    if SPLIT == 1:
        y = finish(y, down_rows, along, inside, N, bias_ptr, mul_ptr, residual_ptr, ACT)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * M * N + at, y, mask=inside)
