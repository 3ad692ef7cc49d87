"""Kernels that decode integers, in the interpreter: every code in every place, products against float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from qcompiler.backends.triton import weight_only
from qcompiler.backends.triton.device.unpack import constant_pair, integer_pair, lane_columns, offset_of, weight_tile
from qcompiler.backends.triton.forms import FORMS
from qcompiler.backends.triton.tiles import Tile
from qcompiler.scheme import ZeroKind
from tests.backends.triton.weight_cases import ROUNDOFF, Wide, bound, draw

WORDS = 4096
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@triton.jit
def pairs_kernel(words_ptr, y_ptr, COUNT: tl.constexpr, PAIRS: tl.constexpr, BITS: tl.constexpr, IN_BF16: tl.constexpr):
    at = tl.arange(0, COUNT)
    words = tl.load(words_ptr + at)
    for i in tl.static_range(PAIRS):
        tl.store(y_ptr + i * COUNT + at, integer_pair(words, i, BITS, IN_BF16))


@triton.jit
def tile_kernel(codes_ptr, scales_ptr, y_ptr, WORDS: tl.constexpr, FORM: tl.constexpr, LANES: tl.constexpr):
    rows = tl.arange(0, 64)
    words = tl.load(codes_ptr + rows[:, None] * WORDS + tl.arange(0, WORDS)[None, :])
    tile = weight_tile(words, scales_ptr, scales_ptr, rows, 0, 64, FORM, 64, 0, 0, False, False, LANES)
    tl.store(y_ptr + rows[:, None] * 128 + lane_columns(LANES)[None, :], tile)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_code_in_every_place_is_exact(bits: int, bf16: bool) -> None:
    """The value is the code and an offset; in bf16 the offset of 8 bits is -128."""
    natural = np.random.default_rng(0).integers(0, 1 << 32, WORDS, dtype=np.uint32)
    pairs = 16 // bits
    out = torch.zeros((pairs, WORDS), dtype=torch.int32)
    pairs_kernel[(1,)](torch.from_numpy(natural.view(np.int32)), out, WORDS, pairs, bits, bf16)
    found = out.numpy().view(np.uint16).view(ml_dtypes.bfloat16 if bf16 else np.float16).reshape(pairs, WORDS, 2)
    seen = set()
    for pair in range(pairs):
        for half in range(2):
            codes = (natural >> np.uint32(16 * half + bits * pair)) & np.uint32((1 << bits) - 1)
            offset = (-128 if bits == 8 else 128) if bf16 else 1024
            np.testing.assert_array_equal(found[pair, :, half].astype(np.float64), codes.astype(np.float64) + offset)
            seen |= {(pair, half, int(c)) for c in codes}
    assert len(seen) == 2 * pairs << bits


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("form", [f for f, v in FORMS.items() if v.kind == "integer"])
def test_what_symmetric_codes_subtract_is_one_constant(form: str, bf16: bool) -> None:
    value = int(offset_of(FORMS[form].bits, bf16)) + FORMS[form].shift
    pair = np.array([int(constant_pair(value, bf16))], np.int64).astype(np.int32)
    halves = pair.view(np.uint16).view(ml_dtypes.bfloat16 if bf16 else np.float16)
    assert halves.astype(np.float64).tolist() == [value, value]


@pytest.mark.parametrize("lanes", [True, False])
@pytest.mark.parametrize("form", [f for f, v in FORMS.items() if v.kind == "integer"])
def test_a_tile_has_its_columns_where_they_belong(form: str, lanes: bool) -> None:
    weight = draw(form, 64, 128, 0)
    y = torch.zeros((64, 128), dtype=F16)
    tile_kernel[(1,)](weight.codes, weight.scales, y, 4 * FORMS[form].bits, form, lanes)
    np.testing.assert_array_equal(y.double().numpy() * weight.steps, weight.values)


def check(
    form: str, group: int, zero: ZeroKind, element: torch.dtype, m: int, n: int, k: int, tile: Tile, scale: torch.dtype
) -> None:
    """f32 activations come to the tensor cores in bf16: there the product is judged from the rounded ones."""
    weight = draw(form, n, k, group, zero, scale, seed=m + n + k)
    x = torch.randn((m, k), generator=torch.Generator().manual_seed(m)).to(element)
    used = BF16 if element == F32 else element
    rounded: Wide = x.to(used).double().numpy()
    y = weight_only.linear_cuda(x, *weight.operands, None, None, None, n, group, form, "none", tile)  # type: ignore[arg-type]
    scaled = group != 0 and not (group >= 128 and tile.bm <= weight_only.LATE)
    wanted = rounded @ weight.values.T
    allowed = bound(weight, rounded, used, scaled=scaled)
    allowed += ROUNDOFF[element] * (np.abs(wanted) + allowed)
    assert y.dtype == element
    assert y.shape == (m, n)
    worst = float((np.abs(y.double().numpy() - wanted) / allowed).max())
    assert worst <= 1, (form, group, zero, element, m, n, k, worst)


DECODE, SPLIT, WIDE = Tile(16, 64, 128, 4, 1), Tile(16, 64, 128, 4, 1, 3), Tile(128, 128, 128, 8, 2)
NARROW, MIDDLE = Tile(8, 32, 128, 1, 1), Tile(64, 64, 128, 4, 1)

CASES: list[tuple[str, int, ZeroKind, torch.dtype, int, int, int, Tile, torch.dtype]] = [
    ("int4", 128, "none", BF16, 1, 70, 300, DECODE, F32),
    ("int4", 128, "int", F16, 3, 130, 640, SPLIT, F16),
    ("int4", 32, "none", F16, 5, 64, 200, NARROW, F32),
    ("int4", 64, "float", BF16, 17, 100, 260, MIDDLE, BF16),
    ("int4", 0, "int", F32, 2, 65, 129, DECODE, F32),
    ("int4", 256, "none", BF16, 130, 130, 500, WIDE, F32),
    ("uint4", 128, "int", BF16, 16, 70, 384, DECODE, BF16),
    ("uint4", 128, "float", F16, 1, 96, 384, SPLIT, F16),
    ("uint4", 32, "float", F32, 4, 64, 160, NARROW, F32),
    ("uint4", 64, "int", BF16, 140, 70, 256, WIDE, BF16),
    ("uint4", 0, "none", F16, 1, 64, 128, DECODE, F16),
    ("int8", 0, "none", BF16, 1, 70, 300, DECODE, F32),
    ("int8", 128, "int", BF16, 33, 64, 384, MIDDLE, BF16),
    ("int8", 32, "none", F16, 2, 70, 200, SPLIT, F16),
    ("int8", 64, "float", BF16, 1, 64, 128, NARROW, F32),
    ("uint8", 0, "int", F32, 20, 130, 257, WIDE, F32),
    ("uint8", 128, "float", F16, 3, 64, 256, DECODE, F32),
    ("uint8", 32, "int", BF16, 7, 64, 256, DECODE, F16),
    ("int2", 64, "none", BF16, 1, 70, 300, DECODE, F32),
    ("int2", 32, "int", F16, 18, 64, 256, MIDDLE, F16),
    ("int2", 0, "none", F16, 1, 70, 128, NARROW, F16),
    ("uint2", 128, "int", BF16, 2, 64, 384, SPLIT, BF16),
    ("uint2", 32, "float", BF16, 1, 66, 190, DECODE, F32),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]}-g{c[1]}-{c[2]}-{str(c[3])[6:]}-{c[4]}x{c[5]}x{c[6]}")
def test_products_agree_with_float64(
    case: tuple[str, int, ZeroKind, torch.dtype, int, int, int, Tile, torch.dtype],
) -> None:
    check(*case)


@pytest.mark.parametrize("form", ["int4", "uint8", "int2"])
def test_columns_in_the_order_of_lanes_give_the_same(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that Triton before 3.9 wants on ``mma.sync``."""
    monkeypatch.setattr(weight_only, "four_columns", lambda sm, tile: True)
    check(form, 64, "int", F16, 3, 70, 300, NARROW, F16)


