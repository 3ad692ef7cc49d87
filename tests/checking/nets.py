"""A small net with a convolution, a residual, matrices with and without bias: what mutants are planted in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import helper

from qcompiler.backends.onnx.load import load_onnx
from qcompiler.ir import Graph
from tests.acceptance.graphs import model, weights

K = 32


def _node(op: str, ins: Sequence[str], out: str, name: str, **attrs: Any) -> Any:
    return helper.make_node(op, list(ins), [out], name=name, **attrs)


def small() -> Graph:
    """x ``[b, 2, 6, 6]`` -> Conv, Relu, MaxPool, Flatten, Gemm, Relu, MatMul + residual, MatMul, Add -> ``[b, 8]``."""
    rng = np.random.default_rng(5)
    nodes = [
        _node("Conv", ["x", "conv.weight", "conv.bias"], "c", "conv", pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        _node("Relu", ["c"], "r", "relu"),
        _node("MaxPool", ["r"], "p", "pool", kernel_shape=[2, 2], strides=[2, 2]),
        _node("Flatten", ["p"], "f", "flat"),
        _node("Gemm", ["f", "up.weight", "up.bias"], "u", "up", transB=1),
        _node("Relu", ["u"], "ur", "up_relu"),
        _node("MatMul", ["ur", "mid.weight"], "m", "mid"),
        _node("Add", ["m", "ur"], "s", "residual"),
        _node("MatMul", ["s", "down.weight"], "d", "down"),
        _node("Add", ["d", "down.bias"], "y", "down_add"),
    ]
    tensors = {
        "conv.weight": 0.4 * rng.standard_normal((4, 2, 3, 3)).astype(np.float32),
        "conv.bias": rng.standard_normal(4).astype(np.float32),
        "up.weight": weights(K, 36, seed=2),
        "up.bias": 0.3 * rng.standard_normal(K).astype(np.float32),
        "mid.weight": weights(K, K, seed=3),
        "down.weight": weights(K, 8, seed=4),
        "down.bias": rng.standard_normal(8).astype(np.float32),
    }
    return load_onnx(model(nodes, [("x", ["b", 2, 6, 6])], [("y", ["b", 8])], tensors))


def samples(count: int = 3) -> list[dict[str, Any]]:
    """``count`` inputs of :func:`small`."""
    rng = np.random.default_rng(11)
    return [{"x": rng.standard_normal((4, 2, 6, 6)).astype(np.float32)} for _ in range(count)]
