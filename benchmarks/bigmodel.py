"""A float ONNX model of any size for the memory and throughput benchmarks: a chain of square linear layers.

The weights lie in external data and are written a layer at a time; every layer has the same random values, since what
is measured does not depend on them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper


def write_chain(path: Path, layers: int, width: int = 4096) -> int:
    """Write ``x @ W0 -> Tanh -> @ W1 ...`` with float32 ``[width, width]`` weights; returns the weight bytes."""
    nodes, tensors = [], []
    block = (
        np.random.default_rng(0).standard_normal((width, width), np.float32) / np.float32(np.sqrt(width))
    ).tobytes()
    data = path.with_name(path.name + ".data")
    with open(data, "wb") as f:
        for i in range(layers):
            t = TensorProto(name=f"layers.{i}.weight", data_type=TensorProto.FLOAT, dims=[width, width])
            t.data_location = TensorProto.EXTERNAL
            for key, value in (("location", data.name), ("offset", f.tell()), ("length", len(block))):
                t.external_data.add(key=key, value=str(value))
            tensors.append(t)
            f.write(block)
            source = "x" if i == 0 else f"t{i - 1}"
            nodes.append(helper.make_node("MatMul", [source, t.name], [f"m{i}"], name=f"layers.{i}"))
            nodes.append(helper.make_node("Tanh", [f"m{i}"], [f"t{i}"], name=f"tanh.{i}"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])
    y = helper.make_tensor_value_info(f"t{layers - 1}", TensorProto.FLOAT, ["n", width])
    graph = helper.make_graph(nodes, "chain", [x], [y], initializer=tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return layers * len(block)
