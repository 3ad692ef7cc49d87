"""Products with the weights of experts in the interpreter, against float64 and against one expert at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcompiler.backends.triton import grouped
from qcompiler.backends.triton.tiles import Tile
from tests.backends.triton.weight_cases import ROUNDOFF, bound, draw

N, K = 70, 200
CASES = [
    ("int4", 128, "none", torch.float16, 16),
    ("uint4", 32, "int", torch.bfloat16, 16),
    ("f8e4m3", 0, "none", torch.float32, 32),
    ("mxfp4", 32, "none", torch.bfloat16, 128),
    ("nvfp4", 16, "none", torch.float16, 16),
    ("int8", 0, "none", torch.bfloat16, 16),
    ("uint8", 64, "float", torch.float16, 16),
    ("int2", 64, "none", torch.bfloat16, 16),
    ("uint2", 32, "int", torch.float16, 16),
    ("f4e2m1", 64, "none", torch.bfloat16, 16),
    ("f8e5m2", 0, "none", torch.float16, 16),
    ("nf4", 64, "none", torch.bfloat16, 16),
]
"""Form, group, zero points, activation, rows of a tile; every form is a row."""


def experts(form: str, group: int, zero: str, count: int) -> tuple[list[object], tuple[torch.Tensor | None, ...]]:
    """Weights of ``count`` experts, and what ``wn_grouped`` takes of them all."""
    every = [draw(form, N, K, group, zero, seed=s) for s in range(count)]
    parts = list(zip(*(w.operands for w in every), strict=True))
    stacked = [None if p[0] is None else torch.stack(p) for p in parts[:3]]
    whole = None if parts[3][0] is None else torch.cat([g * (2**i) for i, g in enumerate(parts[3])])
    return every, (*stacked, whole)


def drawn(rows: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(7)).to(dtype)


@pytest.mark.parametrize(("form", "group", "zero", "dtype", "rows"), CASES)
def test_each_row_is_multiplied_by_its_experts_weight(
    form: str, group: int, zero: str, dtype: torch.dtype, rows: int
) -> None:
    ends = [5, 5, 40, 58]  # the second has no row, the third more than two tiles of 16; three rows belong to none
    every, operands = experts(form, group, zero, len(ends))
    x = drawn(61, dtype)
    bias = torch.randn(len(ends), N, generator=torch.Generator().manual_seed(8))
    tile = Tile(rows, 64, 128, 4, 1)
    offsets = torch.tensor(ends, dtype=torch.int32)
    y = grouped.grouped_cuda(x, offsets, *operands, bias, N, group, form, "relu", tile)
    assert y.dtype == dtype and y.shape == (61, N)
    assert not y[58:].any()
    multiplied = torch.bfloat16 if dtype == torch.float32 else dtype
    late = group >= 128 and rows <= 64
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        part = x[start:end].to(multiplied).double().numpy()
        factor = 2.0**e if form == "nvfp4" else 1.0
        want = part @ every[e].values.T * factor + bias[e].double().numpy()
        off = bound(every[e], part, multiplied, scaled=group != 0 and not late) * factor
        allowed = off + ROUNDOFF[dtype] * (np.abs(want) + off) + 2.0**-22 * np.abs(bias[e].numpy())
        assert (np.abs(y[start:end].double().numpy() - np.maximum(want, 0)) <= allowed).all()


@pytest.mark.parametrize("ends", [[1, 1, 1, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0, 0], [16, 32, 48, 64, 80, 81, 96, 97]])
def test_the_grid_reaches_every_tile(ends: list[int]) -> None:
    every, operands = experts("int4", 128, "none", 8)
    x = drawn(max(ends[-1], 3), torch.float32)
    offsets = torch.tensor(ends, dtype=torch.int32)
    y = grouped.grouped_cuda(x, offsets, *operands, None, N, 128, "int4", "none", Tile(16, 64, 128, 4, 1))
    want = torch.ops.qcompiler.wn_grouped(x, offsets, *operands, None, N, 128, "int4", "none")
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)  # the same roundings, sums in another order
    assert len(every) == 8
