"""How integer ops are written: names, shared quantizes, stored bytes, old opsets, and what cannot be written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qcompiler import api, numerics
from qcompiler.backends.onnx.building import int32_bias
from qcompiler.backends.onnx.emit import emit_onnx
from qcompiler.backends.onnx.evidence import verify_file
from qcompiler.backends.onnx.judge import sites_of
from qcompiler.backends.onnx.kernels import target
from qcompiler.dtypes import BOOL, F32, UINT8
from qcompiler.errors import InputError, RejectedError
from qcompiler.ir import Graph, TensorType
from qcompiler.passes.choose_layout import ChooseLayout
from qcompiler.payload import constant
from qcompiler.pipeline import Context
from qcompiler.scheme import parse_scheme
from qcompiler.spec import check
from tests.backends.onnx.build import f32, model_of
from tests.backends.onnx.integer import Case, apply, conv, linear_dyn, linear_static, matmul, ran, wrong
from tests.backends.onnx.proof import lower, run

STATIC, DYNAMIC = parse_scheme("uint8 tensor asym"), parse_scheme("uint8 tensor asym dynamic")


def rng() -> np.random.Generator:
    return np.random.default_rng(1)


# -- activations at the edge ---------------------------------------------------------------------------------


def edges(*, opset: int = 17, dynamic: bool = False) -> Graph:
    """``x`` quantized, moved, and dequantized again; by constant parameters or by chosen ones."""
    graph = Graph()
    graph.meta["opset_import"] = (("", opset),)
    x = graph.add_input("x", TensorType(F32, ("m", 5)))
    if dynamic:
        kind = [("s", TensorType(F32, ())), ("z", TensorType(UINT8, ()))]
        s, z = graph.create("q.choose_qparams", [x], {"scheme": DYNAMIC}, kind).results
    else:
        s, z = graph.add_const("s", constant(np.float32(0.02))), graph.add_const("z", constant(np.uint8(100)))
    attrs = {"scheme": DYNAMIC if dynamic else STATIC}
    c = graph.create("q.quantize", [x, s, z], attrs, [("c", TensorType(UINT8, ("m", 5)))]).result
    t = graph.create("onnx.Transpose", [c], {"perm": (1, 0)}, [("t", TensorType(UINT8, (5, "m")))]).result
    y = graph.create("q.dequantize", [t, s, z], attrs, [("y", TensorType(F32, (5, "m")))]).result
    graph.add_output(y)
    check(graph)
    return graph


@pytest.mark.parametrize("opset", [8, 10, 13, 17, 21])
def test_quantize_and_dequantize_at_every_opset(opset: int) -> None:
    graph = lower(edges(opset=opset))
    domain = "com.microsoft" if opset < 10 else "onnx"
    assert [op.name for op in graph] == [f"{domain}.QuantizeLinear", "onnx.Transpose", f"{domain}.DequantizeLinear"]
    x = rng().standard_normal((4, 5)).astype(np.float32) * 2
    (y,) = run(graph, [{"x": x}]).outputs[0]
    s, z = np.float32(0.02), np.asarray(np.uint8(100))
    codes = numerics.quantize(x, np.asarray(s), z, STATIC)
    np.testing.assert_array_equal(y, numerics.dequantize(codes.T, np.asarray(s), z, STATIC, F32))


def test_chosen_parameters_and_codes_come_from_one_node() -> None:
    graph = lower(edges(dynamic=True))
    assert [op.name for op in graph] == ["onnx.DynamicQuantizeLinear", "onnx.Transpose", "onnx.DequantizeLinear"]
    x = rng().standard_normal((4, 5)).astype(np.float32)
    (y,) = run(graph, [{"x": x}]).outputs[0]
    step = (max(x.max(), 0) - min(x.min(), 0)) / 255
    assert np.abs(y - x.T).max() <= step * 0.51


def test_a_rescale_is_a_multiplication() -> None:
    graph = Graph()
    x = graph.add_input("x", TensorType(F32, ("m", 5)))
    s = graph.add_const("s", constant(np.arange(1, 6, dtype=np.float32)))
    graph.add_output(graph.create("q.scale", [x, s], {}, [("y", TensorType(F32, ("m", 5)))]).result)
    (op,) = list(lower(graph))
    assert op.name == "onnx.Mul"
    assert op.label == "y"


# -- an activation that several layers quantize --------------------------------------------------------------


def shared(count: int, *, with_conv: bool = False) -> Graph:
    graph = Graph()
    x = graph.add_input("x", TensorType(F32, (2, 6, 8) if with_conv else ("m", 8)))
    for i in range(count):
        case = linear_dyn(np.random.default_rng(i), 4, 8)
        consts = [
            None if a is None else graph.add_const(f"c{i}.{j}", constant(a)) for j, a in enumerate(case.arrays[1:])
        ]
        shape = (2, 6, 4) if with_conv else ("m", 4)
        attrs = case.attrs | {"site": f"layer{i}"}
        graph.add_output(graph.create("q.linear_dyn", [x, *consts], attrs, [(f"y{i}", TensorType(F32, shape))]).result)
    if with_conv:
        case = conv(rng(), 4, 6, (3,), (8,), dynamic=True)
        consts = [None if a is None else graph.add_const(f"w{j}", constant(a)) for j, a in enumerate(case.arrays[1:])]
        graph.add_output(
            graph.create("q.conv_dyn", [x, *consts], case.attrs, [("c", TensorType(F32, (2, 4, 6)))]).result
        )
    check(graph)
    return graph


def test_layers_that_share_an_activation_quantize_it_once() -> None:
    graph = lower(shared(3), "ort-cpu:avx512vnni")
    names = [op.name.rpartition(".")[2] for op in graph]
    assert names == ["DynamicQuantizeLinear"] + ["MatMulIntegerToFloat"] * 3
    assert [op.label for op in graph] == ["x.quantize", "layer0", "layer1", "layer2"]
    x = rng().standard_normal((3, 8)).astype(np.float32)
    outputs = run(graph, [{"x": x}]).outputs[0]
    for i, y in enumerate(outputs):
        case = linear_dyn(np.random.default_rng(i), 4, 8)
        case.arrays[0] = x
        assert wrong(case, y) <= 1


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_quantize_of_the_model_itself_is_read_only_where_it_comes_first(first: bool) -> None:
    graph = shared(1)
    x, (layer,) = graph.inputs[0], list(graph)
    types = [("q", TensorType(UINT8, ("m", 8))), ("s", TensorType(F32, ())), ("z", TensorType(UINT8, ()))]
    own = graph.create("onnx.DynamicQuantizeLinear", [x], {}, types, before=layer if first else None)
    graph.add_output(own.results[0])
    names = [op.name.rpartition(".")[2] for op in lower(graph, "ort-cpu:avx512vnni")]
    assert names.count("DynamicQuantizeLinear") == (1 if first else 2)
    y, _ = run(graph, [{"x": rng().standard_normal((3, 8)).astype(np.float32)}]).outputs[0]
    assert y.shape == (3, 4)


def test_one_layer_alone_quantizes_inside() -> None:
    assert [op.name for op in lower(shared(1))] == ["com.microsoft.DynamicQuantizeMatMul"]


def test_a_convolution_and_a_layer_share_too() -> None:
    names = [op.name.rpartition(".")[2] for op in lower(shared(1, with_conv=True), "ort-cpu:avx512vnni")]
    assert names.count("DynamicQuantizeLinear") == 1
    assert "MatMulIntegerToFloat" in names
    assert "ConvInteger" in names


def test_a_quantize_inside_a_branch_is_not_seen_outside() -> None:
    """What a branch makes exists in that branch alone: the layer outside gets a quantize of its own."""
    graph = Graph()
    x = graph.add_input("x", TensorType(F32, ("m", 8)))
    choice = graph.add_input("choice", TensorType(BOOL, ()))
    case = linear_dyn(rng(), 4, 8)

    def layer(into: Graph, name: str) -> None:
        consts = [
            None if a is None else graph.add_const(f"{name}.{j}", constant(a)) for j, a in enumerate(case.arrays[1:])
        ]
        made = into.create(
            "q.linear_dyn", [x, *consts], case.attrs | {"site": name}, [(name, TensorType(F32, ("m", 4)))]
        )
        into.add_output(made.result)

    branch = graph.create("onnx.If", [choice], {}, [("either", TensorType(F32, ("m", 4)))])
    layer(graph.add_region(branch, "then_branch"), "one")
    layer(graph.add_region(branch, "else_branch"), "other")
    graph.add_output(branch.result)
    layer(graph, "outside")
    check(graph)
    lower(graph, "ort-cpu:avx512vnni")
    data = rng().standard_normal((3, 8)).astype(np.float32)
    case.arrays[0] = data
    for way in (True, False):
        for y in run(graph, [{"x": data, "choice": np.asarray(way)}]).outputs[0]:
            assert wrong(case, y) <= 1


# -- behind a ConvInteger ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    ("w", "bias", "size", "behind"),
    [
        ("int8 channel sym", True, (3, 4), ["BatchNormalization"]),
        ("int8 channel sym", False, (3, 4), ["BatchNormalization"]),
        ("int8 tensor asym", True, (3, 4), ["BatchNormalization"]),
        ("int8 tensor sym", False, (3, 4), ["Mul"]),  # by one number: nothing is broadcast along channels
        ("int8 channel sym", True, (256, 256), ["BatchNormalization"]),
        ("int8 channel sym", True, (257, 256), ["Mul", "Add"]),
        ("int8 channel sym", False, (128, 128), ["BatchNormalization"]),
        ("int8 channel sym", False, (129, 128), ["Mul"]),
    ],
)
def test_sums_are_scaled_and_biased_by_one_node_unless_they_are_many(
    dynamic: bool, w: str, bias: bool, size: tuple[int, int], behind: list[str]
) -> None:
    case = conv(rng(), 4, 2, (1, 1), size, w=w, bias=bias, batch=1, dynamic=dynamic, coded=False)
    done = ran(case)
    names = [op.name.rpartition(".")[2] for op in done.graph]
    step = ["Mul"] if dynamic else []
    assert names[names.index("Cast") + 1 :] == [*step, *behind]
    assert done.result.shape == case.wanted.shape
    assert wrong(case, done.result) <= 1


def test_a_batch_of_unknown_size_does_not_make_sums_many() -> None:
    graph = conv(rng(), 4, 2, (3,), (9,), dynamic=True).graph()
    (x,), (op,) = graph.inputs, list(graph)
    x.type, op.result.type = TensorType(F32, ("n", 2, "t")), TensorType(F32, ("n", 4, "u"))
    assert list(lower(graph))[-1].name == "onnx.BatchNormalization"
    for shape in ((1, 2, 3), (3, 2, 20)):
        case = conv(rng(), 4, 2, (3,), (shape[2],), dynamic=True, batch=shape[0])
        case.arrays[1:] = conv(rng(), 4, 2, (3,), (9,), dynamic=True).arrays[1:]
        (y,) = run(graph, [case.feed]).outputs[0]
        assert wrong(case, y) <= 1


def test_convolutions_of_as_many_channels_share_what_neither_scales_nor_shifts() -> None:
    """The mean 0 and the variance 1 of 4 channels are there once."""
    graph = Graph()
    x = graph.add_input("x", TensorType(F32, (2, 2, 9)))
    for i in range(2):
        case = conv(rng(), 4, 2, (3,), (9,), dynamic=True)
        consts = [
            None if a is None else graph.add_const(f"c{i}.{j}", constant(a)) for j, a in enumerate(case.arrays[1:])
        ]
        attrs = case.attrs | {"site": f"layer{i}"}
        y = graph.create("q.conv_dyn", [x, *consts], attrs, [(f"y{i}", TensorType(F32, (2, 4, 7)))])
        graph.add_output(y.result)
    one, other = (op for op in lower(graph) if op.name == "onnx.BatchNormalization")
    assert one.operands[3:] == other.operands[3:]
    assert one.operand(1) is not other.operand(1)
    assert one.attrs["epsilon"] == 0.0


# -- chips, opsets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chip", ["sse", "avx2", "avx512"])
def test_without_vnni_no_int8_weight_meets_a_uint8_activation(chip: str) -> None:
    """The same codes are stored 128 higher: the artifact's numbers are those of the other chips (law L8)."""
    y = "uint8 tensor asym"
    cases = [
        linear_static(rng(), 9, 20),
        linear_static(rng(), 9, 20, y=y),
        linear_static(rng(), 9, 20, y=y, bias=False),
        linear_dyn(rng(), 9, 20),
        conv(rng(), 8, 4, (3, 3), (7, 7)),
        conv(rng(), 8, 4, (3, 3), (7, 7), dynamic=True),
        matmul(rng(), (3, 4), (4, 5), b="int8 tensor sym", inputs=(0,)),
    ]
    for case in cases:
        here, there = ran(case, f"ort-cpu:{chip}"), ran(case, "ort-cpu:avx512vnni")
        kept = [v for v in here.graph.consts.values() if v.tensor.dtype is not None and v.tensor.dtype.name == "int8"]
        assert not kept, case.name
        np.testing.assert_array_equal(here.result, there.result)