ACTS = {
    "none": lambda v: v,
    "relu": lambda v: np.maximum(v, 0),
    "silu": lambda v: v / (1 + np.exp(-v)),
    "gelu": lambda v: torch.nn.functional.gelu(torch.from_numpy(v)).numpy(),
    "gelu_tanh": lambda v: torch.nn.functional.gelu(torch.from_numpy(v), approximate="tanh").numpy(),
}


@pytest.mark.parametrize("tile", [DECODE, SPLIT, MIDDLE], ids=["whole", "split", "wide"])
@pytest.mark.parametrize("act", ACTS)
def test_what_follows_the_product(act: str, tile: Tile) -> None:
    """``act(sums + bias) * mul + residual``, with x, factor and summand as views that are not contiguous."""
    n, k, m = 70, 260, 3
    weight = draw("int4", n, k, 0)
    g = torch.Generator().manual_seed(0)
    x = torch.randn((2, k, m), generator=g).transpose(1, 2)
    bias, mul, residual = (torch.randn(s, generator=g) for s in ((n,), (2, 1, n), (n, m)))
    residual = residual.T
    y = weight_only.linear_cuda(x, *weight.operands, bias, mul, residual, n, 0, "int4", act, tile)  # type: ignore[arg-type]
    rounded = x.bfloat16().double().numpy()
    sums = rounded @ weight.values.T + bias.double().numpy()
    wanted = ACTS[act](sums) * mul.double().numpy() + residual.double().numpy()
    # The sums are off by their bound; activations have slopes of at most 1.13 and are computed in f32.
    off = bound(weight, rounded.reshape(-1, k), BF16, scaled=False).reshape(2, m, n)
    allowed = 1.2 * off * np.abs(mul.double().numpy()) + 2.0**-20 * (1 + np.abs(wanted) + np.abs(sums))
    assert y.shape == (2, m, n)
    assert (np.abs(y.double().numpy() - wanted) <= allowed).all()


@pytest.mark.parametrize("m", [0, 1, 17])
def test_any_number_of_rows(m: int) -> None:
    weight = draw("int4", 64, 128, 128)
    x = torch.zeros((m, 128), dtype=F16)
    assert weight_only.linear_cuda(x, *weight.operands, None, None, None, 64, 128, "int4", "none", DECODE).shape == (  # type: ignore[arg-type]
        m,
        64,
    )


def test_a_split_beyond_the_tiles_of_k_is_cut_to_them() -> None:
    check("int4", 128, "none", F16, 1, 64, 256, Tile(16, 64, 128, 4, 1, 8), F16)
