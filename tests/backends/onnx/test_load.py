"""What a captured graph holds: names, notes, types, constants, nested graphs."""

import numpy as np
import onnx
from onnx import TensorProto, helper

from qcompiler.backends.onnx.attributes import items
from qcompiler.backends.onnx.emit import to_model
from qcompiler.backends.onnx.load import opset_of
from qcompiler.dtypes import F32, INT64, dtype
from qcompiler.ir import UNKNOWN, Atom, Loc, OpaqueType, TensorType
from tests.backends.onnx.build import f32, model_of, survives, weight


def test_operators_names_and_types() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="up"),
        helper.make_node("Gelu", ["h"], ["y"], name="up", domain="com.microsoft"),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    model = model_of(nodes, [f32("x", "batch", 4)], [f32("z", "batch", 8)], [weight("w", 4, 8)])
    model.opset_import.add(domain="com.microsoft", version=1)
    graph = survives(model)
    up, gelu, relu = graph
    assert [op.name for op in graph] == ["onnx.MatMul", "com.microsoft.Gelu", "onnx.Relu"]
    assert up.loc == gelu.loc == Loc("up")
    assert relu.loc == Loc()
    assert up.result.type == TensorType(F32, ("batch", 8))
    assert gelu.result.type == UNKNOWN
    assert opset_of(graph) == 17
    assert opset_of(graph, "com.microsoft") == 1
    assert opset_of(graph, "nobody") == 0


def test_the_default_domain_has_two_names() -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"], domain="ai.onnx")], [f32("x", 1)], [f32("y", 1)])
    del model.opset_import[:]
    model.opset_import.add(domain="ai.onnx", version=17)
    graph = survives(model)
    assert [op.name for op in graph] == ["onnx.Relu"]
    assert opset_of(graph) == 17


ATTRIBUTES = {
    "i": 3,
    "f": 0.1,
    "s": "text",
    "s_empty": "",
    "s_bytes": b"\xff\x00",
    "ints": (1, -2),
    "floats": (1.0, 2.5, float("inf")),
    "strings": ("a", "b"),
    "none_i": Atom("onnx.empty", "INTS"),
    "none_s": Atom("onnx.empty", "STRINGS"),
    "none_t": Atom("onnx.empty", "TENSORS"),
    "type": TensorType(INT64, ("n", 2)),
}


def test_every_attribute_type_comes_out_as_it_was() -> None:
    node = helper.make_node("Odd", ["x"], ["y"], domain="test")
    node.attribute.add(name="i", type=onnx.AttributeProto.INT, i=3)
    node.attribute.add(name="f", type=onnx.AttributeProto.FLOAT, f=0.1)
    node.attribute.add(name="s", type=onnx.AttributeProto.STRING, s=b"text")
    node.attribute.add(name="s_empty", type=onnx.AttributeProto.STRING, s=b"")
    node.attribute.add(name="s_bytes", type=onnx.AttributeProto.STRING, s=b"\xff\x00")
    node.attribute.add(name="ints", type=onnx.AttributeProto.INTS, ints=[1, -2])
    node.attribute.add(name="floats", type=onnx.AttributeProto.FLOATS, floats=[1, 2.5, float("inf")])
    node.attribute.add(name="strings", type=onnx.AttributeProto.STRINGS, strings=[b"a", b"b"])
    node.attribute.add(name="none_i", type=onnx.AttributeProto.INTS)
    node.attribute.add(name="none_s", type=onnx.AttributeProto.STRINGS)
    node.attribute.add(name="none_t", type=onnx.AttributeProto.TENSORS)
    node.attribute.add(name="t", type=onnx.AttributeProto.TENSOR, t=weight("", 2, 2))
    node.attribute.add(name="tensors", type=onnx.AttributeProto.TENSORS, tensors=[weight("", 2), weight("", 1)])
    type_proto = helper.make_tensor_type_proto(TensorProto.INT64, ["n", 2])
    node.attribute.add(name="type", type=onnx.AttributeProto.TYPE_PROTO, tp=type_proto)
    denoted = helper.make_tensor_type_proto(TensorProto.INT64, [2])
    denoted.denotation = "IMAGE"
    sequence = helper.make_sequence_type_proto(denoted)
    node.attribute.add(name="types", type=onnx.AttributeProto.TYPE_PROTOS, type_protos=[sequence, denoted])
    sparse = helper.make_sparse_tensor(weight("v", 2), weight("", 2, dtype=np.int64), [5])
    node.attribute.add(name="sparse", type=onnx.AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse)
    node.attribute.add(name="docs", type=onnx.AttributeProto.INT, i=1, doc_string="why")
    graph = survives(model_of([node], [f32("x", 1)], [f32("y", 1)]))
    (op,) = graph
    expected = dict(ATTRIBUTES, f=float(np.float32(0.1)))
    assert {k: v for k, v in op.attrs.items() if k in expected} == expected
    assert isinstance(op.attrs["types"][0], OpaqueType)
    assert op.attrs["types"][1].kind == "onnx.type"
    assert items(op.attrs["none_i"]) == ()
    assert items(op.attrs.get("absent")) == ()
    assert items(op.attrs["ints"]) == (1, -2)
    assert items(op.attrs["i"]) == (3,)