def test_a_site_tells_its_scheme_whatever_the_layout() -> None:
    for chip in ("avx2", "avx512vnni"):
        (site,) = sites_of(lower(linear_static(rng(), 9, 20).graph(), f"ort-cpu:{chip}"))
        assert (site.name, site.scheme, site.bytes["codes"], site.bytes["scales"]) == (
            "head",
            "int8 channel sym",
            180,
            36,
        )
        (site,) = sites_of(lower(conv(rng(), 8, 4, (3,), (7,), dynamic=True).graph(), f"ort-cpu:{chip}"))
        assert (site.name, site.scheme, site.bytes["codes"], site.bytes["scales"]) == (
            "conv",
            "int8 channel sym",
            96,
            32,
        )


def test_old_models_get_the_nodes_that_need_no_opset() -> None:
    y = "uint8 tensor asym"
    for case, node in (
        (conv(rng(), 8, 4, (3, 3), (7, 7)), "com.microsoft.QLinearConv"),
        (linear_static(rng(), 9, 20, y=y, bias=False), "com.microsoft.MatMulIntegerToFloat"),
        (linear_dyn(rng(), 9, 20), "com.microsoft.DynamicQuantizeMatMul"),
    ):
        done = ran(case, opset=9)
        assert done.node(node).label == case.attrs["site"]
        assert wrong(case, done.result) <= 1


