"""The comparison that the round trips rest on sees what differs, and the runner tells bits apart."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.backends.onnx.build import f32, model_of, weight
from tests.backends.onnx.corpus import digest
from tests.backends.onnx.roundtrip import compare_models


def model() -> onnx.ModelProto:
    inner = helper.make_graph([helper.make_node("Neg", ["h"], ["r"])], "inner", [], [f32("r", 2)], [weight("k", 2)])
    nodes = [
        helper.make_node("Add", ["x", "w"], ["h"], name="sum", doc_string="d"),
        helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner),
        helper.make_node("Softmax", ["y"], ["z"], axis=1),
    ]
    given = [helper.make_tensor_value_info("c", TensorProto.BOOL, []), f32("x", 2)]
    made = model_of(nodes, given, [f32("z", 2)], [weight("w", 2)], value_info=[f32("h", 2)])
    made.metadata_props.add(key="k", value="v")
    return made


CHANGES: list[Callable[[onnx.ModelProto], object]] = [
    lambda m: m.graph.node.pop(),
    lambda m: setattr(m.graph.node[0], "name", "other"),
    lambda m: setattr(m.graph.node[0], "doc_string", ""),
    lambda m: setattr(m.graph.node[0], "domain", "com.microsoft"),
    lambda m: m.graph.node[0].input.reverse(),
    lambda m: m.graph.node[0].metadata_props.add(key="a", value="b"),
    lambda m: setattr(m.graph.node[2].attribute[0], "i", 0),
    lambda m: m.graph.node[2].attribute.pop(),
    lambda m: setattr(m.graph.node[1].attribute[0].g.node[0], "op_type", "Abs"),
    lambda m: setattr(m.graph.node[1].attribute[1].g.initializer[0], "raw_data", bytes(8)),
    lambda m: setattr(m.graph.initializer[0], "raw_data", bytes(8)),
    lambda m: m.graph.initializer.pop(),
    lambda m: m.graph.value_info.pop(),
    lambda m: setattr(m.graph.value_info[0].type.tensor_type, "elem_type", 10),
    lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[0], "dim_value", 3),
    lambda m: setattr(m.graph.input[1], "doc_string", "new"),
    lambda m: setattr(m.graph, "name", "other"),
    lambda m: m.metadata_props.pop(),
    lambda m: setattr(m, "producer_name", "other"),
    lambda m: setattr(m.opset_import[0], "version", 16),
    lambda m: setattr(m, "ir_version", 8),
    lambda m: m.training_info.add(),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_difference_is_seen(change: Callable[[onnx.ModelProto], object]) -> None:
    other = model()
    assert compare_models(model(), other) == ""
    change(other)
    assert compare_models(model(), other) != ""


def test_outputs_are_compared_by_their_bits() -> None:
    nan = np.array([np.nan, 1], np.float32)
    assert digest([nan]) == digest([nan.copy()])
    assert digest(np.float32([0.0])) != digest(np.float32([-0.0]))
    assert digest(np.float32([1])) != digest(np.float64([1]))
    assert digest(np.float32([1])) != digest(np.float32([[1]]))
    assert digest([{"a": np.float32([1])}]) != digest([{"a": np.float32([2])}])
