"""Kernels that are wrong in ways that are easily made do not pass the comparison with float64; the right one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from qcompiler.backends.triton import weight_only
from qcompiler.backends.triton.device import unpack
from qcompiler.backends.triton.tiles import Tile
from qcompiler.scheme import ZeroKind
from tests.backends.triton.interpreted.comparing import check_linear
from tests.backends.triton.weight_cases import draw

values, parameters, pairs_of = unpack._values, unpack._parameters, unpack.integer_pair


@triton.jit
def zero_after_scale(
    words, zero, rest, scale, INDEX: tl.constexpr, FORM: tl.constexpr, ZEROS: tl.constexpr, SCALED: tl.constexpr,
    BF16: tl.constexpr,
):  # fmt: skip
    """``q * s - z`` for ``(q - z) * s``."""
    none = unpack.twice(tl.zeros_like(zero).to(tl.float32) + 1024, BF16)
    pair = values(words, none, rest, scale, INDEX, FORM, ZEROS, SCALED, BF16)
    return unpack.subtract_pairs(pair, unpack.subtract_pairs(zero, none, BF16), BF16)


@triton.jit
def zeros_of_the_next_row(
    scales_ptr, zeros_ptr, rows, tile, stride, STEP: tl.constexpr, GROUP: tl.constexpr, FORM: tl.constexpr,
    ZEROS: tl.constexpr, SCALED: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Zero points are those of the neighbouring output."""
    scale, zero, rest = parameters(scales_ptr, zeros_ptr, rows, tile, stride, STEP, GROUP, FORM, ZEROS, SCALED, BF16)
    _, zero, rest = parameters(scales_ptr, zeros_ptr, rows ^ 1, tile, stride, STEP, GROUP, FORM, ZEROS, SCALED, BF16)
    return scale, zero, rest


@triton.jit
def parameters_of_the_first_group(
    scales_ptr, zeros_ptr, rows, tile, stride, STEP: tl.constexpr, GROUP: tl.constexpr, FORM: tl.constexpr,
    ZEROS: tl.constexpr, SCALED: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """The row of scales and zeros does not advance with K."""
    return parameters(scales_ptr, zeros_ptr, rows, 0, stride, STEP, GROUP, FORM, ZEROS, SCALED, BF16)


@triton.jit
def zeros_forgotten(zeros, FORM: tl.constexpr, ZEROS: tl.constexpr, BF16: tl.constexpr):
    """Zero points are taken as 0."""
    return pairs_of(zeros.to(tl.int32) * 0, 0, 4, BF16), tl.zeros_like(zeros).to(tl.int32)


@triton.jit
def nibbles_changed(words, INDEX: tl.constexpr, BITS: tl.constexpr, BF16: tl.constexpr):
    """Two neighbouring codes change places."""
    return pairs_of(words, INDEX ^ 1, BITS, BF16)


WRONG: dict[str, tuple[str, Any]] = {
    "zero after scale": ("_values", zero_after_scale),
    "zeros of the next row": ("_parameters", zeros_of_the_next_row),
    "the first group's": ("_parameters", parameters_of_the_first_group),
    "zeros forgotten": ("zero_pairs", zeros_forgotten),
    "nibbles changed": ("integer_pair", nibbles_changed),
}
TILES = {"decode": Tile(16, 64, 128, 4, 1), "prefill": Tile(128, 64, 128, 4, 2)}


def run(group: int, zero: ZeroKind, tile: Tile) -> None:
    weight = draw("uint4", 64, 512, group, zero, scale=torch.float16, seed=7)
    x = torch.randn((16, 512), generator=torch.Generator().manual_seed(8)).half()
    given: Any = (*weight.operands, None, None, None, 64, group, "uint4", "none", tile)
    check_linear(weight_only.linear_cuda(x, *given), x, weight, tile.bm)


CASES = [(32, "decode"), (32, "prefill"), (128, "decode")]
"""The last one scales sums, not weights."""


@pytest.mark.parametrize(("group", "phase"), CASES)
def test_the_right_kernel_passes(group: int, phase: str) -> None:
    run(group, "int", TILES[phase])


@pytest.mark.parametrize(("group", "phase"), CASES)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_kernel_does_not(group: int, wrong: str, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, function = WRONG[wrong]
    monkeypatch.setattr(unpack, name, function)
    if wrong == "zero after scale" and group == 128:
        run(group, "int", TILES[phase])  # that order is right there: weights are not scaled at all
        return
    with pytest.raises(AssertionError, match="times what rounding explains"):
        run(group, "int", TILES[phase])
