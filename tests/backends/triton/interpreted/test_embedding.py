"""The gather in the interpreter, against weights that the IR's own reference dequantizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcompiler.backends.triton import embedding
from qcompiler.backends.triton.tiles import Tile
from tests.backends.triton.weight_cases import ROUNDOFF, draw

TILE = Tile(1, 16, 128, 4, 1)
HALF = 2.0**-11
"""Rounding the value of an NF4 code to float16."""
SINGLE = 2.0**-24

CASES = [
    ("int8", 0, "none", torch.float32),
    ("uint8", 64, "int", torch.float16),
    ("int4", 32, "none", torch.bfloat16),
    ("uint4", 128, "int", torch.float32),
    ("uint4", 64, "float", torch.float32),
    ("uint2", 64, "int", torch.float16),
    ("int2", 256, "none", torch.float32),
    ("f8e4m3", 0, "none", torch.bfloat16),
    ("f8e5m2", 128, "none", torch.float32),
    ("nf4", 64, "none", torch.float32),
    ("f4e2m1", 64, "none", torch.float32),
    ("mxfp4", 32, "none", torch.bfloat16),
    ("nvfp4", 16, "none", torch.float32),
]


@pytest.mark.parametrize(("form", "group", "zero", "out"), CASES)
def test_rows_asked_for_are_those_of_the_table(form: str, group: int, zero: str, out: torch.dtype) -> None:
    n, k = 70, 300
    table = draw(form, n, k, group, zero, seed=3)
    indices = torch.tensor([[0, 69, 5], [5, 33, 1]], dtype=torch.int64)
    y = embedding.embedding_cuda(indices, *table.operands, k, group, form, out, TILE)
    assert y.shape == (2, 3, k) and y.dtype == out
    want = table.values[indices.numpy()]
    relative = ROUNDOFF[out] + SINGLE + (HALF if form == "nf4" else 0)  # the result, the product in f32, the code
    less_zero = 16 * SINGLE * table.steps[indices.numpy()] if zero == "float" else 0
    assert (np.abs(y.double().numpy() - want) <= (relative * np.abs(want) + less_zero) * (1 + 1e-3)).all()


def test_indices_of_any_type_strides_and_number() -> None:
    table = draw("int4", 64, 128, 32, "none")
    every = torch.arange(64, dtype=torch.int32)
    for indices in (every[::3], every[5], every[:0], every.reshape(4, 16).T):
        y = embedding.embedding_cuda(indices, *table.operands, 128, 32, "int4", torch.float32, TILE)
        assert y.shape == (*indices.shape, 128)
        np.testing.assert_allclose(y.numpy(), table.values[indices.numpy()], rtol=2**-23)  # two roundings to f32


def test_an_index_outside_gives_nan_and_reads_nothing() -> None:
    table = draw("int8", 64, 128, 0, "none")
    indices = torch.tensor([3, -1, 64, 1 << 40])
    y = embedding.embedding_cuda(indices, *table.operands, 128, 0, "int8", torch.float16, TILE)
    assert y.isnan().all(-1).tolist() == [False, True, True, True]
