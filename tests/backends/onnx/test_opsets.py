"""Raising the opset of a model: it computes the same bits, or is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper

from qcompiler.backends.onnx.emit import emit_onnx
from qcompiler.backends.onnx.load import load_onnx, opset_of
from qcompiler.backends.onnx.opsets import raised
from qcompiler.errors import InputError
from tests import realmodels
from tests.acceptance.graphs import model
from tests.support import require_data


def outputs(path: Path, feed: Mapping[str, Any]) -> list[Any]:
    """What the runtime computes without its optimizer."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return list(ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, dict(feed)))


@pytest.mark.parametrize("name", ["mnist", "super-resolution", "yunet", "bert-toy"])
def test_raised_models_compute_the_same(name: str, tmp_path: Path) -> None:
    require_data("onnx", "mnist")
    real = realmodels.model(name)
    was = load_onnx(real.fetch(tmp_path))
    now = raised(was, 21, "the test")
    assert opset_of(was) < 21
    assert opset_of(now) == 21
    assert [v.name for v in now.outputs] == [v.name for v in was.outputs]
    assert {op.loc.name for op in was} <= {op.loc.name for op in now} | {""}
    feed = real.calibration(1)[0]
    for graph in (was, now):
        emit_onnx(graph, tmp_path / f"{opset_of(graph)}.onnx")
    want, got = (outputs(tmp_path / f"{opset_of(g)}.onnx", feed) for g in (was, now))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("op", "count", "opset", "attrs", "why"),
    [
        ("GroupNormalization", 2, 18, {"num_groups": 2}, "leaves onnx.GroupNormalization 'norm' with another meaning"),
        ("BatchNormalization", 4, 8, {"spatial": 0}, "onnx cannot convert it: .*spatial must have value 1"),
    ],
)
def test_a_model_that_cannot_be_raised_is_refused(op: str, count: int, opset: int, attrs: Any, why: str) -> None:
    given = {name: np.ones(4 if count == 4 else 2, np.float32) for name in "abcd"[:count]}
    nodes = [helper.make_node(op, ["x", *given], ["y"], name="norm", **attrs)]
    made = model(nodes, [("x", [1, 4, 3, 3])], [("y", [1, 4, 3, 3])], given)
    made.opset_import[0].version = opset
    with pytest.raises(InputError, match=f"the test needs opset 21, the model has {opset}, and .*{why}"):
        raised(load_onnx(made), 21, "the test")
