"""Products of codes: int8 by int8 in int32, 8-bit floats in f32, and 4-bit weights widened to the activation's codes.

Scales come in at the end where one spans K. Otherwise, and where ``PARTS`` asks for it, each 128 columns are a product
of their own, scaled and added in f32: 8-bit floats ask for it where K is long and the units do not keep all of f32.
"""

import triton
import triton.language as tl

from qcompiler.backends.triton.device.epilogue import finish
from qcompiler.backends.triton.device.weight_only import place
from qcompiler.backends.triton.device.widen import unpacked


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


@triton.jit
def added(
    acc,
    part,
    x_scale_ptr,
    scales_ptr,
    near_rows,
    near_cols,
    right,
    turn,
    K,
    scales_stride,
    SHARED: tl.constexpr,
    X_SCALE: tl.constexpr,
    W_SCALE: tl.constexpr,
    BN: tl.constexpr,
    SWAP: tl.constexpr,
):
    """``acc`` and the product of 128 columns, ``turn`` such before them, times the scales that they have of their own.

    A plain sum of both would become one sum in the tensor cores again, hence the fused product with 1.
    """
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
    if X_SCALE != 2 and W_SCALE < 2:
        return tl.fma(part, 1.0, acc)
    else:
        return acc + part


@triton.jit
def stored(
    acc,
    row,
    col,
    x_scale_ptr,
    scales_ptr,
    bias_ptr,
    mul_ptr,
    residual_ptr,
    y_ptr,
    M,
    N,
    X_SCALE: tl.constexpr,
    W_SCALE: tl.constexpr,
    SWAP: tl.constexpr,
    FINAL: tl.constexpr,
    ACT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sums over K of the tile at ``row`` and ``col``, ``acc [HEIGHT, WIDTH]``: times the scales that span K, finished,
    stored. 64 columns at a time, by halves: a wide tile and all that is loaded beside it would not fit the registers.
    """
    if WIDTH > 64:
        low, high = tl.split(tl.permute(tl.reshape(acc, (HEIGHT, 2, WIDTH // 2)), (0, 2, 1)))
        stored(
            low,
            row,
            col,
            x_scale_ptr,
            scales_ptr,
            bias_ptr,
            mul_ptr,
            residual_ptr,
            y_ptr,
            M,
            N,
            X_SCALE,
            W_SCALE,
            SWAP,
            FINAL,
            ACT,
            HEIGHT,
            WIDTH // 2,
        )
        stored(
            high,
            row + (WIDTH // 2 if SWAP else 0),
            col + (0 if SWAP else WIDTH // 2),
            x_scale_ptr,
            scales_ptr,
            bias_ptr,
            mul_ptr,
            residual_ptr,
            y_ptr,
            M,
            N,
            X_SCALE,
            W_SCALE,
            SWAP,
            FINAL,
            ACT,
            HEIGHT,
            WIDTH // 2,
        )
    else:
        rows = row + tl.arange(0, WIDTH if SWAP else HEIGHT)
        cols = col + tl.arange(0, HEIGHT if SWAP else WIDTH)
        y = acc.to(tl.float32)
        if X_SCALE == 0:
            y *= tl.load(x_scale_ptr)
        elif X_SCALE == 1:
            y *= factor(tl.load(x_scale_ptr + rows, mask=rows < M, other=0.0), True, SWAP)
        if W_SCALE == 0:
            y *= tl.load(scales_ptr).to(tl.float32)
        elif W_SCALE == 1:
            y *= factor(tl.load(scales_ptr + cols, mask=cols < N, other=0.0).to(tl.float32), False, SWAP)
        down = factor(rows, True, SWAP)
        along = factor(cols, False, SWAP)
        inside = (down < M) & (along < N)
        if FINAL:
            y = finish(y, down, along, inside, N, bias_ptr, mul_ptr, residual_ptr, ACT)
        tl.store(y_ptr + down.to(tl.int64) * N + along, y.to(y_ptr.dtype.element_ty), mask=inside)


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
            acc = added(
                acc,
                product(x, w, zeros, SWAP).to(tl.float32),
                x_scale_ptr,
                scales_ptr,
                near_rows,
                near_cols,
                right,
                turn,
                K,
                scales_stride,
                SHARED,
                X_SCALE,
                W_SCALE,
                BN,
                SWAP,
            )
        else:
            acc = product(x, w, acc, SWAP)
    if SPLIT == 1:
        target = y_ptr
    else:
        target = partial_ptr + tl.program_id(1).to(tl.int64) * M * N
    stored(
        acc,
        down * BM,
        right * BN,
        x_scale_ptr,
        scales_ptr,
        bias_ptr,
        mul_ptr,
        residual_ptr,
        target,
        M,
        N,
        X_SCALE,
        W_SCALE,
        SWAP,
        SPLIT == 1,
        ACT,
        BN if SWAP else BM,
        BM if SWAP else BN,
    )


@triton.jit(do_not_specialize=["M"])
def codes_stream_kernel(
    x_tiles,
    x_scale_ptr,
    codes_tiles,
    scales_ptr,
    bias_ptr,
    mul_ptr,
    residual_ptr,
    y_ptr,
    M,
    N,
    K,
    scales_stride,
    X_SCALE: tl.constexpr,
    W_SCALE: tl.constexpr,
    PARTS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUPED: tl.constexpr,
    ACT: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The same product for many rows: ``BLOCKS`` blocks share the tiles of y, and the unit for bulk copies loads.

    ``x_tiles`` and ``codes_tiles`` are descriptors of x ``[M, K]`` in boxes BM x BK and of 8-bit codes ``[N, K]`` in
    boxes BN x BK; what is outside comes as 0.
    """
    code = x_tiles.dtype
    total = tl.int32 if code == tl.int8 else tl.float32
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    turns = tl.cdiv(K, BK)
    for tile in tl.range(tl.program_id(0), tiles, BLOCKS, flatten=True):
        down, right = place(tile, M, N, BM, BN, GROUPED)
        rows = down * BM + tl.arange(0, BM)
        cols = right * BN + tl.arange(0, BN)
        near_rows = tl.minimum(rows, M - 1).to(tl.int64)
        near_cols = tl.minimum(cols, N - 1).to(tl.int64)
        zeros = tl.zeros((BM, BN), total)
        acc = tl.zeros((BM, BN), tl.float32 if PARTS else total)
        for turn in range(turns):
            x = x_tiles.load([down * BM, turn * BK])
            w = codes_tiles.load([right * BN, turn * BK])
            if PARTS:
                acc = added(
                    acc,
                    product(x, w, zeros, False).to(tl.float32),
                    x_scale_ptr,
                    scales_ptr,
                    near_rows,
                    near_cols,
                    right,
                    turn,
                    K,
                    scales_stride,
                    1,
                    X_SCALE,
                    W_SCALE,
                    BN,
                    False,
                )
            else:
                acc = product(x, w, acc, False)
        stored(
            acc,
            down * BM,
            right * BN,
            x_scale_ptr,
            scales_ptr,
            bias_ptr,
            mul_ptr,
            residual_ptr,
            y_ptr,
            M,
            N,
            X_SCALE,
            W_SCALE,
            False,
            True,
            ACT,
            BM,
            BN,
        )
