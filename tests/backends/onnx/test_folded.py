"""Float weights that were codes: which lie on a grid, and which only look like it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from qcompiler.backends.onnx.folded import on_grid
from qcompiler.dtypes import dtype_of
from qcompiler.ir import Graph, Op
from qcompiler.payload import ArrayPayload

RNG = np.random.default_rng(3)
NORMAL = RNG.standard_normal((512, 384)).astype(np.float32)


def product(weight: NDArray[Any]) -> Op:
    graph = Graph()
    x = graph.add_input("x", graph.add_const("w", ArrayPayload(weight, dtype_of(weight.dtype))).type)
    return graph.create("onnx.MatMul", [x, graph.consts["w"]], {}, [("y", x.type)])


def steps(weight: NDArray[Any]) -> int:
    op = product(weight)
    value = op.operand(1)
    assert value is not None
    return on_grid(value, op)


def fake(weight: NDArray[Any], bits: int, group: int | None, *, asym: bool = False) -> NDArray[Any]:
    """Rounded to ``bits`` along axis 1, in groups or whole rows, and dequantized."""
    runs = weight.reshape(len(weight), -1, group or weight.shape[1]).astype(np.float64)
    if asym:
        scale = (runs.max(2) - runs.min(2))[..., None] / (2**bits - 1)
        zero = np.round(-runs.min(2)[..., None] / scale)
        codes = np.clip(np.round(runs / scale) + zero, 0, 2**bits - 1) - zero
    else:
        scale = np.abs(runs).max(2)[..., None] / (2 ** (bits - 1) - 1)
        codes = np.round(runs / scale)
    return (codes * scale).reshape(weight.shape).astype(weight.dtype)


FOLDED = {
    "int4 g32": fake(NORMAL, 4, 32),
    "int4 g128 asym": fake(NORMAL, 4, 128, asym=True),
    "int4 channel": fake(NORMAL, 4, None),
    "int8 channel": fake(NORMAL, 8, None),
    "int8 g128": fake(NORMAL, 8, 128),
    "int4 g32, stored the other way round": fake(NORMAL, 4, 32).T.copy(),
    "int8 channel, stored the other way round": fake(NORMAL, 8, None).T.copy(),
    "int8 tensor": fake(NORMAL.reshape(1, -1), 8, None).reshape(NORMAL.shape),
    "int4 tensor": fake(NORMAL.reshape(1, -1), 4, None).reshape(NORMAL.shape),
    "int4 g32 in f16": fake(NORMAL, 4, 32).astype(np.float16),
}

FLOAT = {
    "f32": NORMAL,
    "f16": NORMAL.astype(np.float16),
    "from bf16": NORMAL.astype(ml_dtypes.bfloat16).astype(np.float32),
    "uniform": RNG.random((512, 384)).astype(np.float32),
    "whole numbers": np.arange(512 * 384, dtype=np.float32).reshape(512, 384),
    "tenths": RNG.integers(-20, 21, (512, 384)).astype(np.float32) / 10,
    "ones": np.ones((512, 384), np.float32),
    "a mask": np.tril(np.ones((512, 512), np.float32)),
    "ternary": (RNG.integers(-1, 2, (512, 384)) * RNG.random((512, 1))).astype(np.float32),
    "sines": np.sin(np.outer(np.arange(512), np.exp(-np.arange(384) / 60))).astype(np.float32),
    "small": fake(NORMAL[:8, :64], 4, 32),
}


@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_weight_is_recognised(name: str) -> None:
    assert steps(FOLDED[name]) > 0


@pytest.mark.parametrize("name", FLOAT)
def test_a_float_weight_is_not(name: str) -> None:
    assert steps(FLOAT[name]) == 0