# -- what cannot be written ----------------------------------------------------------------------------------


def test_a_bias_beyond_int32_names_channel_and_numbers(tmp_path: Path) -> None:
    case = conv(rng(), 4, 2, (3,), (9,))
    bias = case.arrays[6]
    assert bias is not None
    bias[2] = 1e9
    graph = lower(case.graph())
    with pytest.raises(
        InputError, match=r"'conv': the bias 1e\+09 of channel 2 is .* int32 ends at 2147483647; 1 of 4"
    ):
        emit_onnx(graph, tmp_path / "m.onnx")


def test_int32_bias_rounds_to_the_nearest_step() -> None:
    bias, w = np.asarray([1.0, -0.26, 0.0], np.float32), np.asarray([0.5, 0.25, 1.0], np.float32)
    np.testing.assert_array_equal(int32_bias(bias, np.asarray(np.float32(0.1)), w, "s"), [20, -10, 0])


def test_weights_that_are_no_constants_are_refused() -> None:
    case = linear_static(rng(), 4, 8)
    case.inputs = (0, 3)
    with pytest.raises(InputError, match=r"the codes %x3 is no constant"):
        lower(case.graph())


def test_an_op_without_a_site_and_without_a_kernel_is_a_finding() -> None:
    graph = apply(rng(), "Softmax", [(2, 3, 4)], attrs={"axis": 0}).graph()
    ctx = Context(target=target("ort-cpu"))
    ChooseLayout().run(graph, ctx)
    (found,) = ctx.findings
    assert (found.code, found.op, found.severity) == ("QC203", "y", "error")
    assert "another axis than the last" in found.reason


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic"])
def test_w8a8_for_cuda_is_rejected_whole(recipe: str, tmp_path: Path) -> None:
    """Not left in float and called accepted: nobody asked for that."""
    weight = numpy_helper.from_array(rng().standard_normal((64, 64)).astype(np.float32), "w")
    made = model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "mm")], [f32("x", 4, 64)], [f32("y", 4, 64)], [weight]
    )
    onnx.save(made, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=np.ones((4, 64), np.float32))
    with pytest.raises(RejectedError, match=r"QC201 .* no kernel that computes on int8 activations"):
        api.compile(
            tmp_path / "m.onnx",
            target="ort-cuda:sm_90",
            recipe=recipe,
            calibration=tmp_path / "x.npz",
            out=tmp_path / "o.onnx",
        )
    assert not (tmp_path / "o.onnx").exists()


