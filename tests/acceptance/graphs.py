"""Small float ONNX models, made by the onnx package alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

F = TensorProto.FLOAT


def model(
    nodes: list[Any], inputs: list[Any], outputs: list[Any], tensors: dict[str, Any], **more: Any
) -> onnx.ModelProto:
    """A model of ``nodes`` at opset 21; inputs and outputs are ``(name, shape)`` in float32."""
    made = [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()]
    infos = [
        [v if isinstance(v, onnx.ValueInfoProto) else helper.make_tensor_value_info(v[0], F, v[1]) for v in vs]
        for vs in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "g", *infos, initializer=made)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10, **more)


def weights(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(shape[0]))


def mlp(k: int = 64, hidden: int = 96, n: int = 32) -> onnx.ModelProto:
    """Two linear layers with a Relu between them; sites ``up`` and ``down``."""
    nodes = [
        helper.make_node("MatMul", ["x", "up.weight"], ["h"], name="up_mm"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "down.weight"], ["y"], name="down_mm"),
    ]
    tensors = {"up.weight": weights(k, hidden), "down.weight": weights(hidden, n, seed=1)}
    return model(nodes, [("x", ["batch", k])], [("y", ["batch", n])], tensors)


def write(path: Path, made: onnx.ModelProto, *, external: bool = False) -> Path:
    """Save ``made``; its weights in ``<name>.data`` when ``external``."""
    if external:
        onnx.save(made, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    else:
        onnx.save(made, path)
    return path
