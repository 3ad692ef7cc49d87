"""Folding channels and padding into layers keeps what ONNX Runtime computes, but for float rounding."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qcompiler.backends.onnx.emit import to_model
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.pipeline import Context, run
from qcompiler.recipe import parse_line

Array = np.ndarray[Any, Any]
RTOL = 64 * 2.0**-24
"""Of the largest output: a sum of some hundred float32 products, in another order and with other factors."""


class Net:
    """A chain of nodes on one input; ``consts`` are made as they are asked for."""

    def __init__(self, shape: tuple[int, ...], seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape, self.nodes, self.consts, self.last = shape, [], [], "x"  # type: ignore[var-annotated]

    def const(self, values: Array) -> str:
        name = f"c{len(self.consts)}"
        self.consts.append(numpy_helper.from_array(values, name))
        return name

    def normal(self, *shape: int) -> str:
        return self.const(self.rng.standard_normal(shape).astype(np.float32))

    def add(self, op: str, *inputs: str, **attrs: Any) -> None:
        name = f"t{len(self.nodes)}"
        order = [self.last if i == "." else i for i in inputs]
        self.nodes.append(helper.make_node(op, order, [name], f"{op}{len(self.nodes)}", **attrs))
        self.last = name

    def norm(self, channels: int) -> None:
        variance = self.const(self.rng.uniform(0.1, 2.0, channels).astype(np.float32))
        scale, bias, mean = (self.normal(channels) for _ in range(3))
        self.add("BatchNormalization", ".", scale, bias, mean, variance, epsilon=1e-3)

    def model(self, opset: int = 17) -> onnx.ModelProto:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)
        y = helper.make_tensor_value_info(self.last, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "net", [x], [y], self.consts)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def compute(model: onnx.ModelProto, x: Array) -> Array:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: Array = session.run(None, {"x": x})[0]
    return found


def check(net: Net, left: set[str], opset: int = 17) -> None:
    """The folded net has only the ops in ``left``, and computes the same."""
    model = net.model(opset)
    graph = load_onnx(model)
    run(graph, parse_line("normalise, fold-batchnorm, dce").passes, Context())
    assert {op.name.removeprefix("onnx.") for op in graph} == left
    x = net.rng.standard_normal(net.shape).astype(np.float32)
    before, after = compute(model, x), compute(to_model(graph), x)
    assert before.shape == after.shape
    np.testing.assert_allclose(after, before, rtol=0, atol=RTOL * max(1e-3, np.abs(before).max()))


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    group = draw(st.sampled_from([1, 1, 2, 3]))
    dims = draw(st.integers(1, 3))
    return {
        "group": group,
        "each_in": draw(st.integers(1, 4)),
        "each_out": draw(st.integers(1, 4)),
        "kernel": draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims)),
        "pads": draw(st.lists(st.integers(0, 2), min_size=2 * dims, max_size=2 * dims)),
        "bias": draw(st.booleans()),
        "transposed": draw(st.booleans()),
        "tail": draw(st.lists(st.sampled_from(["BatchNormalization", "Mul", "Add", "Sub", "Div"]), max_size=3)),
        "scalar": draw(st.booleans()),
        "left": draw(st.booleans()),
        "before": draw(st.booleans()),
        "pad": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


@given(convolutions())
@settings(max_examples=80, deadline=None)
def test_chains_around_a_convolution(case: dict[str, Any]) -> None:
    group, dims = case["group"], len(case["kernel"])
    inputs, outputs = group * case["each_in"], group * case["each_out"]
    transposed = case["transposed"]
    assume(not (transposed and (case["before"] or case["pad"])))
    net = Net((2, inputs, *(5 + k for k in case["kernel"])), case["seed"])
    conv_pads = [0] * (2 * dims) if transposed else case["pads"]
    left = {"ConvTranspose" if transposed else "Conv"}
    if case["before"]:
        net.norm(inputs)
        if any(conv_pads):
            left.add("BatchNormalization")
    if case["pad"]:
        spatial = case["pads"][::-1]
        pads = [0, 0, *spatial[:dims], 0, 0, *spatial[dims:]]
        net.add("Pad", ".", net.const(np.array(pads, np.int64)))
    shape = (inputs, case["each_out"]) if transposed else (outputs, case["each_in"])
    weight = [net.normal(*shape, *case["kernel"])] + ([net.normal(outputs)] if case["bias"] else [])
    net.add("ConvTranspose" if transposed else "Conv", ".", *weight, group=group, pads=conv_pads)
    for op in case["tail"]:
        if op == "BatchNormalization":
            net.norm(outputs)
            continue
        size = [] if case["scalar"] else [outputs, *[1] * dims]
        c = net.const(net.rng.uniform(0.5, 2.0, size).astype(np.float32))
        net.add(op, *((c, ".") if case["left"] and op in ("Mul", "Add") else (".", c)))
    check(net, left)


@pytest.mark.parametrize("op", ["MatMul", "Gemm", "GemmT"])
@pytest.mark.parametrize("bias", [False, True])
def test_products(op: str, bias: bool) -> None:
    net = Net((3, 20), 5)
    if op == "MatMul":
        net.add("MatMul", ".", net.normal(20, 7))
    else:
        weight = net.normal(7, 20) if op == "GemmT" else net.normal(20, 7)
        net.add("Gemm", ".", weight, *([net.normal(1, 7)] if bias else []), transB=int(op == "GemmT"))
    net.norm(7)
    check(net, {"Gemm"})


def test_a_bias_of_one_number_is_spread() -> None:
    net = Net((3, 20), 6)
    net.add("Gemm", ".", net.normal(20, 7), net.normal())
    net.norm(7)
    check(net, {"Gemm"})


def test_a_padding_of_some_axes_and_of_an_old_opset() -> None:
    net = Net((1, 3, 8, 8), 7)
    axes = net.const(np.array([3, -2], np.int64))
    net.add("Pad", ".", net.const(np.array([1, 0, 2, 1], np.int64)), "", axes)
    net.add("Conv", ".", net.normal(4, 3, 3, 3), auto_pad="VALID")
    check(net, {"Conv"}, opset=18)
    old = Net((1, 3, 8, 8), 8)
    old.add("Pad", ".", pads=[0, 0, 1, 2, 0, 0, 0, 1])
    old.add("Conv", ".", old.normal(4, 3, 3, 3), pads=[1, 1, 1, 1])
    check(old, {"Conv"}, opset=10)


def test_a_padding_by_reflection_stays() -> None:
    net = Net((1, 3, 8, 8), 9)
    net.add("Pad", ".", net.const(np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)), mode="reflect")
    net.add("Conv", ".", net.normal(4, 3, 3, 3))
    check(net, {"Pad", "Conv"})


def test_half_precision_is_rounded_once() -> None:
    net = Net((1, 2, 4, 4), 10)
    net.add("Conv", ".", net.normal(3, 2, 1, 1))
    net.norm(3)
    model = net.model()
    for tensor in [*model.graph.initializer]:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    graph = load_onnx(model)
    w, scale, bias, mean, variance = [
        numpy_helper.to_array(model.graph.initializer[i]).astype(np.float64) for i in (0, 2, 3, 4, 1)
    ]
    run(graph, parse_line("fold-batchnorm").passes, Context())
    conv = next(iter(graph))
    made = [v.payload.array() for v in conv.operands[1:] if v is not None and v.payload is not None]
    factor = scale / np.sqrt(variance + np.float64(np.float32(1e-3)))
    assert np.array_equal(made[0], (w * factor[:, None, None, None]).astype(np.float16))
    assert np.array_equal(made[1], (bias - mean * factor).astype(np.float16))
