"""The graphs that ONNX Runtime computes wrongly (W1 to W9): rejected when they come in, and never written by repair.

Each is repaired where its meaning is plain, and its numbers are then those of NumPy; else it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import qcompiler
from qcompiler.backends.onnx.evidence import verify_file
from qcompiler.backends.onnx.kernels import target
from tests.repair.harness import EXACT, FREED, INT8_ACTIVATIONS, off_by, repair, saved
from tests.repair.test_corpus import every_case
from tests.verify.build import Case
from tests.verify.corpus_nbits import nbits


def errors(path: Path, chip: str = "ort-cpu") -> set[str]:
    _, findings, _ = verify_file(path, target(chip), run=False)
    return {f.code for f in findings if f.severity == "error"}


def nodes(path: Path) -> Iterator[onnx.NodeProto]:
    yield from onnx.load(path).graph.node


def sound(path: Path) -> None:
    """No artifact holds what W1 to W9 are made of."""
    model = onnx.load(path)
    constants = {t.name for t in model.graph.initializer} - {i.name for i in model.graph.input}
    made = {o: n for n in model.graph.node for o in n.output}
    for node in model.graph.node:
        attrs = {a.name: a.i for a in node.attribute}
        if node.op_type == "MatMulNBits":
            assert set(filter(None, node.input[1:4])) <= constants, "W1, W2, W7"
            assert len(node.input) < 5 or not node.input[4], "W5"
            assert attrs.get("bits", 4) == 4 or attrs.get("accuracy_level") == 4, "expanded"
            maker = made.get(node.input[0])
            assert maker is None or maker.op_type != "DequantizeLinear", "W9"
        if node.op_type in ("QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm"):
            shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
            assert all(len(shapes.get(i, ())) < 2 or i in node.input[:4] for i in node.input), "W4"
        assert node.op_type != "QMoE", "W8"


@pytest.mark.parametrize("name", ["nbits4-scales-input", "nbits4-scales-overridable", "nbits8-scales-input"])
def test_w1_scales_that_are_no_constants(name: str, tmp_path: Path) -> None:
    path = saved(every_case()[name].model, tmp_path)
    assert errors(path) == {"QC303"}
    assert "graph input" in repair(path, []).refusal


def computed_scales() -> Case:
    """W1 as an optimizer leaves it: the scales come from a Cast of constants."""
    case = nbits("scales-cast", acc=4)
    graph = case.model.graph
    scales = next(t for t in graph.initializer if t.name == "s")
    values = onnx.numpy_helper.to_array(scales).astype(np.float16)
    scales.CopyFrom(onnx.numpy_helper.from_array(values, "s16"))
    graph.node.insert(0, onnx.helper.make_node("Cast", ["s16"], ["s"], name="cast", to=onnx.TensorProto.FLOAT))
    return case


def test_w1_scales_that_are_cast_are_settled(tmp_path: Path) -> None:
    case = computed_scales()
    path = saved(case.model, tmp_path)
    assert errors(path) == {"QC303"}
    out = repair(path, case.feeds, expect=case.expect)
    assert not out.refusal
    assert out.off <= INT8_ACTIVATIONS
    sound(tmp_path / "repaired.onnx")


def test_w2_zero_points_that_are_no_constants(tmp_path: Path) -> None:
    path = saved(every_case()["nbits4-zp-input"].model, tmp_path)
    assert errors(path) == {"QC303"}
    assert "graph input" in repair(path, []).refusal


LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_LAYOUT", "ORT_ENABLE_ALL")


@pytest.mark.parametrize("level", LEVELS)
def test_w3_f16_weights_are_right_at_every_level(level: str, tmp_path: Path) -> None:
    """The runtime makes W1 of an f16 model with dequantized weights at EXTENDED and LAYOUT; ours leaves it nothing."""
    case = every_case()["wo-int4-f16"]
    path = saved(case.model, tmp_path)
    qcompiler.compile(str(path), target="ort-cpu", recipe="repair", out=str(tmp_path / "repaired.onnx"))
    sound(tmp_path / "repaired.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(str(tmp_path / "repaired.onnx"), options, providers=["CPUExecutionProvider"])
    assert case.expect is not None
    got = [session.run(None, f) for f in case.feeds]
    assert off_by(got, [[case.expect(f)] for f in case.feeds]) <= INT8_ACTIVATIONS


@pytest.mark.parametrize("name", ["w8a8-block", "w8a8-block-zero", "dyn-qdq-block"])
def test_w4_weights_in_blocks_under_quantized_activations(name: str, tmp_path: Path) -> None:
    case = every_case()[name]
    path = saved(case.model, tmp_path)
    assert "QC303" in errors(path)
    out = repair(path, case.feeds, expect=case.expect)
    assert not out.refusal
    assert out.off <= FREED
    sound(tmp_path / "repaired.onnx")


@pytest.mark.parametrize("name", ["int-QLinearMatMul-block", "int-DynamicQuantizeMatMul-block"])
def test_w4_integer_ops_with_scales_in_blocks_mean_nothing(name: str, tmp_path: Path) -> None:
    path = saved(every_case()[name].model, tmp_path)
    assert "QC303" in errors(path)
    assert "not one a channel" in repair(path, []).refusal


@pytest.mark.parametrize("name", ["nbits2-g_idx", "nbits2-g_idx-acc0"])
def test_w5_two_bits_with_g_idx(name: str, tmp_path: Path) -> None:
    case = every_case()[name]
    path = saved(case.model, tmp_path)
    assert "QC303" in errors(path)
    out = repair(path, case.feeds, expect=case.expect)
    assert not out.refusal
    assert out.off <= INT8_ACTIVATIONS
    sound(tmp_path / "repaired.onnx")


def shuffled(bits: int) -> Case:
    """g_idx that is no sequence of blocks: columns belong to groups in any order."""
    case = nbits(f"shuffled{bits}", bits=bits, acc=4, g_idx=True)
    graph = case.model.graph
    order = np.random.default_rng(1).permutation(256)
    index = next(t for t in graph.initializer if t.name == "g")
    groups = (np.argsort(order) // 64).astype(np.int32)
    index.CopyFrom(onnx.numpy_helper.from_array(groups, "g"))
    scales = next(t for t in graph.initializer if t.name == "s")
    wanted = np.arange(1, 5, dtype=np.float32)[None] * onnx.numpy_helper.to_array(scales)[:, :1]
    scales.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(wanted), "s"))
    packed = onnx.numpy_helper.to_array(next(t for t in graph.initializer if t.name == "b")).reshape(128, -1)
    per = 8 // bits
    codes = np.stack([packed >> (bits * i) & ((1 << bits) - 1) for i in range(per)], -1).reshape(128, -1)[:, :256]
    value = (codes.astype(np.float64) - (1 << (bits - 1))) * wanted.astype(np.float64)[:, groups]
    case.expect = lambda f: f["x"].astype(np.float64) @ value.T
    return case


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_g_idx_becomes_an_order_of_columns(bits: int, tmp_path: Path) -> None:
    case = shuffled(bits)
    path = saved(case.model, tmp_path)
    assert errors(path)
    out = repair(path, case.feeds, expect=case.expect)
    assert not out.refusal
    assert out.off <= INT8_ACTIVATIONS
    assert "Gather" in {n.op_type for n in nodes(tmp_path / "repaired.onnx")}
    sound(tmp_path / "repaired.onnx")


@pytest.mark.parametrize("name", ["w8a8-u8s8-channel", "dyn-s8-channel", "conv2d"])
def test_w6_saturation_without_vnni(name: str, tmp_path: Path) -> None:
    """On AVX2 without VNNI pairs of u8 x s8 products overflow: the same codes are stored 128 higher."""
    case = every_case()[name]
    path = saved(case.model, tmp_path)
    assert "QC303" in errors(path, "ort-cpu:avx2")
    report = qcompiler.compile(
        str(path), target="ort-cpu:avx2", recipe="repair", out=str(tmp_path / "repaired.onnx")
    ).report
    assert report.accepted
    assert all(".u8u8" in k for s in report.sites for k in s.kernel.values())
    assert not errors(tmp_path / "repaired.onnx", "ort-cpu:avx2")


def test_w7_table_lookup_with_scales_that_are_no_constants(tmp_path: Path) -> None:
    case = nbits("lut", bits=2, acc=0, scales="input")
    case.model.metadata_props.add(key="qcompiler.session", value="mlas.use_lut_gemm=1")
    path = saved(case.model, tmp_path)
    assert errors(path)
    assert "graph input" in repair(path, []).refusal


@pytest.mark.parametrize("name", ["moe-2-g16", "moe-2-g32", "moe-4-rows"])
def test_w8_experts_that_are_expanded_or_rounded(name: str, tmp_path: Path) -> None:
    path = saved(every_case()[name].model, tmp_path)
    assert "QC104" in errors(path)
    assert repair(path, []).refusal


@pytest.mark.parametrize("name", ["dyn-qdq-bias", "dynamic-bias-known-shape"])
def test_w9_dynamic_products_with_a_bias(name: str, tmp_path: Path) -> None:
    case = every_case()[name]
    path = saved(case.model, tmp_path)
    assert errors(path)
    out = repair(path, case.feeds)
    assert not out.refusal
    assert out.off <= EXACT
    sound(tmp_path / "repaired.onnx")


@pytest.mark.parametrize("name", ["float8-weight", "float8-both"])
def test_float8_pairs_that_do_not_load(name: str, tmp_path: Path) -> None:
    path = saved(every_case()[name].model, tmp_path)
    assert errors(path)
    assert "f8e4m3 codes have no kernel" in repair(path, []).refusal