def test_notes_are_kept_on_everything() -> None:
    node = helper.make_node("Relu", ["x"], ["y"], doc_string="node doc")
    node.metadata_props.add(key="k", value="v")
    node.metadata_props.add(key="k2", value="")
    out = helper.make_node("Neg", ["y"], ["z"])
    model = model_of([node, out], [f32("x", 1)], [f32("z", 1)], [weight("w", 2)], doc_string="graph doc")
    model.graph.input[0].doc_string = "input doc"
    model.graph.output[0].metadata_props.add(key="unit", value="m")
    model.graph.initializer[0].doc_string = "weight doc"
    info = model.graph.value_info.add()
    info.CopyFrom(f32("y", "n"))
    info.doc_string = "value doc"
    model.graph.metadata_props.add(key="g", value="1")
    model.metadata_props.add(key="m", value="2")
    model.producer_name, model.producer_version, model.domain = "maker", "1.2", "here"
    model.model_version, model.doc_string = 7, "model doc"
    annotation = model.graph.quantization_annotation.add(tensor_name="y")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    model.training_info.add().algorithm.name = "train"
    graph = survives(model)
    assert graph.meta["doc_string"] == "graph doc"
    assert graph.meta["model_doc_string"] == "model doc"
    relu = next(iter(graph))
    assert relu.meta["metadata_props"] == (("k", "v"), ("k2", ""))
    assert relu.result.meta == {"declared": TensorType(F32, ("n",)), "doc_string": "value doc"} | relu.result.meta


def test_declared_types_are_written_as_declared() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    model = model_of(nodes, [f32("x", 2, 3)], [f32("y", None, "k")], value_info=[f32("h", None, 3)])
    graph = survives(model)
    h, y = (op.result for op in graph)
    assert h.type == TensorType(F32, (2, 3))  # inferred
    assert h.meta["declared"] == TensorType(F32, (None, 3))
    assert y.type == TensorType(F32, (2, "k"))
    h.type = TensorType(dtype("f16"), (2, 3))  # a pass changed it: what the file said is void
    (info,) = to_model(graph).graph.value_info
    assert info.type.tensor_type.elem_type == TensorProto.FLOAT16


def test_inferred_types_are_not_written() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    graph = survives(model_of(nodes, [f32("x", 2, 3)], [f32("y", 2, 3)]))
    assert next(iter(graph)).result.type == TensorType(F32, (2, 3))
    assert not to_model(graph).graph.value_info


def test_sizes_below_zero_are_unknown_and_come_out_again() -> None:
    graph = survives(model_of([helper.make_node("Relu", ["x"], ["y"])], [f32("x", -1, 3)], [f32("y", -1, 3)]))
    assert graph.inputs[0].type == TensorType(F32, (None, 3))


