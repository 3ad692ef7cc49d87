"""Small ONNX models for tests, and the check that one survives capture and emission."""

import numpy as np
import onnx
from onnx import TensorProto, helper

from qcompiler.backends.onnx.emit import to_model
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.ir import Graph
from qcompiler.reader import parse
from qcompiler.text import show
from tests.backends.onnx.roundtrip import compare_models, proto_of


def f32(name: str, *shape: int | str | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def model_of(nodes, inputs, outputs, initializers=(), *, opset=17, ir_version=9, **graph) -> onnx.ModelProto:  # type: ignore[no-untyped-def]
    proto = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(initializers), **graph)
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def weight(name: str, *shape: int, dtype: type = np.float32) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.arange(np.prod(shape)).reshape(shape).astype(dtype), name)


def survives(model: onnx.ModelProto) -> Graph:
    """The graph of ``model``, which comes out as it was and prints as it parses."""
    graph = load_onnx(model)
    assert compare_models(proto_of(model), to_model(graph)) == ""
    text = show(graph)
    assert show(parse(text)) == text
    return graph