# -- the artifact --------------------------------------------------------------------------------------------

Y = "uint8 tensor asym"


@pytest.mark.parametrize(
    "case",
    [
        linear_static(rng(), 32, 64),
        linear_static(rng(), 32, 64, y=Y),
        linear_static(rng(), 32, 64, y=Y, bias=False),
        linear_static(rng(), 32, 64, (2, 3), w="int8 tensor asym"),
        linear_dyn(rng(), 32, 64, (2, 3)),
        conv(rng(), 8, 4, (3, 3), (9, 9)),
        conv(rng(), 6, 6, (3, 3), (9, 9), attrs={"group": 6}),
        conv(rng(), 8, 4, (3,), (9,), dynamic=True),
        matmul(rng(), (3, 4), (2, 4, 5), a="int8 tensor sym", inputs=(3,)),
        matmul(rng(), (2, 3, 4), (2, 4, 5), b="int8 tensor sym", y=Y, inputs=(0,)),
    ],
    ids=lambda c: c.name.removeprefix("q."),
)
def test_what_is_written_is_accepted_and_measured(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    emit_onnx(lower(case.graph(), "ort-cpu"), path)
    for run_it in (False, True):
        (site,), findings, evidence = verify_file(path, target("ort-cpu"), run=run_it)
        assert not findings
        assert (site.name, site.status, site.evidence) == (
            case.attrs["site"],
            "fused",
            "measured" if run_it else "static",
        )
        assert site.bytes["codes"] > 0
        assert site.bytes["scales"] > 0
    assert {n.verdict for n in evidence.nodes} == {"fused"}
