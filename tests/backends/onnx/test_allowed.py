"""Floats between codes that the artifact names with a reason: warnings, foretold and measured alike."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qcompiler.backends.onnx.evidence import verify_file
from qcompiler.backends.onnx.kernels import target
from qcompiler.verify.findings import Finding
from tests.backends.onnx.build import f32, model_of

CPU = target("ort-cpu")
GELU = ("div", "erf", "one", "mul", "half")
"""The ops of a Gelu as exporters write it; the runtime makes one op of them."""


def _chain(nodes: Sequence[onnx.NodeProto], first: str, last: str) -> onnx.ModelProto:
    """``x -> Q -> DQ -> nodes -> Q -> DQ -> y``."""
    quantize = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], "q0")
    into = helper.make_node("DequantizeLinear", ["xq", "s", "z"], [first], "dq0")
    out = helper.make_node("QuantizeLinear", [last, "s", "z"], ["yq"], "q1")
    back = helper.make_node("DequantizeLinear", ["yq", "s", "z"], ["y"], "dq1")
    constants = {
        "s": np.float32(0.02),
        "z": np.uint8(128),
        "sqrt2": np.float32(np.sqrt(2)),
        "c1": np.float32(1),
        "c05": np.float32(0.5),
    }
    used = {i for n in nodes for i in n.input} | {"s", "z"}
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items() if k in used]
    return model_of([quantize, into, *nodes, out, back], [f32("x", 4, 64)], [f32("y", 4, 64)], tensors, opset=17)


def _exp() -> onnx.ModelProto:
    return _chain([helper.make_node("Exp", ["a"], ["b"], "exp")], "a", "b")


def _gelu() -> onnx.ModelProto:
    div, erf, one, mul, half = GELU
    nodes = [
        helper.make_node("Div", ["a", "sqrt2"], ["a1"], div),
        helper.make_node("Erf", ["a1"], ["a2"], erf),
        helper.make_node("Add", ["a2", "c1"], ["a3"], one),
        helper.make_node("Mul", ["a", "a3"], ["a4"], mul),
        helper.make_node("Mul", ["a4", "c05"], ["b"], half),
    ]
    return _chain(nodes, "a", "b")


def _found(model: onnx.ModelProto, folder: Path, allowed: Mapping[str, str], *, run: bool) -> list[Finding]:
    if allowed:
        helper.set_model_props(model, {"qcompiler.allowed": json.dumps(allowed)})
    path = folder / "model.onnx"
    onnx.save(model, path)
    _, findings, _ = verify_file(path, CPU, run=run)
    return findings


@pytest.mark.parametrize("run", [False, True], ids=["static", "measured"])
@pytest.mark.parametrize(("make", "names"), [(_exp, ("exp",)), (_gelu, GELU)], ids=["exp", "gelu"])
def test_an_island_is_an_error_until_it_is_allowed(make, names, run: bool, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    strict = [f for f in _found(make(), tmp_path, {}, run=run) if f.code == "QC105"]
    assert strict
    assert {f.severity for f in strict} == {"error"}
    reason = "ONNX Runtime has no integer kernel for it"
    lenient = [f for f in _found(make(), tmp_path, dict.fromkeys(names, reason), run=run) if f.code == "QC105"]
    assert lenient
    assert {f.severity for f in lenient} == {"warning"}
    assert all(reason in f.reason for f in lenient)


@pytest.mark.parametrize("run", [False, True], ids=["static", "measured"])
def test_only_the_ops_that_are_named_are_allowed(run: bool, tmp_path: Path) -> None:
    findings = _found(_exp(), tmp_path, {"another": "no kernel"}, run=run)
    assert [f.severity for f in findings if f.code == "QC105"] == ["error"]


def test_a_weight_in_float_is_never_allowed(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((64, 8), np.int8), "w")
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wf"], "dq"),
        helper.make_node("Exp", ["wf"], ["we"], "exp"),
        helper.make_node("MatMul", ["x", "we"], ["y"], "mm"),
    ]
    scale = numpy_helper.from_array(np.asarray(np.float32(0.02)), "s")
    model = model_of(nodes, [f32("x", 4, 64)], [f32("y", 4, 8)], [weight, scale], opset=17)
    findings = _found(model, tmp_path, dict.fromkeys(("dq", "exp", "mm"), "why not"), run=False)
    assert [f.code for f in findings if f.severity == "error"] == ["QC101"]


def test_metadata_that_is_no_json_allows_nothing(tmp_path: Path) -> None:
    model = _exp()
    helper.set_model_props(model, {"qcompiler.allowed": "{exp"})
    onnx.save(model, tmp_path / "m.onnx")
    _, findings, _ = verify_file(tmp_path / "m.onnx", CPU, run=False)
    assert [f.severity for f in findings if f.code == "QC105"] == ["error"]
