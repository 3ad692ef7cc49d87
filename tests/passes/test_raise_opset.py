"""Models of old opsets compute the same after they are raised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.backends.onnx.emit import emit_onnx
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.ir import Graph
from qcompiler.passes.raise_opset import IR_VERSION, OPSET, RaiseOpset
from qcompiler.pipeline import Context

F = TensorProto.FLOAT


def model(node: onnx.NodeProto, opset: int, shape: list[int], consts: dict[str, Any]) -> onnx.ModelProto:
    graph = helper.make_graph(
        [node],
        "old",
        [helper.make_tensor_value_info("x", F, shape)],
        [helper.make_tensor_value_info(o, F, None) for o in node.output],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in consts.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=4)


def node(name: str, *inputs: str, **attrs: Any) -> onnx.NodeProto:
    return helper.make_node(name, ["x", *inputs], ["y"], name, **attrs)


F32 = np.float32
CASES: dict[str, tuple[onnx.NodeProto, int, list[int], dict[str, Any]]] = {
    "squeeze": (node("Squeeze", axes=[1]), 11, [2, 1, 3], {}),
    "squeeze-all": (node("Squeeze"), 11, [2, 1, 3], {}),
    "unsqueeze": (node("Unsqueeze", axes=[0, 2]), 11, [2, 3], {}),
    "reduce-sum": (node("ReduceSum", axes=[1], keepdims=0), 11, [2, 3], {}),
    "clip": (node("Clip", min=-0.5, max=0.25), 7, [4, 5], {}),
    "clip-above": (node("Clip", max=0.25), 7, [4, 5], {}),
    "pad": (node("Pad", pads=[0, 1, 2, 0], value=1.5), 7, [2, 3], {}),
    "pad-reflect": (node("Pad", pads=[0, 1, 0, 1], mode="reflect"), 7, [2, 3], {}),
    "slice": (node("Slice", starts=[1], ends=[3], axes=[1]), 7, [2, 4], {}),
    "slice-no-axes": (node("Slice", starts=[1, 0], ends=[2, 3]), 7, [2, 4], {}),
    "dropout": (node("Dropout", ratio=0.5), 7, [2, 4], {}),
    "softmax": (node("Softmax", axis=1), 7, [2, 4], {}),
    "upsample": (node("Upsample", "s", mode="nearest"), 9, [1, 1, 3, 3], {"s": np.array([1, 1, 2, 2], F32)}),
    "upsample-linear": (node("Upsample", "s", mode="linear"), 9, [1, 1, 3, 3], {"s": np.array([1, 1, 2, 2], F32)}),
    "upsample-attribute": (node("Upsample", scales=[1.0, 1.0, 2.0, 3.0]), 7, [1, 1, 3, 3], {}),
    "resize": (node("Resize", "s", mode="linear"), 10, [1, 1, 3, 3], {"s": np.array([1, 1, 1.5, 2], F32)}),
    "batch-norm": (
        node("BatchNormalization", "a", "b", "m", "v", spatial=1),
        7,
        [2, 3, 4],
        {"a": np.array([1, 2, 3], F32), "b": np.ones(3, F32), "m": np.ones(3, F32), "v": np.array([1, 4, 9], F32)},
    ),
}


def raised(old: onnx.ModelProto, folder: Path) -> tuple[Graph, Context, Path]:
    source, target = folder / "old.onnx", folder / "new.onnx"
    onnx.save(old, source)
    graph, ctx = load_onnx(source), Context()
    RaiseOpset().run(graph, ctx)
    emit_onnx(graph, target)
    return graph, ctx, target


def outputs(path: Path, x: Any) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("name", CASES)
def test_values_stay(name: str, tmp_path: Path) -> None:
    made, opset, shape, consts = CASES[name]
    _, ctx, path = raised(model(made, opset, shape, consts), tmp_path)
    found = onnx.load(path)
    assert [o.version for o in found.opset_import if o.domain == ""] == [OPSET]
    assert found.ir_version >= IR_VERSION
    assert not ctx.findings
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    np.testing.assert_array_equal(outputs(tmp_path / "old.onnx", x), outputs(path, x))


@pytest.mark.parametrize(
    ("made", "shape", "why"),
    [
        (node("Softmax", axis=1), [2, 3, 4], "flattens a tensor of rank 3 at axis 1"),
        (node("Scatter", "i", "u"), [4], "how to write Scatter 'Scatter' in opset 13 is not known"),
    ],
)
def test_what_cannot_be_said_stays(made: onnx.NodeProto, shape: list[int], why: str, tmp_path: Path) -> None:
    consts = {"i": np.array([1, 2]), "u": np.array([1, 2], F32)}
    graph, ctx, _ = raised(model(made, 9, shape, consts if made.op_type == "Scatter" else {}), tmp_path)
    assert dict(graph.meta["opset_import"])[""] == 9
    (finding,) = ctx.findings
    assert finding.severity == "info"
    assert why in finding.reason


def test_newer_models_are_left(tmp_path: Path) -> None:
    graph, ctx, _ = raised(model(node("Relu"), 17, [2], {}), tmp_path)
    assert dict(graph.meta["opset_import"])[""] == 17
    assert not ctx.findings
