"""Float against compiled: figures that another computation gives too, and the reason where there are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qcompiler.backends.onnx.quality import BLOCK, Difference, compare
from tests.acceptance.graphs import mlp, model, write


def test_a_model_against_itself_is_exact(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", mlp())
    found = compare(path, path)
    assert not isinstance(found, str)
    (figures,) = found.outputs.values()
    assert figures.cosine == pytest.approx(1.0, abs=1e-12)  # the rounding of a float64 dot product
    assert figures.sqnr_db == 999.0
    assert figures.max_abs == 0.0


def test_a_known_error_has_the_expected_ratio(tmp_path: Path) -> None:
    made = mlp()
    write(tmp_path / "float.onnx", made)
    down = numpy_helper.to_array(made.graph.initializer[1])
    made.graph.initializer[1].CopyFrom(numpy_helper.from_array((down * 1.01).astype(np.float32), "down.weight"))
    found = compare(tmp_path / "float.onnx", write(tmp_path / "other.onnx", made))
    assert not isinstance(found, str)
    (figures,) = found.outputs.values()
    # Every output is 1.01 of the float one: noise is 1 % of the signal, 40 dB; float32 rounding moves that by less.
    assert figures.sqnr_db == pytest.approx(40.0, abs=0.01)
    assert figures.cosine == pytest.approx(1.0, abs=1e-9)


def test_a_model_without_float_outputs_says_so(tmp_path: Path) -> None:
    node = helper.make_node("Shape", ["x"], ["y"], name="s")
    out = helper.make_tensor_value_info("y", onnx.TensorProto.INT64, [2])
    path = write(tmp_path / "m.onnx", model([node], [("x", ["b", 4])], [out], {}))
    assert compare(path, path) == "not compared: the model has no float output"


def test_batches_and_blocks_add_up_to_the_whole() -> None:
    rng, seen = np.random.default_rng(0), Difference()
    want = [rng.standard_normal(n).astype(np.float32) for n in (3, BLOCK + 5, 2 * BLOCK)]
    got = [w + 0.01 * rng.standard_normal(w.size).astype(np.float32) for w in want]
    for a, b in zip(want, got, strict=True):
        seen.add(a, b)
    a, b = np.concatenate(want).astype(np.float64), np.concatenate(got).astype(np.float64)
    figures = seen.figures()
    assert figures.cosine == pytest.approx(np.corrcoef(a, b)[0, 1], rel=1e-4)  # their means are near 0
    assert figures.cosine == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)), rel=1e-12)
    assert figures.sqnr_db == pytest.approx(10 * np.log10((a @ a) / ((a - b) @ (a - b))), rel=1e-9)
    assert figures.max_abs == np.abs(a - b).max()


def test_another_shape_has_no_figures() -> None:
    seen = Difference()
    seen.add(np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32))
    assert (seen.figures().cosine, seen.figures().sqnr_db, seen.figures().max_abs) == (None, None, None)


def test_floats_beside_integers_are_compared_alone(tmp_path: Path) -> None:
    nodes = [helper.make_node("Shape", ["x"], ["s"], name="s"), helper.make_node("Neg", ["x"], ["y"], name="n")]
    outs = [
        helper.make_tensor_value_info("s", onnx.TensorProto.INT64, [2]),
        helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["b", 4]),
    ]
    path = write(tmp_path / "m.onnx", model(nodes, [("x", ["b", 4])], outs, {}))
    found = compare(path, path)
    assert not isinstance(found, str)
    assert list(found.outputs) == ["y"]
