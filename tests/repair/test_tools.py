"""Models that onnxruntime.quantization wrote: every format and option that ends in a rejected graph, repaired."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto
from onnxruntime import quantization as ortq
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import qcompiler
from qcompiler.passes.lift_quantized import WAS_FLOAT
from tests.repair.harness import literal, optimized, repair, saved
from tests.support import require_data
from tests.verify.build import Array, Net, rng, rows

WIDTH, INNER, VOCAB, SIDE = 64, 128, 96, 8
Make = Callable[[Path], Path]


def floats(net: Net, name: str, *shape: int, seed: int = 0) -> str:
    return net.const(name, (rng(seed, *shape).standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32))


def perceptron() -> ModelProto:
    """Two Gemms, the second one the model's output: its float bias meets no output Q."""
    net = Net(17)
    net.input("x", ("M", WIDTH))
    h = net.op("Gemm", ["x", floats(net, "w1", WIDTH, INNER), floats(net, "b1", INNER)], "h", name="up")
    a = net.op("Relu", [h], "a", name="act")
    net.op("Gemm", [a, floats(net, "w2", INNER, WIDTH, seed=1), floats(net, "b2", WIDTH)], "y", name="down")
    net.output("y", shape=["M", WIDTH])
    return net.model()


def cnn() -> ModelProto:
    """Convolutions (plain and depthwise), a residual, pools, and a Tanh, which has no integer kernel."""
    net = Net(17)
    net.input("x", ("M", 4, SIDE, SIDE))
    c = net.op("Conv", ["x", floats(net, "w1", 8, 4, 3, 3), floats(net, "b1", 8)], "c", name="c1", pads=[1] * 4)
    r = net.op("Relu", [c], "r", name="relu")
    d = net.op("Conv", [r, floats(net, "w2", 8, 1, 3, 3)], "d", name="c2", pads=[1] * 4, group=8)
    s = net.op("Add", [r, d], "s", name="res")
    t = net.op("Tanh", [s], "t", name="tanh")
    p = net.op("MaxPool", [t], "p", name="pool", kernel_shape=[2, 2], strides=[2, 2])
    e = net.op("Conv", [p, floats(net, "w3", 4, 8, 1, 1)], "e", name="c3")
    net.op("GlobalAveragePool", [e], "y", name="gap")
    net.output("y", shape=["M", 4, 1, 1])
    return net.model()


def decoder() -> ModelProto:
    """A table, two products on rank-3 activations, a bias."""
    net = Net(17)
    net.input("ids", ("B", "M"), TensorProto.INT64)
    e = net.op("Gather", [floats(net, "table", VOCAB, WIDTH), "ids"], "e", name="embed")
    h = net.op("MatMul", [e, floats(net, "up.w", WIDTH, INNER)], "h", name="up")
    b = net.op("Add", [h, floats(net, "up.b", INNER)], "hb", name="up_bias")
    a = net.op("Relu", [b], "a", name="act")
    net.op("MatMul", [a, floats(net, "down.w", INNER, WIDTH)], "y", name="down")
    net.output("y", shape=["B", "M", WIDTH])
    return net.model()


FEEDS: dict[str, Callable[[int], dict[str, Array]]] = {
    "perceptron": lambda m: {"x": rows(("M", WIDTH), m)},
    "cnn": lambda m: {"x": rows(("M", 4, SIDE, SIDE), m)},
    "decoder": lambda m: {"ids": (np.arange(m) % VOCAB)[None]},
}
NETS: dict[str, Callable[[], ModelProto]] = {"perceptron": perceptron, "cnn": cnn, "decoder": decoder}


