"""Kernels that quantize activations, in the interpreter: against the reference of the IR, code by code."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from qcompiler import integer_numerics, numerics
from qcompiler.backends.triton import quantizing
from qcompiler.backends.triton.tiles import Tile
from qcompiler.scheme import parse_scheme

SMALL = Tile(1, 1, 256, 4, 1)
WIDE = Tile(1, 1, 1024, 4, 1)
CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
ML = {torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn, torch.float8_e5m2: ml_dtypes.float8_e5m2}


def drawn(*shape: int, element: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of magnitudes from 1e-3 to 1e2, one of zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g) * 10 ** torch.empty(*shape[:-1], 1).uniform_(-3, 2, generator=g)
    x.view(-1, shape[-1])[0] = 0.0
    return x.to(element)


def raw(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous().view(torch.uint8)


def expected_f8(x: np.ndarray, code: torch.dtype, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes' bits and scales ``[M, G]`` by the law, in float64 and NumPy's own casts."""
    largest = float(ml_dtypes.finfo(ML[code]).max)
    m, k = x.shape
    width = block or k
    padded = np.pad(x, ((0, 0), (0, -k % width))).reshape(m, -1, width)
    top = np.abs(padded).max(-1).astype(np.float64)
    scale = np.where(top == 0, 1.0, np.maximum(top / largest, 2.0**-126)).astype(np.float32)
    ratio = np.clip(padded.astype(np.float32) / scale[..., None], -largest, largest)
    return ratio.astype(ML[code]).view(np.uint8).reshape(m, -1)[:, :k], scale


@pytest.mark.parametrize("element", FLOATS)
@pytest.mark.parametrize("tile", [SMALL, WIDE])
def test_int8_rows_are_those_of_the_reference(element: torch.dtype, tile: Tile) -> None:
    scheme = parse_scheme("int8 token sym dynamic")
    for k in (1, 100, 777):
        x = drawn(3, k, element=element)
        codes, scale = quantizing.rows_cuda(x, None, None, 0.0, torch.int8, 0, tile)
        array = x.float().numpy()
        wanted, zero = integer_numerics.dynamic_params(array, scheme)
        np.testing.assert_array_equal(scale.numpy(), wanted)
        np.testing.assert_array_equal(codes.numpy(), numerics.quantize(array, wanted, zero, scheme))


@pytest.mark.parametrize("code", CODES[1:])
@pytest.mark.parametrize("block", [0, 128])
@pytest.mark.parametrize("element", FLOATS)
def test_f8_rows_and_blocks_follow_the_law(code: torch.dtype, block: int, element: torch.dtype) -> None:
    for k in (100, 384, 777):
        x = drawn(3, k, element=element, seed=k)
        codes, scale = quantizing.rows_cuda(x, None, None, 0.0, code, block, SMALL)
        wanted, scales = expected_f8(x.float().numpy(), code, block)
        np.testing.assert_array_equal(scale.numpy(), scales)
        np.testing.assert_array_equal(raw(codes).numpy(), wanted)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("element", FLOATS)
@pytest.mark.parametrize("block", [0, 128])
def test_what_is_fused_gives_the_codes_of_the_unfused(code: torch.dtype, element: torch.dtype, block: int) -> None:
    """Norm and rescale are rounded to the dtype of x in between; a sum of squares in another order may move a scale."""
    k = 300
    g = torch.Generator().manual_seed(1)
    smooth, weight = (torch.rand(k, generator=g) + 0.5 for _ in range(2))
    for tile in (SMALL, WIDE):
        for given in ((smooth, None), (None, weight), (smooth, weight)):
            x = drawn(4, k, element=element)
            codes, scale = quantizing.rows_cuda(x, *given, 1e-5, code, block, tile)
            wanted = x.double()
            if given[1] is not None:
                wanted = wanted * (wanted.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
            if given[0] is not None:
                wanted = wanted * smooth.double()
            width = block or k
            factors = scale.double().repeat_interleave(width, 1)[:, :k]
            error = (codes.double() * factors - wanted).abs()
            unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-22}[element] * 2
            step = {torch.int8: 0.5, torch.float8_e4m3fn: 2.0**-10, torch.float8_e5m2: 2.0**-17}[code] * factors
            relative = {torch.int8: 0.0, torch.float8_e4m3fn: 2.0**-4, torch.float8_e5m2: 2.0**-3}[code]
            # int8: half a step, or a whole at the positive end, which saturates at 127 of 127.5
            bound = step * 1.001 + (relative + unit) * wanted.abs() * 1.01
            assert bool((error <= bound).all())
            reference = torch.ops.qcompiler.quantize_rows(x, *given, 1e-5, code, block)
            torch.testing.assert_close(scale, reference[1], rtol=2 * unit, atol=0)


@pytest.mark.parametrize("code", CODES)
def test_static_codes_saturate(code: torch.dtype) -> None:
    x = drawn(5, 300, element=torch.bfloat16)
    x[1, :3] = torch.tensor([float("inf"), float("-inf"), 3e36])
    scale = torch.tensor(0.01)
    smooth = torch.rand(300, generator=torch.Generator().manual_seed(2)) + 0.5
    for factors in (None, smooth):
        found = quantizing.static_cuda(x, scale, factors, code, SMALL)
        wanted = torch.ops.qcompiler.quantize_static(x, scale, factors, code)
        assert torch.equal(raw(found), raw(wanted))
    if code == torch.int8:
        scheme = parse_scheme("int8 tensor sym")
        exact = numerics.quantize(x.float().numpy(), scale.numpy(), None, scheme)
        np.testing.assert_array_equal(quantizing.static_cuda(x, scale, None, code, SMALL).numpy(), exact)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("block", [0, 128])
def test_kernel_and_reference_of_the_operator_agree_on_views(code: torch.dtype, block: int) -> None:
    """Every other row, a transposed one, three dimensions."""
    x = drawn(2, 4, 140, element=torch.float16)
    for view in (x[:, ::2], x.transpose(0, 1), x[..., :5].permute(0, 2, 1), x[..., 3:]):
        found = quantizing.rows_cuda(view, None, None, 0.0, code, block, SMALL)
        wanted = torch.ops.qcompiler.quantize_rows(view, None, None, 0.0, code, block)
        assert found[0].shape == view.shape
        assert torch.equal(raw(found[0]), raw(wanted[0]))
        assert torch.equal(found[1], wanted[1])


def test_a_row_with_nan_says_so_in_its_scale() -> None:
    x = drawn(3, 200, element=torch.float32)
    x[1, 7] = float("nan")
    for tile in (SMALL, Tile(1, 1, 128, 4, 1)):
        _, scale = quantizing.rows_cuda(x, None, None, 0.0, torch.int8, 0, tile)
        assert scale.isnan().flatten().tolist() == [False, True, False]


def test_subnormal_rows_have_the_smallest_scale() -> None:
    x = torch.full((2, 128), 1e-41)
    codes, scale = quantizing.rows_cuda(x, None, None, 0.0, torch.int8, 0, SMALL)
    assert scale.flatten().tolist() == [2.0**-126, 2.0**-126]
    assert not codes.any()


def test_nothing_in_nothing_out() -> None:
    codes, scale = quantizing.rows_cuda(torch.empty(0, 64), None, None, 0.0, torch.int8, 0, SMALL)
    assert codes.shape == (0, 64)
    assert scale.shape == (0, 1)
