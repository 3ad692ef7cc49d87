"""How integer ops are written for torch: names, shared codes, element types, padding, and what cannot be written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from qcompiler import numerics
from qcompiler.backends.torch.emit import to_graph_module
from qcompiler.backends.torch.packing import PACKED
from qcompiler.dtypes import BF16, F16, F32, UINT8, DType
from qcompiler.errors import InputError
from qcompiler.ir import Graph, Hole, Op, TensorType, Value
from qcompiler.payload import constant
from qcompiler.scheme import parse_scheme
from qcompiler.spec import check
from tests.backends.onnx.integer import Case, conv, linear_dyn, linear_static, wrong
from tests.backends.torch.integer import ANY_CHIP, aten, narrowed, ran
from tests.backends.torch.proof import lower, run

DYNAMIC = parse_scheme("uint8 tensor asym dynamic")


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def names(graph: Graph) -> list[str]:
    return [op.name.removesuffix(".default") for op in graph]


def layers(count: int, *, with_conv: bool = False) -> Graph:
    """Linears on one activation, and a convolution on it too."""
    graph = Graph("main", "aten")
    x = graph.add_input("x", TensorType(F32, (2, 6, 8) if with_conv else ("m", 8)))

    def add(case: Case, word: str, shape: Sequence[int | str]) -> None:
        consts: list[Value | None] = [
            None if a is None else graph.add_const(f"{word}.{j}", constant(a)) for j, a in enumerate(case.arrays[1:])
        ]
        result = [(f"{word}_y", TensorType(F32, tuple(shape)))]
        graph.add_output(graph.create(case.name, [x, *consts], case.attrs | {"site": word}, result).result)

    for i in range(count):
        add(linear_dyn(rng(i), 4, 8), f"layer{i}", (2, 6, 4) if with_conv else ("m", 4))
    if with_conv:
        add(conv(rng(), 4, 6, (3,), (8,), dynamic=True), "conv", (2, 4, 6))
    check(graph)
    return graph


def test_layers_that_share_an_activation_quantize_it_once() -> None:
    graph = lower(layers(3), ANY_CHIP)
    assert names(graph) == ["qcompiler.quantize_dynamic"] + ["qcompiler.qlinear"] * 3
    assert [op.label for op in graph] == ["layer0.quantize", "layer0", "layer1", "layer2"]
    x = rng().standard_normal((3, 8)).astype(np.float32)
    for i, y in enumerate(run(graph, x)):
        case = linear_dyn(rng(i), 4, 8)
        case.arrays[0] = x
        assert wrong(case, y) <= 1


def test_a_linear_and_a_convolution_share_too() -> None:
    graph = lower(layers(1, with_conv=True), ANY_CHIP)
    assert names(graph) == ["qcompiler.quantize_dynamic", "qcompiler.qlinear", "qcompiler.qconv"]


def test_chosen_parameters_and_codes_come_from_one_call() -> None:
    graph = Graph("main", "aten")
    x = graph.add_input("x", TensorType(F32, ("m", 5)))
    kind = [("s", TensorType(F32, ())), ("z", TensorType(UINT8, ()))]
    s, z = graph.create("q.choose_qparams", [x], {"scheme": DYNAMIC}, kind).results
    c = graph.create("q.quantize", [x, s, z], {"scheme": DYNAMIC}, [("c", TensorType(UINT8, ("m", 5)))]).result
    y = graph.create("q.dequantize", [c, s, z], {"scheme": DYNAMIC}, [("y", TensorType(F32, ("m", 5)))]).result
    graph.add_output(y)
    check(graph)
    values = rng().standard_normal((4, 5)).astype(np.float32)
    scale, zero = numerics.evaluate_all("q.choose_qparams", [values], {"scheme": DYNAMIC})
    codes = numerics.quantize(values, scale, zero, DYNAMIC)
    lower(graph, ANY_CHIP)
    assert names(graph) == ["qcompiler.quantize_dynamic", "aten.to.dtype", "aten.sub.Tensor", "aten.mul.Tensor"]
    np.testing.assert_array_equal(run(graph, values)[0], numerics.dequantize(codes, scale, zero, DYNAMIC, F32))


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_quantize_of_the_model_itself_is_read_only_where_it_comes_first(first: bool) -> None:
    graph = layers(1)
    x, (layer,) = graph.inputs[0], list(graph)
    types = [("q", TensorType(UINT8, ("m", 8))), ("s", TensorType(F32, ())), ("z", TensorType(UINT8, ()))]
    attrs = {"args": (Hole(0),), "unpack": True}
    name = "qcompiler.quantize_dynamic.default"
    own = graph.create(name, [x], attrs, types, before=layer if first else None)
    graph.add_output(own.results[0])
    assert names(lower(graph, ANY_CHIP)).count(name.removesuffix(".default")) == (1 if first else 2)
    y, _ = run(graph, rng().standard_normal((3, 8)).astype(np.float32))
    assert y.shape == (3, 4)


def only(graph: Graph, word: str) -> Op:
    (found,) = [op for op in graph if op.name == f"qcompiler.{word}.default"]
    return found


def test_weights_stay_as_they_are_and_scales_are_one_a_channel() -> None:
    case = linear_static(rng(), 6, 8, x="uint8 tensor sym", w="int8 tensor sym")
    op = only(ran(case).graph, "qlinear")
    weight, scale, zero = op.operand(3), op.operand(4), op.operand(2)
    assert weight is not None and scale is not None and zero is not None
    assert weight.name == "c3" and scale.tensor == TensorType(F32, (6,))
    assert weight.payload is not None and scale.payload is not None and zero.payload is not None
    np.testing.assert_array_equal(weight.payload.array(), case.arrays[3])
    np.testing.assert_array_equal(scale.payload.array(), np.full(6, case.arrays[4]))
    assert zero.payload.array() == 0, "a symmetric activation has no zero point of its own"


@pytest.mark.parametrize(("element", "more"), [(F32, []), (BF16, []), (F16, ["aten.to.dtype"])])
def test_results_are_written_in_the_model_s_type(element: DType, more: list[str]) -> None:
    """oneDNN writes f32 and bf16; f16 comes of f32."""
    done = ran(narrowed(linear_dyn(rng(), 4, 8), element))
    assert names(done.graph) == ["qcompiler.quantize_dynamic", "qcompiler.qlinear", *more]
    assert done.graph.outputs[0].tensor.dtype == element
    assert only(done.graph, "qlinear").loc.name == "head"
    bias = only(done.graph, "qlinear").operand(5)
    assert bias is not None and bias.tensor.dtype == F32


def test_the_parameters_of_a_bf16_activation_are_f32() -> None:
    case = narrowed(linear_dyn(rng(), 16, 8), BF16)
    x = case.arrays[0]
    assert x is not None
    got = ran(case).result
    np.testing.assert_array_equal(got, case.wanted.astype(np.float32))
    assert numerics.evaluate_all("q.choose_qparams", [x], {"scheme": DYNAMIC})[0].dtype == np.float32


@pytest.mark.parametrize(("pads", "padded"), [((1, 2, 1, 2), False), ((1, 0, 0, 2), True)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_uneven_padding_is_written_before_the_kernel(pads: tuple[int, ...], padded: bool, dynamic: bool) -> None:
    case = conv(rng(), 4, 3, (2, 3), (5, 5), dynamic=dynamic, coded=False, attrs={"pads": pads})
    done = ran(case)
    assert ("aten.constant_pad_nd" in names(done.graph)) == padded
    assert wrong(case, done.result) <= 1


def test_padding_by_an_open_size_cannot_be_written() -> None:
    attrs = {"auto_pad": "SAME_UPPER", "strides": (2, 2)}
    case = conv(rng(), 4, 3, (3, 3), (5, 5), dynamic=True, attrs=attrs)
    assert wrong(case, ran(case).result) <= 1
    with pytest.raises(InputError, match=r"q\.conv_dyn 'conv' is padded by sizes that are open"):
        lower(aten(case, (2,)), ANY_CHIP)
    attrs["strides"] = (1, 1)
    case = conv(rng(), 4, 3, (3, 3), (5, 5), dynamic=True, attrs=attrs)
    assert only(lower(aten(case, (0, 2, 3)), ANY_CHIP), "qconv").attrs["args"][7] == (1, 1)


def test_weights_that_are_no_constants_cannot_be_written() -> None:
    case = linear_dyn(rng(), 4, 8)
    case.inputs = (0, 1)
    with pytest.raises(InputError, match=r"'head': the codes .* no constant"):
        lower(aten(case), ANY_CHIP)


def test_a_layer_chain_on_codes_stays_on_codes() -> None:
    """static -> static: the codes of the first are those that the second reads."""
    first, second = (linear_static(rng(i), 8, 8, y="uint8 tensor asym", bias=False) for i in (0, 1))
    graph = aten(first)
    y = graph.outputs[0]
    consts = [None if a is None else graph.add_const(f"d{j}", constant(a)) for j, a in enumerate(second.arrays)]
    consts[1:3] = [graph.local("c7"), graph.local("c8")]  # its activation has the parameters of that result
    z = graph.create("q.linear_static", [y, *consts[1:]], second.attrs | {"site": "next"}, [("z", y.type)]).result
    graph.set_output(0, z)
    check(graph)
    lower(graph, ANY_CHIP)
    assert names(graph) == ["qcompiler.qlinear"] * 2
    x = first.arrays[0]
    assert x is not None
    codes = run(graph, x)[-1]
    middle = first.wanted
    wanted = Case("q.linear_static", [middle, first.arrays[7], first.arrays[8], *second.arrays[3:]], second.attrs)
    assert int(np.abs(codes.astype(int) - wanted.wanted.astype(int)).max()) <= 1


def test_a_lowered_graph_is_exported_saved_and_loaded(tmp_path: Path) -> None:
    graph = lower(layers(2), ANY_CHIP)
    module = to_graph_module(graph)
    x = torch.randn(3, 8)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("m", min=1, max=512)},))
    torch.export.save(program, tmp_path / "layers.pt2")
    loaded = torch.export.load(tmp_path / "layers.pt2").module()
    held = len(PACKED)
    for m in (1, 3, 70):
        x = torch.randn(m, 8)
        for got, wanted in zip(loaded(x), module(x), strict=True):
            assert torch.equal(got, wanted)
    assert len(PACKED) <= held + 4, "each weight of each module is packed once"
    kinds = {k: v.dtype for k, v in program.state_dict.items()} | {k: v.dtype for k, v in program.constants.items()}
    assert sum(t is torch.int8 for t in kinds.values()) == 2