class Samples(ortq.CalibrationDataReader):  # type: ignore[misc]  # the base class has no types
    def __init__(self, feeds: Callable[[int], dict[str, Array]]) -> None:
        self.left: Iterator[dict[str, Array]] = iter([feeds(m) for m in (1, 4, 5)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.left, None)


def static(net: str, **options: Any) -> Make:
    def make(folder: Path) -> Path:
        onnx.save(NETS[net](), folder / "float.onnx")
        ortq.quantize_static(folder / "float.onnx", folder / "made.onnx", Samples(FEEDS[net]), **options)
        return folder / "made.onnx"

    return make


def dynamic(**options: Any) -> Make:
    def make(folder: Path) -> Path:
        onnx.save(decoder(), folder / "float.onnx")
        ortq.quantize_dynamic(folder / "float.onnx", folder / "made.onnx", **options)
        return folder / "made.onnx"

    return make


def nbits(bits: int, *, float_zeros: bool = False, **options: Any) -> Make:
    """``float_zeros``: the packed zero points in floats, as other exporters write them."""

    def make(folder: Path) -> Path:
        tool = MatMulNBitsQuantizer(decoder(), bits=bits, block_size=32, is_symmetric=False, **options)
        tool.process()
        model = tool.model.model
        for node in model.graph.node if float_zeros else ():
            if node.op_type == "MatMulNBits":
                _float_zeros(model, node)
        return saved(model, folder, "made.onnx")

    return make


def _float_zeros(model: ModelProto, node: Any) -> None:
    tensors = {t.name: t for t in model.graph.initializer}
    groups = onnx.numpy_helper.to_array(tensors[node.input[2]]).reshape(-1).size
    packed = onnx.numpy_helper.to_array(tensors[node.input[3]]).reshape(-1)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(-1)[:groups]
    tensors[node.input[3]].CopyFrom(onnx.numpy_helper.from_array(codes.astype(np.float32), node.input[3]))


S8, U8 = ortq.QuantType.QInt8, ortq.QuantType.QUInt8
QDQ, OPERATORS = ortq.QuantFormat.QDQ, ortq.QuantFormat.QOperator
FLOAT_BIAS = {"QuantizeBias": False}

MADE: dict[str, tuple[str, Make]] = {
    "nbits8-default": ("decoder", nbits(8)),
    "nbits2-default": ("decoder", nbits(2)),
    "nbits4-float-zeros": ("decoder", nbits(4, float_zeros=True)),
    "dynamic-table": ("decoder", dynamic()),
    "static-perceptron-s8s8": (
        "perceptron",
        static("perceptron", activation_type=S8, weight_type=S8, per_channel=True, extra_options=FLOAT_BIAS),
    ),
    "static-float-bias": ("perceptron", static("perceptron", weight_type=S8, extra_options=FLOAT_BIAS)),
    "static-u16": (
        "perceptron",
        static("perceptron", activation_type=ortq.QuantType.QUInt16, extra_options={"UseQDQContribOps": True}),
    ),
    "static-cnn": ("cnn", static("cnn", weight_type=S8, per_channel=True)),
    "static-cnn-s8": ("cnn", static("cnn", weight_type=S8, activation_type=S8, per_channel=True)),
    "static-cnn-operators": ("cnn", static("cnn", quant_format=OPERATORS, weight_type=S8, per_channel=True)),
    "static-cnn-no-output": (
        "cnn",
        static("cnn", weight_type=S8, op_types_to_quantize=["Conv"], extra_options={"DedicatedQDQPair": True}),
    ),
    "static-decoder-channel": ("decoder", static("decoder", weight_type=S8, per_channel=True)),
    "static-decoder-operators": ("decoder", static("decoder", quant_format=OPERATORS, weight_type=S8)),
    "static-decoder-s8": ("decoder", static("decoder", activation_type=S8, weight_type=S8)),
    "static-weights-4bit": (
        "perceptron",
        static("perceptron", weight_type=ortq.QuantType.QInt4, extra_options={"UseQDQContribOps": True}),
    ),
}


ACCEPTED = frozenset(
    {"dynamic-table", "static-perceptron-s8s8", "static-float-bias", "static-cnn-operators", "static-decoder-operators"}
)
"""What is accepted as it stands: repair keeps it so."""


@pytest.mark.parametrize("name", MADE)
def test_models_of_the_runtimes_own_tools(name: str, tmp_path: Path) -> None:
    net, make = MADE[name]
    out = repair(make(tmp_path), [FEEDS[net](m) for m in (1, 5)])
    assert bool(out.before) == (name not in ACCEPTED)
    assert not out.refusal
    assert out.report is not None and out.report.accepted
    assert all(s.status == "fused" or s.op == "float" or s.reason == WAS_FLOAT for s in out.report.sites)
    assert out.off <= out.allowed


FLOAT = {
    "onnx/ort_quantized/stories260K-nbits4-b32-sym.onnx": {"m.lm_head", "m.lm_head#2"},
    "onnx/ort_quantized/stories260K-static-qdq.onnx": {"m.lm_head"},
    "onnx/ort_quantized/stories260K-dyn-int8.onnx": set(),
    "onnx/mobilenetv2_qdq_int8/model.onnx": set(),
}
"""Trained model -> sites that were float in the source."""
LEAST = {
    "onnx/ort_quantized/stories260K-nbits4-b32-sym.onnx": 0.9999,  # f32 activations, as the source asks for
    "onnx/ort_quantized/stories260K-static-qdq.onnx": 0.9999,
    "onnx/ort_quantized/stories260K-dyn-int8.onnx": 0.999,  # the last product has int8 activations in blocks
    "onnx/mobilenetv2_qdq_int8/model.onnx": 0.998,  # as the runtime's own fusion, which gives the same bits
}
"""Trained model -> cosine of its first output with the literal one. A code near a tie may fall to the other side, since
sums are taken in int32 here and in f32 there; behind 50 convolutions that moves logits by a few steps."""


def feeds_of(path: Path) -> list[dict[str, Array]]:
    """One batch of plausible inputs of a trained model."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    out: dict[str, Array] = {}
    for i in session.get_inputs():
        shape = [d if isinstance(d, int) else {0: 1, 1: 12}.get(n, 224) for n, d in enumerate(i.shape)]
        whole = i.type.startswith("tensor(int")
        out[i.name] = np.arange(np.prod(shape)).reshape(shape) % 400 if whole else rng(9).standard_normal(shape)
        out[i.name] = out[i.name].astype(np.int64 if i.type == "tensor(int64)" else np.int32 if whole else np.float32)
    return [out]


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOAT)
def test_trained_models(name: str, tmp_path: Path) -> None:
    path = require_data(name)
    made = tmp_path / "repaired.onnx"
    report = qcompiler.compile(str(path), target="ort-cpu", recipe="repair", out=str(made)).report
    assert report.accepted
    assert {s.name for s in report.sites if s.reason == WAS_FLOAT} == FLOAT[name]
    assert all(s.status == "fused" for s in report.sites if s.reason is None)
    feeds = feeds_of(path)
    want, got = (np.asarray(f(p, feeds)[0][0], np.float64).reshape(-1) for f, p in ((literal, path), (optimized, made)))
    cosine = float(want @ got / np.sqrt((want @ want) * (got @ got)))
    print(f"{name}: cosine {cosine:.7f}")
    assert cosine >= LEAST[name]
    assert int(want.argmax()) == int(got.argmax())
    if "mobilenet" in name:
        assert np.array_equal(optimized(path, feeds)[0][0].reshape(-1), got)
