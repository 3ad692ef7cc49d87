"""Weights that a simplifier has folded back to float: their codes are found again on the lattice of their values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, numpy_helper

import qcompiler
from qcompiler.spellings import lattice
from tests.repair.harness import repair, saved
from tests.repair.test_corpus import every_case
from tests.verify.build import Array, Net, rng, rows

BITS = {2: (-2, 1), 4: (-8, 7), 8: (-128, 127)}


def simplified(model: ModelProto) -> ModelProto:
    """``model`` with every DequantizeLinear of constants folded, as a simplifier does it: in f32, rounded once."""
    out = ModelProto()
    out.CopyFrom(model)
    values = {t.name: t for t in out.graph.initializer}
    for node in list(out.graph.node):
        if node.op_type != "DequantizeLinear" or node.input[0] not in values:
            continue
        codes, scale = (numpy_helper.to_array(values[n]).astype(np.float32) for n in node.input[:2])
        zero = numpy_helper.to_array(values[node.input[2]]).astype(np.float32) if len(node.input) > 2 else np.float32(0)
        attrs = {a.name: a.i for a in node.attribute}
        axis = attrs.get("axis", 1)

        def wide(small: Array, codes: Array = codes, attrs: dict[str, int] = attrs, axis: int = axis) -> Array:
            if small.ndim == 0 or small.size == 1:
                return small.reshape(())
            if attrs.get("block_size", 0):
                return np.repeat(small, attrs["block_size"], axis=axis)[tuple(map(slice, codes.shape))]
            return small.reshape([-1 if i == axis else 1 for i in range(codes.ndim)])

        folded = ((codes - wide(np.asarray(zero))) * wide(scale)).astype(np.float32)
        out.graph.initializer.append(numpy_helper.from_array(folded, node.output[0]))
        out.graph.node.remove(node)
    return out


@pytest.mark.parametrize("name", ["w8a8-u8s8-channel", "w8a8-u8s8-tensor-q", "w8a8-asym", "conv2d", "conv-depthwise"])
def test_integer_products_get_their_codes_back(name: str, tmp_path: Path) -> None:
    """A float weight behind a quantized activation is a float product on a dequantized tensor until it has codes."""
    case = every_case()[name]
    out = repair(saved(simplified(case.model), tmp_path), case.feeds)
    assert out.before
    assert not out.refusal
    assert {k.rpartition("/")[2].partition(".")[0] for k in out.kernels} <= {
        "QLinearMatMul",
        "MatMulIntegerToFloat",
        "QLinearConv",
    }
    assert out.off <= out.allowed


@pytest.mark.parametrize("name", ["wo-int4-b32", "wo-uint4-b32-zero", "wo-int8-channel", "wo-int2-b32"])
def test_weight_only_products_get_their_codes_back(name: str, tmp_path: Path) -> None:
    """Nothing in such a graph is quantized any more, and nothing rejects it: it is only 4 to 16 times too big."""
    case = every_case()[name]
    model = simplified(case.model)
    out = repair(saved(model, tmp_path), case.feeds)
    assert not out.refusal
    assert out.report is not None
    (site,) = out.report.sites
    bits = int(name.removeprefix("wo-").lstrip("uint")[0])
    assert (site.status, int(site.scheme.lstrip("uint")[0])) == ("fused", bits)
    assert sum(site.bytes.values()) < 0.4 * site.before
    assert out.off <= out.allowed


def test_a_trained_float_weight_stays_float(tmp_path: Path) -> None:
    """One product with codes, one without: the second is listed, and its bytes are untouched."""
    net, r = Net(21), rng(4)
    net.input("x", ("M", 64))
    codes = r.integers(-127, 128, (64, 64)).astype(np.int8)
    f = net.op("DequantizeLinear", [net.const("w", codes), net.const("s", np.float32([0.01]))], "f", name="dq")
    h = net.op("MatMul", ["x", f], "h", name="first")
    net.op("MatMul", [h, net.const("v", r.standard_normal((64, 16)).astype(np.float32))], "y", name="second")
    net.output("y", shape=["M", 16])
    feeds = [{"x": rows(("M", 64), m)} for m in (1, 5)]
    out = repair(saved(net.model(), tmp_path), feeds)
    assert out.before
    assert out.report is not None
    assert {s.name: (s.status, s.reason) for s in out.report.sites} == {
        "first": ("fused", None),
        "v": ("skipped", "was float in the source"),
    }
    made = {t.name: t for t in onnx.load(tmp_path / "repaired.onnx").graph.initializer}
    assert np.array_equal(numpy_helper.to_array(made["v"]), numpy_helper.to_array(net.consts[-1]))
    assert out.off <= out.allowed


def test_a_float_model_is_told_that_there_is_nothing_to_repair(tmp_path: Path) -> None:
    net = Net(17)
    net.input("x", ("M", 64))
    net.op("MatMul", ["x", net.const("w", rng(5).standard_normal((64, 64)).astype(np.float32))], "y", name="mm")
    net.output("y")
    path = saved(net.model(), tmp_path)
    with pytest.raises(qcompiler.InputError, match=r"finds nothing quantized.*w4a16"):
        qcompiler.compile(str(path), target="ort-cpu", recipe="repair", out=str(tmp_path / "out.onnx"))


# -- the maths ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([0, 16, 32]),
    asym=st.booleans(),
    half=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_values_come_back_bit_for_bit(bits: int, group: int, asym: bool, half: bool, seed: int) -> None:
    r = np.random.default_rng(seed)
    kind = np.float16 if half else np.float32
    n, k = 3, 80
    low, high = BITS[bits]
    groups = -(-k // (group or k))
    scale = (r.uniform(0.5, 1.5, (n, groups)) * 10.0 ** r.integers(-3, 1)).astype(kind)
    zero = r.integers(low, high + 1, (n, groups)) if asym else np.zeros((n, groups), np.int64)
    codes = r.integers(low, high + 1, (n, k))
    at = np.arange(k) // (group or k)
    weight = ((codes - zero[:, at]).astype(kind) * scale[:, at]).astype(kind)
    found = lattice.find(weight)
    assert found is not None
    again = lattice.codes_of(weight, found).astype(np.int64)
    spread = np.arange(k) // (found.group or k)
    middle = 0 if found.zero is None else found.zero.astype(np.int64)[:, spread]
    assert np.array_equal((again - middle).astype(kind) * found.scale[:, spread], weight)
    assert again.min() >= found.element.qmin and again.max() <= found.element.qmax
    assert found.element.bits <= max(bits, 4 if asym else bits)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(4, 64))
def test_random_floats_lie_on_no_lattice(seed: int, k: int) -> None:
    row = np.random.default_rng(seed).standard_normal(k).astype(np.float32)
    assert lattice.step_of(row) is None


def test_one_value_off_the_lattice_is_seen() -> None:
    row = np.arange(-40, 40).astype(np.float32) * np.float32(0.013)
    assert lattice.step_of(row) is not None
    row[17] = np.nextafter(row[17], np.float32(np.inf), dtype=np.float32)
    assert lattice.step_of(row) is None
