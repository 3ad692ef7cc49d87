"""What follows a product, on f32 sums: bias, activation, a factor, a summand; and the sum of partial sums before it."""

import triton
import triton.language as tl


@triton.jit
def activation(value, ACT: tl.constexpr):
    """``relu``, ``silu``, ``gelu`` (by erf), ``gelu_tanh``, or ``none``, in f32."""
    if ACT == "relu":
        return tl.maximum(value, 0.0)
    elif ACT == "silu":
        return value * tl.sigmoid(value)
    elif ACT == "gelu":
        return 0.5 * value * (1.0 + tl.math.erf(value * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # (1 + tanh u) / 2 = sigmoid 2u, with u = sqrt(2 / pi) (v + 0.044715 v^3)
        return value * tl.sigmoid(1.5957691216057308 * value * (1.0 + 0.044715 * value * value))
    else:
        tl.static_assert(ACT == "none", "an unknown activation")
        return value


@triton.jit
def finish(acc, rows, columns, inside, N, bias_ptr, mul_ptr, residual_ptr, ACT: tl.constexpr):
    """``act(acc + bias) * mul + residual`` in f32; pointers are None where there is none.

    ``rows`` and ``columns`` are indices that broadcast over ``acc`` in its own orientation; ``inside`` is its mask.
    ``mul`` and ``residual`` are ``[M, N]``, contiguous.
    """
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
    acc = activation(acc, ACT)
    at = rows.to(tl.int64) * N + columns
    if mul_ptr is not None:
        acc *= tl.load(mul_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["M"])
def reduce_kernel(
    partial_ptr,
    bias_ptr,
    mul_ptr,
    residual_ptr,
    y_ptr,
    M,
    N,
    SPLIT: tl.constexpr,
    ACT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Add f32 ``partial [SPLIT, M, N]`` in order, which makes the result the same in every run, and finish it.

    Grid: ``(cdiv(N, BN), cdiv(M, BM))``.
    """
    rows = (tl.program_id(1) * BM + tl.arange(0, BM))[:, None]
    columns = (tl.program_id(0) * BN + tl.arange(0, BN))[None, :]
    inside = (rows < M) & (columns < N)
    at = rows.to(tl.int64) * N + columns
    size = tl.cast(M, tl.int64) * N
    acc = tl.zeros((BM, BN), tl.float32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(partial_ptr + part * size + at, mask=inside, other=0.0)
    acc = finish(acc, rows, columns, inside, N, bias_ptr, mul_ptr, residual_ptr, ACT)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=inside)
