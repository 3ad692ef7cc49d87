"""Evidence on element-wise ops and pools of codes: each is run alone, whatever graph it stands in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.backends.onnx.emit import emit_onnx
from qcompiler.backends.onnx.evidence import verify_file
from qcompiler.backends.onnx.kernels import target
from tests.backends.onnx.build import model_of
from tests.backends.onnx.integer import Case, apply
from tests.backends.onnx.proof import lower

CPU = target("ort-cpu")
MS = "com.microsoft"


def rng() -> np.random.Generator:
    return np.random.default_rng(2)


CASES = [
    apply(rng(), "Add", [(3, 20), (20,)], y_size=0.06),
    apply(rng(), "Mul", [(3, 20), (3, 20)], inputs=(0,), y_size=0.2),
    apply(rng(), "Concat", [(3, 4), (3, 2)], attrs={"axis": 1}),
    apply(
        rng(), "AveragePool", [(1, 3, 8, 8)], attrs={"kernel_shape": (3, 2), "strides": (2, 2), "pads": (1, 0, 1, 1)}
    ),
    apply(rng(), "GlobalAveragePool", [(1, 3, 8, 8)], x="int8 tensor asym", y_size=0.005),
    apply(rng(), "Sigmoid", [(3, 20)], x="int8 tensor sym", y_size=0.004),
    apply(rng(), "LeakyRelu", [(3, 20)], attrs={"alpha": 0.125}),
    apply(rng(), "Softmax", [(3, 40)], y_size=1 / 256, attrs={"axis": -1}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: str(c.attrs["fn"]))
def test_each_function_is_measured(case: Case, tmp_path: Path) -> None:
    emit_onnx(lower(case.graph(), "ort-cpu"), tmp_path / "m.onnx")
    sites, findings, evidence = verify_file(tmp_path / "m.onnx", CPU)
    assert not sites
    assert not findings
    (node,) = evidence.nodes
    assert (node.op_type, node.verdict) == (f"QLinear{case.attrs['fn']}", "fused")
    assert node.facts["elements"] == case.wanted.size
    assert node.facts["steps_off"] <= node.facts["steps_allowed"]


def chain(length: int) -> onnx.ModelProto:
    """A convolution, a sum with its input, a pool, and a softmax over ``length`` elements, as others write them."""
    f, u = np.float32, np.uint8
    constants = {
        "s": f(0.05),
        "z": u(128),
        "w": np.ones((4, 4, 1, 1), np.int8),
        "ws": f(0.25),
        "wz": np.int8(0),
        "ps": f(1 / 256),
        "pz": u(0),
        "shape": np.array([-1, length], np.int64),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], "quantize"),
        helper.make_node("QLinearConv", ["xq", "s", "z", "w", "ws", "wz", "s", "z"], ["c"], "conv"),
        helper.make_node("QLinearAdd", ["c", "s", "z", "xq", "s", "z", "s", "z"], ["a"], "add", domain=MS),
        helper.make_node(
            "QLinearAveragePool",
            ["a", "s", "z", "s", "z"],
            ["p"],
            "pool",
            domain=MS,
            kernel_shape=[2, 2],
            strides=[2, 2],
        ),
        helper.make_node("Reshape", ["p", "shape"], ["r"], "reshape"),
        helper.make_node("QLinearSoftmax", ["r", "s", "z", "ps", "pz"], ["q"], "softmax", domain=MS, axis=-1, opset=13),
        helper.make_node("DequantizeLinear", ["q", "ps", "pz"], ["y"], "dequantize"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", length])
    model = model_of(nodes, [x], [y], [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()])
    model.opset_import.append(helper.make_opsetid(MS, 1))
    return model


def test_ops_in_the_middle_of_a_model_are_measured(tmp_path: Path) -> None:
    onnx.save(chain(32), tmp_path / "m.onnx")
    sites, findings, evidence = verify_file(tmp_path / "m.onnx", CPU)
    assert [(s.name, s.status, s.evidence) for s in sites] == [("conv", "fused", "measured")]
    assert not findings
    assert {n.op_type for n in evidence.nodes} >= {"QLinearConv", "QLinearAdd", "QLinearSoftmax"}
    assert {n.verdict for n in evidence.nodes} == {"fused"}


def test_a_softmax_that_the_runtime_gets_wrong_is_rejected(tmp_path: Path) -> None:
    """Over one element it gives 0 where 1 is right."""
    onnx.save(chain(1), tmp_path / "m.onnx")
    _, findings, evidence = verify_file(tmp_path / "m.onnx", CPU)
    assert [(f.code, f.op, f.severity) for f in findings] == [("QC303", "softmax", "error")]
    assert next(n for n in evidence.nodes if n.op_type == "QLinearSoftmax").verdict == "wrong"
