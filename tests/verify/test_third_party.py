"""Models that other tools quantized: the verdict, and what the runtime itself shows of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto
from onnxruntime import quantization as ortq
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from qcompiler.backends.onnx.evidence import verify_file
from qcompiler.backends.onnx.kernels import target
from qcompiler.backends.onnx.worker import Worker
from qcompiler.errors import InputError
from qcompiler.verify.findings import Finding
from tests.support import require_data
from tests.verify.build import Array, Case, Net, rng, rows
from tests.verify.measure import measure

WIDTH, INNER, VOCAB = 128, 256, 96


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as found:
        yield found


def decoder() -> ModelProto:
    """A table, two products, a bias and a Relu: float."""
    net, r = Net(17), rng(1)
    net.input("ids", ("B", "M"), TensorProto.INT64)
    const = lambda name, *shape: net.const(name, r.standard_normal(shape).astype(np.float32))  # noqa: E731
    e = net.op("Gather", [const("table", VOCAB, WIDTH), "ids"], "e", name="embed")
    h = net.op("MatMul", [e, const("up.w", WIDTH, INNER)], "h", name="up")
    b = net.op("Add", [h, const("up.b", INNER)], "hb", name="up_bias")
    a = net.op("Relu", [b], "a", name="act")
    net.op("MatMul", [a, const("down.w", INNER, WIDTH)], "y", name="down")
    net.output("y", shape=["B", "M", WIDTH])
    return net.model()


def perceptron() -> ModelProto:
    """Two Gemms with a Relu between: what static quantization is made for."""
    net, r = Net(17), rng(2)
    net.input("x", ("M", WIDTH))
    const = lambda name, *shape: net.const(name, r.standard_normal(shape).astype(np.float32))  # noqa: E731
    h = net.op("Gemm", ["x", const("w1", WIDTH, INNER), const("b1", INNER)], "h", name="up")
    a = net.op("Relu", [h], "a", name="act")
    net.op("Gemm", [a, const("w2", INNER, WIDTH), const("b2", WIDTH)], "y", name="down")
    net.output("y", shape=["M", WIDTH])
    return net.model()


class Samples(ortq.CalibrationDataReader):  # type: ignore[misc]  # the base class has no types
    def __init__(self) -> None:
        self.left: Iterator[dict[str, Array]] = iter([{"x": rows(("M", WIDTH), m)} for m in (4, 8)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.left, None)


def nbits(bits: int, accuracy: int | None = None, embeddings: bool = False) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        ops = ("MatMul", "Gather") if embeddings else ("MatMul",)
        tool = MatMulNBitsQuantizer(
            decoder(), bits=bits, block_size=32, is_symmetric=False, accuracy_level=accuracy, op_types_to_quantize=ops
        )
        tool.process()
        onnx.save(tool.model.model, folder / "nbits.onnx")
        return folder / "nbits.onnx"

    return make


def dynamic(**options: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        onnx.save(decoder(), folder / "float.onnx")
        ortq.quantize_dynamic(folder / "float.onnx", folder / "dynamic.onnx", **options)
        return folder / "dynamic.onnx"

    return make


def static(**options: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        onnx.save(perceptron(), folder / "float.onnx")
        ortq.quantize_static(folder / "float.onnx", folder / "static.onnx", Samples(), **options)
        return folder / "static.onnx"

    return make


def ids_of(m: int) -> dict[str, Array]:
    return {"ids": (np.arange(m) % VOCAB)[None]}


def values_of(m: int) -> dict[str, Array]:
    return {"x": rows(("M", WIDTH), m)}


MADE: dict[str, tuple[Callable[[Path], Path], Callable[[int], dict[str, Array]], int, frozenset[str]]] = {
    # name: (how, inputs, elements of the smallest weight, expected error codes)
    "nbits4": (nbits(4), ids_of, WIDTH * INNER, frozenset()),
    "nbits4-table": (nbits(4, embeddings=True), ids_of, WIDTH * INNER, frozenset()),
    "nbits4-acc4": (nbits(4, 4), ids_of, WIDTH * INNER, frozenset()),
    "nbits8-default": (nbits(8), ids_of, WIDTH * INNER, frozenset({"QC104"})),
    "nbits8-acc4": (nbits(8, 4), ids_of, WIDTH * INNER, frozenset()),
    "dynamic": (dynamic(op_types_to_quantize=["MatMul"]), ids_of, WIDTH * INNER, frozenset()),
    "dynamic-channel-u8": (
        dynamic(op_types_to_quantize=["MatMul"], per_channel=True, weight_type=ortq.QuantType.QUInt8),
        ids_of,
        WIDTH * INNER,
        frozenset(),
    ),
    "dynamic-table": (dynamic(), ids_of, VOCAB * WIDTH, frozenset()),
    "static-u8s8": (static(weight_type=ortq.QuantType.QInt8), values_of, WIDTH * INNER, frozenset()),
    "static-s8s8-channel": (
        static(weight_type=ortq.QuantType.QInt8, activation_type=ortq.QuantType.QInt8, per_channel=True),
        values_of,
        WIDTH * INNER,
        frozenset(),
    ),
    "static-operators": (static(quant_format=ortq.QuantFormat.QOperator), values_of, WIDTH * INNER, frozenset()),
    "static-u16": (
        static(activation_type=ortq.QuantType.QUInt16, extra_options={"UseQDQContribOps": True}),
        values_of,
        WIDTH * INNER,
        frozenset({"QC101"}),
    ),
}


def errors(findings: list[Finding]) -> list[Finding]:
    return [f for f in findings if f.severity == "error"]


@pytest.mark.parametrize("name", MADE)
def test_models_of_the_runtimes_own_tools(name: str, worker: Worker, tmp_path: Path) -> None:
    make, inputs, weights, codes = MADE[name]
    path = make(tmp_path)
    case = Case(name, onnx.load(path), [inputs(1), inputs(5)], None, (), weights)
    (seen,) = measure([case])
    labels = {n.name for n in case.model.graph.node}
    for run in (True, False):
        sites, findings, evidence = verify_file(path, target("ort-cpu"), run=run, worker=worker)
        bad = errors(findings)
        assert bool(bad) == bool(seen.bad), (run, seen, [str(f) for f in bad])
        assert {f.code for f in bad} == codes
        assert {f.op for f in bad} <= labels
        assert sites
        assert evidence.kind == ("measured" if run else "static")


KNOWN: dict[str, tuple[frozenset[str], int]] = {
    # file -> (error codes, sites)
    "onnx/ort_quantized/stories260K-nbits4-b32-sym.onnx": (frozenset(), 35),
    "onnx/ort_quantized/stories260K-dyn-int8.onnx": (frozenset({"QC101"}), 36),
    "onnx/ort_quantized/stories260K-static-qdq.onnx": (frozenset({"QC105"}), 46),
    "onnx/mobilenetv2_qdq_int8/model.onnx": (frozenset(), 53),
    "onnx/magika_v3_3/model.onnx": (frozenset(), 0),
    "onnx/silero/silero_vad_16k_op15.onnx": (frozenset(), 0),
    "onnx/bert_toy_optimized.onnx": (frozenset(), 0),
}


@pytest.mark.parametrize("run", [True, False], ids=["run", "static"])
@pytest.mark.parametrize("name", KNOWN)
def test_trained_models(name: str, run: bool, worker: Worker) -> None:
    codes, count = KNOWN[name]
    sites, findings, evidence = verify_file(require_data(name), target("ort-cpu"), run=run, worker=worker)
    assert {f.code for f in errors(findings)} == codes
    assert len(sites) == count
    if not count:
        assert any("nothing quantized" in n for n in evidence.notes)


def test_a_model_of_another_toolchain_does_not_load(worker: Worker) -> None:
    path = require_data("onnx/qonnx-TFC_2W2A.onnx")
    _, findings, _ = verify_file(path, target("ort-cpu"), worker=worker)
    (found,) = errors(findings)
    assert found.code == "QC902"
    assert "onnx.brevitas" in found.reason


CONSERVATIVE = {"dup_qdq.onnx"}
"""Rejected without a run, fused by the runtime: a dequantize and a quantize of other scales that it joins."""


def test_every_model_of_the_runtimes_tests_is_judged(worker: Worker) -> None:
    """No file crashes the verifier; what it foretells of quantized ones is what the runtime does."""
    folder = require_data("ort_corpus")
    judged = quantized = 0
    differ = set()
    for path in sorted(folder.rglob("*.onnx")):
        try:
            _, findings, evidence = verify_file(path, target("ort-cpu"), run=False, worker=worker)
        except InputError:
            continue
        judged += 1
        assert evidence.kind == "static"
        if not evidence.nodes and not findings:
            assert any("nothing quantized" in n for n in evidence.notes), path
            continue
        quantized += 1
        _, seen, _ = verify_file(path, target("ort-cpu"), run=True, worker=worker)
        if bool(errors(seen)) != bool(errors(findings)):
            differ.add(path.name)
    print(f"{judged} files judged; {quantized - len(differ)} of {quantized} quantized ones foretold as they run")
    assert differ == CONSERVATIVE
    assert (judged, quantized) >= (500, 40)
