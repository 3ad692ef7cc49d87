"""Kernels that are wrong in ways that are easily made do not pass the comparison with float64; the right one does."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import triton.language as tl

from qcompiler.backends.triton import weight_only
from qcompiler.backends.triton.device import unpack
from qcompiler.backends.triton.tiles import Tile
from qcompiler.scheme import ZeroKind
from tests.backends.triton.interpreted.comparing import check_linear
from tests.backends.triton.weight_cases import draw

values, parameters, pairs_of = unpack._values, unpack._parameters, unpack.integer_pair
zero_pairs = unpack.zero_pairs


def given(function: Any, args: tuple[Any, ...], **changed: Any) -> Any:
    """Call a function of the kernel with some arguments changed; the interpreter runs Python."""
    names = list(inspect.signature(function.fn).parameters)
    return function(*(changed.get(name, value) for name, value in zip(names, args, strict=True)))


def argument(function: Any, args: tuple[Any, ...], name: str) -> Any:
    return args[list(inspect.signature(function.fn).parameters).index(name)]


def zero_after_scale(*args: Any) -> Any:
    """``q * s - z`` for ``(q - z) * s``."""
    zero, bf16 = argument(values, args, "zero"), argument(values, args, "BF16")
    none = unpack.twice(tl.zeros_like(zero).to(tl.float32) + 1024, bf16)
    return unpack.subtract_pairs(given(values, args, zero=none), unpack.subtract_pairs(zero, none, bf16), bf16)


def zeros_of_the_next_row(*args: Any) -> Any:
    """Zero points are those of the neighbouring output."""
    return parameters(*args)[0], *given(parameters, args, rows=argument(parameters, args, "rows") ^ 1)[1:]


def parameters_of_the_first_group(*args: Any) -> Any:
    """The row of scales and zeros does not advance with K."""
    return given(parameters, args, tile=0)


def zeros_forgotten(zeros: Any, *args: Any) -> Any:
    """Zero points are taken as 0."""
    return zero_pairs(tl.zeros_like(zeros), *args)


def nibbles_changed(*args: Any) -> Any:
    """Two neighbouring codes change places."""
    return given(pairs_of, args, INDEX=int(argument(pairs_of, args, "INDEX")) ^ 1)


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
    operands: Any = (*weight.operands, None, None, None, 64, group, "uint4", "none", tile)
    check_linear(weight_only.linear_cuda(x, *operands), x, weight, tile.bm)


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
