"""Corrected biases bring the mean outputs of a quantized model back, and ask for data."""

from typing import Any

import numpy as np
import pytest

from qcompiler.backends.onnx.running import runnable
from qcompiler.calibrate.calibrator import Calibrator
from qcompiler.calibrate.data import open_data
from qcompiler.errors import CalibrationError
from qcompiler.payload import constant
from qcompiler.pipeline import Context, run
from qcompiler.reader import parse
from qcompiler.recipe import parse_line

NET = """graph @main dialect=onnx {
  input %x: f32[1, 6, 9, 9]
  const %a.weight: f32[8, 6, 3, 3] = rand:1
  const %a.bias: f32[8] = rand:2
  const %b.weight: f32[8, 8, 3, 3] = rand:3
  %a: f32[1, 8, 9, 9] = onnx.Conv(%x, %a.weight, %a.bias) {pads = [1, 1, 1, 1]}
  %r: f32[1, 8, 9, 9] = onnx.Relu(%a)
  %y: f32[1, 8, 9, 9] = onnx.Conv(%r, %b.weight) {pads = [1, 1, 1, 1]}
  return %y
}"""
QUANTIZE = 'insert-qdq{weights = "int4 channel sym", convs = "int4 channel sym"}'


def batches() -> list[dict[str, Any]]:
    rng = np.random.default_rng(4)
    return [{"x": rng.uniform(0, 1, (1, 6, 9, 9)).astype(np.float32)} for _ in range(8)]


def outputs(recipe: str) -> Any:
    graph = parse(NET)
    run(graph, parse_line(recipe).passes, Context(calibration=Calibrator(open_data(batches()), runnable)))
    with runnable(graph, []) as compute:
        return np.concatenate([compute(feed)["y"] for feed in batches()]).astype(np.float64)


def test_means_come_back_and_errors_shrink() -> None:
    real, plain, corrected = (outputs(r) for r in ("dce", QUANTIZE, f"{QUANTIZE}, correct-bias"))

    def shift(y: Any) -> float:
        return float(np.abs((y - real).mean(axis=(0, 2, 3))).max())

    assert shift(corrected) < 0.1 * shift(plain)  # what is left comes through the Relu between the layers
    assert np.square(corrected - real).mean() < 0.9 * np.square(plain - real).mean()


def test_data_is_asked_for() -> None:
    with pytest.raises(CalibrationError, match="calibration"):
        run(parse(NET), parse_line(f"{QUANTIZE}, correct-bias").passes, Context())
    run(parse(NET), parse_line("correct-bias").passes, Context())  # nothing to correct, nothing to measure


@pytest.mark.parametrize("rounding", ["nearest", "balanced"])
def test_a_layer_whose_weight_is_float_again_has_its_own_bias(rounding: str) -> None:
    graph = parse(NET)
    ctx = Context(calibration=Calibrator(open_data(batches()), runnable))
    activations = 'insert-activation-qdq{activations = "uint8 tensor asym", skip = ["a", "b"]}'
    quantize = QUANTIZE.replace("}", f', rounding = "{rounding}"}}')
    run(graph, parse_line(f"{quantize}, correct-bias, {activations}, dce").passes, ctx)
    assert [op.name for op in graph] == ["onnx.Conv", "onnx.Relu", "onnx.Conv"]
    first, _, last = graph
    real = parse(NET).consts
    bias = real["a.bias"].payload
    for conv, name in ((first, "a.weight"), (last, "b.weight")):
        weight, want = conv.operand(1), real[name].payload
        assert weight is not None and weight.payload is not None and want is not None
        assert np.array_equal(weight.payload.array(), want.array())
    for conv, want in ((first, bias.array() if bias is not None else None), (last, np.zeros(8, np.float32))):
        value = conv.operand(2)
        assert value is not None and value.payload is not None
        assert np.array_equal(value.payload.array(), want)


def test_a_bias_far_above_its_weights_fits_into_the_kernel() -> None:
    graph = parse(NET)
    weight, bias = graph.consts["a.weight"], np.float32([0, 3, -4, 0, 5, 6, 7, 8])
    assert weight.payload is not None
    channels = np.float32([1, 1, 1e-12, 1, 0, 1, 1, 1])
    weight.payload = constant(weight.payload.array() * channels[:, None, None, None])
    graph.consts["a.bias"].payload = constant(bias)
    ctx = Context(calibration=Calibrator(open_data(batches()), runnable))
    activations = 'insert-activation-qdq{activations = "uint8 tensor asym"}'
    recipe = f'insert-qdq{{weights = "int8 channel sym", convs = "int8 channel sym"}}, {activations}, fold-constants'
    run(graph, parse_line(recipe).passes, ctx)
    conv = next(op for op in graph if op.name == "onnx.Conv")
    makers = [v.owner for v in conv.operands[:2] if v is not None]
    scales = [v.payload.array() for op in makers if op is not None for v in op.operands[1:2] if v and v.payload]
    steps = np.abs(bias / (scales[0].astype(np.float64) * scales[1]))
    assert steps.max() < 2**31
    assert np.array_equal(steps > 2**29, channels < 1)  # only where the floor held
