"""Nested graphs, functions and nodes out of order: what names mean in them."""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from qcompiler.backends.onnx.emit import to_model
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.payload import FilePayload
from tests.backends.onnx.build import f32, model_of, survives, weight


def branch(op: str, reads: str, result: str, *constants: onnx.TensorProto) -> onnx.GraphProto:
    nodes = [helper.make_node(op, [reads, *(c.name for c in constants)], [result])]
    return helper.make_graph(nodes, f"{op}_{result}", [], [f32(result, 2)], list(constants))


def test_branches_capture_and_share_names() -> None:
    cond = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    then, other = branch("Add", "h", "r", weight("k", 2)), branch("Mul", "h", "r", weight("k", 2))
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=other),
    ]
    graph = survives(model_of(nodes, [cond, f32("x", 2)], [f32("y", 2)]))
    relu, choice = graph
    assert set(choice.regions) == {"then_branch", "else_branch"}
    assert len(relu.result.uses) == 2
    assert all(region.local("k") is not None for region in choice.regions.values())


def test_an_inner_name_that_hides_an_outer_one_is_renamed_and_restored() -> None:
    cond = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    body = helper.make_graph(
        [helper.make_node("Identity", ["keep"], ["go"]), helper.make_node("Add", ["x", "x"], ["h"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), cond, f32("x", 2)],
        [helper.make_tensor_value_info("go", TensorProto.BOOL, []), f32("h", 2)],
    )
    nodes = [
        helper.make_node("Identity", ["c"], ["keep"]),
        helper.make_node("Loop", ["n", "c", "x"], ["h"], body=body),
    ]
    given = [helper.make_tensor_value_info("n", TensorProto.INT64, []), cond, f32("x", 2)]
    graph = survives(model_of(nodes, given, [f32("h", 2)]))
    region = list(graph)[1].regions["body"]
    assert [v.name for v in region.inputs] == ["i", "c_inner", "x_inner"]
    assert region.inputs[2].meta == {"hides": "x"}
    # A pass makes the body read the outer x: the inner one can no longer be called so.
    add = list(region)[1]
    add.set_operand(1, graph.inputs[2])
    out = to_model(graph).graph.node[1].attribute[0].g
    assert out.input[2].name == "x_inner"
    assert list(out.node[1].input) == ["x_inner", "x"]


def test_a_list_of_graphs() -> None:
    node = helper.make_node("Many", ["x"], ["y"], domain="test")
    graphs = [branch("Relu", "x", "a"), branch("Neg", "x", "a")]
    node.attribute.add(name="bodies", type=onnx.AttributeProto.GRAPHS, graphs=graphs)
    graph = survives(model_of([node], [f32("x", 2)], [f32("y", 2)]))
    assert list(next(iter(graph)).regions) == ["bodies.0", "bodies.1"]


def test_operators_with_dots_in_their_names() -> None:
    graph = survives(model_of([helper.make_node("a.b", ["x"], ["y"], domain="c.d")], [f32("x", 2)], [f32("y", 2)]))
    assert [op.name for op in graph] == ["c.d.a.b"]


def test_functions_are_inlined() -> None:
    body = [
        helper.make_node("Constant", [], ["k"], value=weight("", 512)),
        helper.make_node("Add", ["a", "k"], ["b"]),
    ]
    function = helper.make_function("mine", "Plus", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    nodes = [helper.make_node("Plus", [f"{v}"], [f"{v}{v}"], domain="mine", name=f"at_{v}") for v in ("x", "xx")]
    model = model_of(nodes, [f32("x", 512)], [f32("xxxx", 512)])
    model.functions.append(function)
    model.opset_import.add(domain="mine", version=1)
    graph = survives(model)
    assert [op.name for op in graph] == ["onnx.Add", "onnx.Add"]
    assert len(graph.consts) == 2


def test_constants_in_functions_of_a_file_stay_in_it(tmp_path: Path) -> None:
    body = [
        helper.make_node("Constant", [], ["k"], value=weight("", 512)),
        helper.make_node("Add", ["a", "k"], ["b"]),
    ]
    function = helper.make_function("mine", "Plus", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    model = model_of([helper.make_node("Plus", ["x"], ["y"], domain="mine")], [f32("x", 512)], [f32("y", 512)])
    model.functions.append(function)
    model.opset_import.add(domain="mine", version=1)
    onnx.save(model, tmp_path / "f.onnx")
    (const,) = load_onnx(tmp_path / "f.onnx").consts.values()
    assert isinstance(const.payload, FilePayload)
    assert const.payload.array().tolist() == list(range(512))


def test_nodes_out_of_order_are_put_in_order() -> None:
    cond = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    late = branch("Add", "h", "r", weight("k", 2))
    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=late, else_branch=branch("Neg", "h", "r")),
        helper.make_node("Relu", ["g"], ["h"]),
        helper.make_node("Neg", ["x"], ["g"]),
    ]
    graph = survives(model_of(nodes, [cond, f32("x", 2)], [f32("y", 2)]))
    assert [op.name for op in graph] == ["onnx.Neg", "onnx.Relu", "onnx.If"]
