"""What the shim makes of the interpreter, against NumPy with ml_dtypes and against torch."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

DTYPES = {"bf16": torch.bfloat16, "f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2}


@triton.jit
def cast_kernel(x_ptr, y_ptr, n, B: tl.constexpr):
    at = tl.arange(0, B)
    x = tl.load(x_ptr + at, mask=at < n)
    tl.store(y_ptr + at, x.to(y_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def arithmetic_kernel(a_ptr, b_ptr, sum_ptr, product_ptr, constant_ptr, total_ptr, B: tl.constexpr):
    at = tl.arange(0, B)
    a = tl.load(a_ptr + at)
    b = tl.load(b_ptr + at)
    tl.store(sum_ptr + at, a + b)
    tl.store(product_ptr + at, a * b)
    tl.store(constant_ptr + at, a - 136.0)
    tl.store(total_ptr, tl.sum(a.to(tl.float32), axis=0))


@triton.jit
def trick_kernel(w_ptr, y_ptr, B: tl.constexpr):
    """Nibbles to bf16 through the mantissa of 128 + q."""
    at = tl.arange(0, B)
    w = tl.load(w_ptr + at)
    y = ((w & 0xF) | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
    tl.store(y_ptr + at, y - 128.0)


@triton.jit
def product_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr):
    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    a = tl.load(a_ptr + m * K + tl.arange(0, K)[None, :])
    b = tl.load(b_ptr + tl.arange(0, K)[:, None] * N + n)
    c = tl.dot(a, b, out_dtype=OUT)
    tl.store(c_ptr + m * N + n, c)


@triton.jit
def atomic_kernel(x_ptr, y_ptr, n, B: tl.constexpr):
    at = tl.arange(0, B)
    tl.atomic_add(y_ptr + at, tl.load(x_ptr + tl.program_id(0) * B + at), mask=at < n)


@triton.jit
def scaled_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, G: tl.constexpr
):
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    half = tl.arange(0, K // 2)
    group = tl.arange(0, K // G)
    a = tl.load(a_ptr + m[:, None] * (K // 2) + half[None, :])
    b = tl.load(b_ptr + half[:, None] * N + n[None, :])
    a_scale = tl.load(a_scale_ptr + m[:, None] * (K // G) + group[None, :])
    b_scale = tl.load(b_scale_ptr + n[:, None] * (K // G) + group[None, :])
    c = tl.dot_scaled(a, a_scale, "e2m1", b, b_scale, "e2m1")
    tl.store(c_ptr + m[:, None] * N + n[None, :], c)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.uint8) if t.itemsize == 1 else t.view(torch.int16)


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
def test_casts_round_to_the_nearest_even_and_saturate(to: str, source: torch.dtype) -> None:
    n = 4000
    x = (torch.randn(n, generator=torch.Generator().manual_seed(0)) * 20).to(source)
    if to != "bf16":
        x[:4] = torch.tensor([1e4, -6e4, float("inf"), float("nan")]).to(source)
    y = torch.zeros(n, dtype=DTYPES[to])
    cast_kernel[(1,)](x, y, n, B=4096)
    limit = torch.finfo(DTYPES[to]).max
    expected = (x.float() if to == "bf16" else x.float().clamp(-limit, limit)).to(DTYPES[to])
    same = (bits(y) == bits(expected)) | (y.float().isnan() & expected.float().isnan())
    assert bool(same.all())


def test_f8_and_integers_widen_exactly() -> None:
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        x = torch.arange(256, dtype=torch.uint8).view(kind)
        y = torch.zeros(256, dtype=torch.bfloat16)
        cast_kernel[(1,)](x, y, 256, B=256)
        assert torch.equal(y.nan_to_num(), x.to(torch.bfloat16).nan_to_num())
    i = torch.arange(-128, 128, dtype=torch.int32)
    y = torch.zeros(256, dtype=torch.bfloat16)
    cast_kernel[(1,)](i, y, 256, B=256)
    assert torch.equal(y, i.to(torch.bfloat16))


def test_arithmetic_of_bf16_rounds_each_step_once() -> None:
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(256, generator=g).bfloat16() for _ in range(2))
    found = [torch.zeros(256, dtype=torch.bfloat16) for _ in range(3)]
    total = torch.zeros(1)
    arithmetic_kernel[(1,)](a, b, *found, total, B=256)
    for got, expected in zip(found, (a + b, a * b, a - 136.0), strict=True):
        assert torch.equal(got, expected)
    torch.testing.assert_close(total[0], a.float().sum(), rtol=1e-6, atol=1e-5)


def test_the_mantissa_trick_is_exact() -> None:
    w = torch.arange(0, 64, dtype=torch.int32)
    y = torch.zeros(64, dtype=torch.bfloat16)
    trick_kernel[(1,)](w, y, B=64)
    assert torch.equal(y, (w & 15).to(torch.bfloat16))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_float_products_are_exact_to_f32(kind: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(32, 64, generator=g).to(kind), torch.randn(64, 16, generator=g).to(kind)
    c = torch.zeros(32, 16)
    product_kernel[(1,)](a, b, c, M=32, N=16, K=64, OUT=tl.float32)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("k", [64, 2048])
def test_integer_products_are_exact(k: int) -> None:
    g = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-128, 128, s, generator=g, dtype=torch.int8) for s in ((16, k), (k, 16)))
    a[0], b[:, 0] = -128, -128
    c = torch.zeros(16, 16, dtype=torch.int32)
    product_kernel[(1,)](a, b, c, M=16, N=16, K=k, OUT=tl.int32)
    assert torch.equal(c.long(), a.long() @ b.long())


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_atomics_add(kind: torch.dtype) -> None:
    x = torch.randint(-8, 8, (4, 32), generator=torch.Generator().manual_seed(4)).to(kind)
    y = torch.zeros(32, dtype=kind)
    atomic_kernel[(4,)](x, y, 30, B=32)
    assert torch.equal(y[:30], x.sum(0)[:30])
    assert not y[30:].any()


@pytest.mark.parametrize(("group", "scale"), [(32, "e8m0"), (16, "e4m3")])
def test_scaled_products_read_scales_by_their_type(group: int, scale: str) -> None:
    rng = np.random.default_rng(5)
    m, n, k = 16, 32, 64
    a, b = (rng.integers(0, 16, s).astype(np.uint8) for s in ((m, k), (k, n)))
    fraction: Any = {"e8m0": ml_dtypes.float8_e8m0fnu, "e4m3": ml_dtypes.float8_e4m3fn}[scale]
    exponents = [(2.0 ** rng.integers(-3, 4, (rows, k // group))).astype(fraction) for rows in (m, n)]
    held = [torch.from_numpy(e.view(np.uint8).copy()) for e in exponents]
    if scale == "e4m3":
        held = [h.view(torch.float8_e4m3fn) for h in held]
    c = torch.zeros(m, n)
    packed_a, packed_b = a[:, 0::2] | a[:, 1::2] << 4, b[0::2] | b[1::2] << 4
    scaled_kernel[(1,)](
        torch.from_numpy(packed_a), held[0], torch.from_numpy(packed_b), held[1], c, M=m, N=n, K=k, G=group
    )
    values = [v.view(ml_dtypes.float4_e2m1fn).astype(np.float64) for v in (a, b)]
    factors = [np.repeat(e.astype(np.float64), group, axis=1) for e in exponents]
    np.testing.assert_allclose(c.numpy(), (values[0] * factors[0]) @ (values[1] * factors[1].T), rtol=1e-6)
