"""Kernels that decode floats and NF4, in the interpreter: every code against its type, products against float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from qcompiler.backends.triton import layouts_float, weight_only
from qcompiler.backends.triton.device.unpack_float import float_pair, nf4_pair, scale_values
from qcompiler.backends.triton.forms import FORMS
from qcompiler.backends.triton.tiles import Tile
from qcompiler.dtypes import dtype
from qcompiler.float_codes import table
from tests.backends.triton.weight_cases import ROUNDOFF, Wide, bound, draw

TYPES = {"nf4": "nf4", "f4e2m1": "f4e2m1", "mxfp4": "f4e2m1", "nvfp4": "f4e2m1", "f8e4m3": "f8e4m3", "f8e5m2": "f8e5m2"}
WORDS = 4096


@triton.jit
def pairs_kernel(words_ptr, y_ptr, COUNT: tl.constexpr, PAIRS: tl.constexpr, FORM: tl.constexpr, BF16: tl.constexpr):
    at = tl.arange(0, COUNT)
    words = tl.load(words_ptr + at)
    for i in tl.static_range(PAIRS):
        tl.store(y_ptr + i * COUNT + at, float_pair(words, i, FORM, BF16))


@triton.jit
def planes_kernel(words_ptr, y_ptr, COUNT: tl.constexpr, BF16: tl.constexpr):
    at = tl.arange(0, COUNT)
    words = tl.load(words_ptr + at)
    for i in tl.static_range(4):
        tl.store(y_ptr + 2 * i * COUNT + at, nf4_pair(words, i, BF16, False))
        tl.store(y_ptr + (2 * i + 1) * COUNT + at, nf4_pair(words, i, BF16, True))


@triton.jit
def scales_kernel(scales_ptr, y_ptr, FORM: tl.constexpr):
    at = tl.arange(0, 256)
    tl.store(y_ptr + at, scale_values(tl.load(scales_ptr + at), FORM))


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("form", TYPES)
def test_every_code_in_every_place_has_its_value(form: str, bf16: bool) -> None:
    bits, short = FORMS[form].bits, ml_dtypes.bfloat16 if bf16 else np.float16
    natural = np.random.default_rng(0).integers(0, 1 << 32, WORDS, dtype=np.uint32)
    words = torch.from_numpy(layouts_float.arrange(natural, form).view(np.int32))
    pairs = 16 // bits
    out = torch.zeros((pairs, WORDS), dtype=torch.int32)
    pairs_kernel[(1,)](words, out, WORDS, pairs, form, bf16)
    found = out.numpy().view(np.uint16).view(short).reshape(pairs, WORDS, 2).astype(np.float64)
    values = table(dtype(TYPES[form]))
    if form == "nf4":
        values = values.astype(np.float32).astype(short).astype(np.float64)
    seen = set()
    for pair in range(pairs):
        for half in range(2):
            codes = (natural >> np.uint32(16 * half + bits * pair)) & np.uint32((1 << bits) - 1)
            known = ~np.isnan(values[codes])
            np.testing.assert_array_equal(found[pair, known, half], values[codes][known])
            seen |= {(pair, half, int(c)) for c in codes}
    assert len(seen) == 2 * pairs << bits


@pytest.mark.parametrize("bf16", [True, False])
def test_lookups_of_bytes_give_the_same_nf4(bf16: bool) -> None:
    words = torch.from_numpy(np.random.default_rng(1).integers(0, 1 << 32, WORDS, dtype=np.uint32).view(np.int32))
    out = torch.zeros((4, 2, WORDS), dtype=torch.int32)
    planes_kernel[(1,)](words, out, WORDS, bf16)
    assert torch.equal(out[:, 0], out[:, 1])


def test_scales_of_one_byte() -> None:
    raw, out = torch.arange(256).to(torch.uint8), torch.zeros(256)
    scales_kernel[(1,)](raw, out, "mxfp4")
    np.testing.assert_array_equal(out.numpy()[:255], np.ldexp(1.0, np.arange(255) - 127).astype(np.float32))
    scales_kernel[(1,)](raw, out, "nvfp4")
    codes = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(out.numpy()[:127], codes.astype(np.float32))


def check(form: str, group: int, element: torch.dtype, m: int, n: int, k: int, tile: Tile, scale: torch.dtype) -> None:
    weight = draw(form, n, k, group, scale=scale, seed=m + n + k)
    x = torch.randn((m, k), generator=torch.Generator().manual_seed(m)).to(element)
    used = torch.bfloat16 if element == torch.float32 else element
    rounded: Wide = x.to(used).double().numpy()
    y = weight_only.linear_cuda(x, *weight.operands, None, None, None, n, group, form, "none", tile)  # type: ignore[arg-type]
    scaled = group != 0 and not (group >= 128 and tile.bm <= weight_only.LATE)
    wanted = rounded @ weight.values.T
    allowed = bound(weight, rounded, used, scaled=scaled)
    allowed += ROUNDOFF[element] * (np.abs(wanted) + allowed)
    assert y.dtype == element
    assert y.shape == (m, n)
    worst = float((np.abs(y.double().numpy() - wanted) / allowed).max())
    assert worst <= 1, (form, group, element, m, n, k, worst)


DECODE, SPLIT, WIDE = Tile(16, 64, 128, 4, 1), Tile(16, 64, 128, 4, 1, 3), Tile(128, 128, 128, 8, 2)

CASES = [
    ("nf4", 64, torch.bfloat16, 1, 70, 200, DECODE, torch.float32),
    ("nf4", 64, torch.float16, 3, 130, 384, SPLIT, torch.float16),
    ("nf4", 128, torch.float16, 1, 64, 256, DECODE, torch.float16),
    ("nf4", 0, torch.bfloat16, 2, 64, 130, DECODE, torch.bfloat16),
    ("nf4", 32, torch.float32, 70, 70, 300, WIDE, torch.float32),
    ("f4e2m1", 64, torch.bfloat16, 1, 70, 200, DECODE, torch.bfloat16),
    ("f4e2m1", 128, torch.bfloat16, 5, 70, 500, SPLIT, torch.float32),
    ("f4e2m1", 256, torch.float16, 33, 64, 520, WIDE, torch.float16),
    ("f4e2m1", 0, torch.float16, 1, 65, 128, DECODE, torch.float16),
    ("mxfp4", 32, torch.bfloat16, 1, 70, 200, DECODE, torch.float32),
    ("mxfp4", 32, torch.float16, 17, 64, 288, WIDE, torch.float32),
    ("mxfp4", 32, torch.float32, 4, 64, 512, SPLIT, torch.float32),
    ("nvfp4", 16, torch.bfloat16, 1, 70, 200, DECODE, torch.float32),
    ("nvfp4", 16, torch.float16, 17, 130, 144, WIDE, torch.float32),
    ("nvfp4", 16, torch.bfloat16, 16, 64, 520, SPLIT, torch.float32),
    ("f8e4m3", 0, torch.bfloat16, 1, 70, 200, DECODE, torch.float32),
    ("f8e4m3", 0, torch.float16, 40, 64, 300, WIDE, torch.float32),
    ("f8e4m3", 128, torch.bfloat16, 2, 64, 400, SPLIT, torch.float32),
    ("f8e4m3", 128, torch.bfloat16, 130, 64, 260, WIDE, torch.float32),
    ("f8e5m2", 0, torch.float16, 1, 70, 200, DECODE, torch.float16),
    ("f8e5m2", 0, torch.bfloat16, 20, 64, 256, WIDE, torch.bfloat16),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-g{c[1]}-{str(c[2])[6:]}-{c[3]}x{c[4]}x{c[5]}")
def test_products_agree_with_float64(
    case: tuple[str, int, torch.dtype, int, int, int, Tile, torch.dtype],
) -> None:
    check(*case)