def test_optional_inputs_and_outputs() -> None:
    nodes = [
        helper.make_node("Clip", ["x", "", "hi"], ["c"]),
        helper.make_node("Dropout", ["c", "", ""], ["d", ""]),
        helper.make_node("LSTM", ["s", "w", "r"], ["", "", "y"], hidden_size=2),
    ]
    inits = [weight("w", 1, 8, 3), weight("r", 1, 8, 2), onnx.numpy_helper.from_array(np.float32(2), "hi")]
    model = model_of(nodes, [f32("x", 3), f32("s", 5, 1, 3)], [f32("d", 3), f32("y", 1, 1, 2)], inits)
    graph = survives(model)
    clip, dropout, lstm = graph
    assert clip.operand(1) is None
    assert len(dropout.operands) == 3
    assert lstm.results[0].meta == {"absent": True}
    graph.add_output(lstm.results[0])  # once used, it needs a name
    assert to_model(graph).graph.node[2].output[0] == lstm.results[0].name


def test_constants_however_they_are_stored() -> None:
    typed = helper.make_tensor("typed", TensorProto.FLOAT, [3], [1, 2, 3])
    half = helper.make_tensor("half", TensorProto.FLOAT16, [2], [1.5, -2])
    four = helper.make_tensor("four", TensorProto.INT4, [3], [-8, 7, 1])
    strings = helper.make_tensor("strings", TensorProto.STRING, [2], [b"a", b"\xff"])
    nodes = [
        helper.make_node("Constant", [], ["c"], name="c_node", value=weight("ignored", 2)),
        helper.make_node("Constant", [], ["ci"], value_ints=[4, 5]),
        helper.make_node("Constant", [], ["cf"], value_float=0.5),
        helper.make_node("Constant", [], ["cs"], value_strings=["p", "q"]),
        onnx.NodeProto(op_type="Constant", output=["c0"]),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    nodes[4].attribute.add(name="value_ints", type=onnx.AttributeProto.INTS)
    tensors = [typed, half, four, strings, weight("raw", 2, 2)]
    graph = survives(model_of(nodes, [f32("x", 2)], [f32("y", 2)], tensors))
    values = {name: v.payload.array().tolist() for name, v in graph.consts.items()}  # type: ignore[union-attr]
    assert values == {
        "typed": [1, 2, 3],
        "half": [1.5, -2],
        "four": [-8, 7, 1],
        "strings": ["a", b"\xff"],
        "raw": [[0, 1], [2, 3]],
        "c": [0, 1],
        "ci": [4, 5],
        "cf": 0.5,
        "cs": ["p", "q"],
        "c0": [],
    }
    assert graph.consts["c"].meta == {"node": "c_node"}
    assert graph.consts["four"].type == TensorType(dtype("int4"), (3,))
    assert to_model(graph).ir_version == 10  # the first one with int4


def test_initializers_that_are_inputs() -> None:
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    given = [f32("x", 2), f32("w", 2)]
    new = survives(model_of(nodes, given, [f32("y", 2)], [weight("w", 2)]))
    assert new.inputs[1].payload is not None
    assert not new.inputs[1].is_const
    old = survives(model_of(nodes, given, [f32("y", 2)], [weight("w", 2)], opset=7, ir_version=3))
    assert [v.name for v in old.inputs] == ["x"]
    assert old.consts["w"].is_const
    assert to_model(old).ir_version == 4


def test_sparse_initializers() -> None:
    sparse = helper.make_sparse_tensor(weight("w", 2), weight("", 2, dtype=np.int64), [5])
    model = model_of([helper.make_node("Add", ["x", "w"], ["y"])], [f32("x", 5)], [f32("y", 5)])
    model.graph.sparse_initializer.append(sparse)
    graph = survives(model)
    assert next(iter(graph)).result.meta["sparse"] is True


def test_types_that_are_no_tensors() -> None:
    element = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
    given = helper.make_value_info("s", helper.make_sequence_type_proto(element))
    out = helper.make_value_info("t", helper.make_optional_type_proto(helper.make_sequence_type_proto(element)))
    graph = survives(model_of([helper.make_node("Optional", ["s"], ["t"])], [given], [out]))
    assert isinstance(graph.inputs[0].type, OpaqueType)
    assert "sequence_type" in graph.inputs[0].type.text
