"""Graphs that hold float and codebook codes: their bytes, the laws of their ops, what a check of a pass allows them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler import numerics, recipe
from qcompiler.agreement import codes_differing
from qcompiler.calibrate.histogram import Histogram
from qcompiler.calibrate.ranges import entropy_range, mse_range, squared_error
from qcompiler.clipping import affine_params
from qcompiler.debug import step_text
from qcompiler.dtypes import F32, F64, TABLE, Array, from_bytes, to_bytes
from qcompiler.errors import RecipeError, StructureError
from qcompiler.ir import Graph, Op
from qcompiler.pair_bounds import activation_gap, code_range, weight_gap
from qcompiler.passes.insert_activation_qdq import InsertActivationQdq
from qcompiler.payload import RandomPayload, constant
from qcompiler.pipeline import Context, run
from qcompiler.reader import parse
from qcompiler.requests import request_of
from qcompiler.scheme import Alternatives, parse_scheme
from qcompiler.smoothing import product_error
from qcompiler.spec import check
from qcompiler.target import KernelRow, Target
from qcompiler.text import show

WEIGHTS = [
    "nf4 g64 sym",
    "f4e2m1 g64 sym",
    "f4e2m1 g32 sym scale=f8e8m0",
    "f4e2m1 g16 sym scale=f8e4m3",
    "f8e4m3 channel sym",
    "f8e5m2 tensor sym",
    "f8e4m3 b16x32 sym",
]

# -- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4", "f4e2m1"])
def test_four_bits_are_packed_low_first(name: str) -> None:
    """Codes 7 and 15 in one byte are 0xf7 in MXFP4, NVFP4 and MatMulNBits; a last half byte is zero."""
    element = TABLE[name]
    codes = np.array([7, 15, 1], np.uint8).view(element.storage)
    assert to_bytes(codes, element) == b"\xf7\x01"
    assert constant(codes, element).nbytes == 2
    assert from_bytes(b"\xf7\x01", element, (3,)).view(np.uint8).tolist() == [7, 15, 1]


@pytest.mark.parametrize("name", ["nf4", "f4e2m1", "f8e4m3", "f8e8m0"])
def test_random_codes_print_and_read_back(name: str) -> None:
    graph = Graph()
    graph.add_const("c", RandomPayload(3, TABLE[name], (4, 6)))
    text = show(graph)
    again = parse(text)
    assert show(again) == text
    one, other = (g.consts["c"].payload for g in (graph, again))
    assert one is not None
    assert other is not None
    assert one.array().tobytes() == other.array().tobytes()


# -- laws ----------------------------------------------------------------------------------------------------------

GOOD = {
    "linear": 'q.linear(%x, %c, %s) {scheme = <f8e4m3 b4x8 sym axis=1>, site = "a"}',
    "linear_dyn": "q.linear_dyn(%x, %c, %s) {scheme = <f8e4m3 b4x8 sym axis=1>, x_scheme = <f8e4m3 token sym dynamic>}",
    "blocks": "q.linear_dyn(%x, %c, %s) {scheme = <f8e4m3 b4x8 sym axis=1>, x_scheme = <f8e4m3 b1x8 sym dynamic>}",
}


def linear(call: str, scales: str = "2, 3") -> Graph:
    return parse(
        "graph @main dialect=onnx {\n  input %x : f32[batch, 20]\n  const %c : f8e4m3[7, 20] = rand:1\n"
        f"  const %s : f32[{scales}] = rand:2\n  %y : f32[batch, 7] = {call}\n  return %y\n}}\n"
    )


@pytest.mark.parametrize("call", GOOD.values(), ids=GOOD)
def test_blocks_of_a_linear_have_one_scale_each(call: str) -> None:
    graph = linear(call)
    check(graph)
    assert show(parse(show(graph))) == show(graph)
    with pytest.raises(StructureError, match=r"the scale has shape \[7, 3\], the scheme asks for \[2, 3\]"):
        check(linear(call, "7, 3"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q.choose_qparams(%x) {scheme = <f8e4m3 token sym dynamic>}", None),
        ("q.choose_qparams(%x) {scheme = <int8 b1x20 sym dynamic>}", None),
        ("q.choose_qparams(%x) {scheme = <f8e4m3 b1x8 sym dynamic>}", r"shape \[4, 1\], the scheme asks for \[4, 3\]"),
        ("q.choose_qparams(%x) {scheme = <f8e4m3 token sym dynamic>, a = 1}", None),
    ],
)
def test_parameters_of_rows(line: str, message: str | None) -> None:
    graph = parse(f"graph @main dialect=onnx {{\n  input %x : f32[4, 20]\n  %s : f32[4, 1] = {line}\n  return %s\n}}\n")
    if message is None:
        check(graph)
        return
    with pytest.raises(StructureError, match=message):
        check(graph)


def test_a_convolution_has_one_scale_of_its_activation() -> None:
    graph = parse(
        "graph @main dialect=onnx {\n  input %x : f32[1, 4, 8, 8]\n  const %c : int8[8, 4, 3, 3] = rand:1\n"
        "  const %s : f32[8] = rand:2\n  %y : f32[1, 8, 6, 6] = q.conv_dyn(%x, %c, %s) "
        '{scheme = <int8 channel sym axis=0>, x_scheme = <int8 token sym dynamic>, site = "a"}\n  return %y\n}\n'
    )
    with pytest.raises(StructureError, match="a convolution has one scale for all of its activation"):
        check(graph)


# -- what a check allows -------------------------------------------------------------------------------------------


def pair(weight: Array, text: str, factor: float = 1.0, clip: Any = "absmax") -> tuple[Op, Op]:
    """A weight, quantized with scales that are ``factor`` times what they should be."""
    scheme = parse_scheme(text).with_axis(None if "tensor" in text else 0 if "channel" in text else 1)
    scale = (numerics.choose_qparams(weight, scheme, clip)[0] * factor).astype(np.float32)
    graph = Graph()
    x, s = graph.add_const("w", constant(weight)), graph.add_const("s", constant(scale))
    quantize = graph.create("q.quantize", [x, s], {"scheme": scheme}, [("c", None)])  # type: ignore[list-item]
    return quantize, graph.create("q.dequantize", [quantize.result, s], {"scheme": scheme}, [("d", x.type)])


@pytest.mark.parametrize("text", WEIGHTS)
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_a_pair_stays_within_half_a_gap_and_no_further(text: str, size: float) -> None:
    weight = (np.random.default_rng(2).standard_normal((48, 128)) * size).astype(np.float32)
    weight[0, :3] = [0.0, 1e-20, -0.0]
    gap = weight_gap(*pair(weight, text), shrunk=False)
    assert gap is not None
    assert gap.fits, gap.text
    for factor in (0.5, 4.0):
        wrong = weight_gap(*pair(weight, text, factor), shrunk=False)
        assert wrong is not None
        # Two exponents more cost e5m2 nothing here: it has them to spare.
        assert wrong.fits == (factor == 4.0 and text.startswith("f8e5m2"))


@pytest.mark.parametrize("text", ["nf4 g64 sym", "f4e2m1 g64 sym", "f8e4m3 channel sym"])
def test_a_shrunken_range_stays_within_what_it_cuts_off(text: str) -> None:
    weight = np.random.default_rng(2).standard_t(4, (48, 128)).astype(np.float32)
    gap = weight_gap(*pair(weight, text, clip="mse"), shrunk=True)
    assert gap is not None
    assert gap.fits, gap.text
    wrong = weight_gap(*pair(weight, text, 0.3), shrunk=True)
    assert wrong is not None
    assert not wrong.fits


def test_an_activation_stays_within_half_a_gap() -> None:
    scheme = parse_scheme("f8e4m3 token sym dynamic")
    x = np.random.default_rng(3).standard_normal((5, 64)).astype(np.float32) * np.arange(5, dtype=np.float32)[:, None]
    (scale,) = numerics.evaluate_all("q.choose_qparams", [x], {"scheme": scheme})
    codes = numerics.quantize(x, scale, None, scheme)
    seen = numerics.dequantize(codes, scale, None, scheme, F32)
    assert activation_gap(x, seen, scale, scheme.dtype, covered=None).fits
    assert not activation_gap(x, seen * np.float32(1.1), scale, scheme.dtype, covered=None).fits
    static = parse_scheme("f8e4m3 tensor sym")
    assert code_range(0.5, 0.0, static) == (-224.0, 224.0)
    assert activation_gap(np.array([500.0]), np.array([224.0]), 0.5, static.dtype, covered=(-224.0, 224.0)).fits


def test_codes_may_differ_by_a_gap_near_a_tie() -> None:
    scheme = parse_scheme("f8e4m3 tensor sym")
    before, after = (np.array([v, 1.0, -448.0]).astype(scheme.dtype.storage) for v in (256.0, 288.0))
    assert codes_differing(before, before, None, 0.0, scheme).fits
    assert codes_differing(before, after, np.array([272.1, 1.0, -500.0]), 0.2, scheme).fits
    assert not codes_differing(before, after, np.array([260.0, 1.0, -448.0]), 0.2, scheme).fits
    assert codes_differing(before, after, None, 0.1, scheme).fits
    far = np.array([352.0, 1.0, -448.0]).astype(scheme.dtype.storage)
    assert not codes_differing(before, far, None, 0.1, scheme).fits
    assert not codes_differing(before, far[:2], None, 0.1, scheme).fits


# -- ranges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["f8e4m3 tensor sym", "f8e5m2 tensor sym", "nf4 tensor sym"])
def test_the_error_of_a_bin_is_that_of_many_values_in_it(text: str) -> None:
    scheme = parse_scheme(text)
    left, right = np.array([-3.0, -0.5, 0.0, 0.99, 2.0, 0.7]), np.array([-2.5, -0.1, 0.3, 1.3, 2.0, 0.7])
    counts = np.array([3.0, 1.0, 2.0, 5.0, 4.0, 1.0])
    ends = (-0.4, 1.2)
    scale, _ = affine_params(np.array(ends[0]), np.array(ends[1]), scheme, F32)
    expected = 0.0
    for a, b, n in zip(left, right, counts, strict=True):
        x = np.linspace(a, b, 200_001)
        codes = numerics.quantize(x, scale.astype(np.float64), None, scheme)
        back = numerics.dequantize(codes, scale.astype(np.float64), None, scheme, F64)
        expected += n * float(np.square(x - back).mean())
    found = squared_error(left, right, counts, ends, scheme)
    assert found == pytest.approx(expected, rel=1e-4)  # the sum of 200001 points stands for an integral


def test_ranges_of_float_codes() -> None:
    """Floats bear an outlier, which evenly spaced codes of 8 bits are better off without."""
    x = np.random.default_rng(4).standard_normal(300_000).astype(np.float32)
    x[0] = 40.0
    histogram = Histogram(4096)
    histogram.add(x)
    assert mse_range(histogram, parse_scheme("int8 tensor sym"))[1] < 20
    assert mse_range(histogram, parse_scheme("f8e4m3 tensor sym"))[1] > 35
    with pytest.raises(RecipeError, match="even steps"):
        entropy_range(histogram, parse_scheme("f8e4m3 tensor sym"))


# -- searches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["nf4 channel sym", "f8e4m3 channel sym", "f8e4m3 tensor sym", "f4e2m1 g64 sym"])
def test_smoothing_weighs_float_codes(text: str) -> None:
    rng = np.random.default_rng(5)
    weight, rows = rng.standard_normal((24, 64)).astype(np.float32), rng.standard_normal((8, 64)).astype(np.float32)
    scheme = parse_scheme(text)
    want = rows @ weight.T
    found = product_error(want, rows, weight, np.ones(64, np.float32), scheme)
    oriented = scheme.with_axis({"channel": 0, "group": 1, "tensor": None}[scheme.granularity])
    scale, _ = numerics.choose_qparams(weight, oriented)
    back = numerics.dequantize(numerics.quantize(weight, scale, None, oriented), scale, None, oriented, F64)
    noise = np.square(rows.astype(np.float64) @ back.T - want).sum()
    assert found == pytest.approx(noise / np.square(want.astype(np.float64)).sum(), rel=1e-3)  # sums in f32


# -- alternatives --------------------------------------------------------------------------------------------------

LINE = 'insert-activation-qdq{activations = "uint8 tensor asym dynamic | int8 token sym dynamic"}'


def test_alternatives_read_back() -> None:
    made = recipe.parse_line(LINE)
    assert made.text == LINE
    (item,) = made.passes
    assert isinstance(item, InsertActivationQdq)
    assert isinstance(item.activations, Alternatives)
    assert [s.text for s in item.wishes] == ["uint8 tensor asym dynamic", "int8 token sym dynamic"]
    assert recipe.parse_toml(made.toml, "x").passes == made.passes
    one = recipe.adjusted(made, {"insert-activation-qdq.activations": "f8e4m3 token sym dynamic"})
    assert one.text == 'insert-activation-qdq{activations = "f8e4m3 token sym dynamic"}'
    assert recipe.parse_line(step_text(item)).passes == (item,)  # what a repro file says


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("int8 tensor sym | int8 tensor sym", "each another one"),
        ("int8 tensor sym | int8 odd", "unknown word 'odd'"),
        ("int8 tensor sym |", "an empty scheme"),
        ("int8 tensor sym | nf4 tensor sym", "integer or 8-bit float codes"),
    ],
)
def test_alternatives_that_are_none(value: str, message: str) -> None:
    def inserted() -> None:
        made = recipe.parse_line(f'insert-activation-qdq{{activations = "{value}"}}')
        run(linear(GOOD["linear"]), made.passes, Context())

    with pytest.raises(RecipeError, match=message):
        inserted()


def test_a_weight_has_no_alternatives() -> None:
    with pytest.raises(RecipeError):
        recipe.parse_line('insert-qdq{weights = "int8 channel sym | int4 g32 sym"}')


def target(x: str, granularity: str) -> Target:
    """One dynamic kernel for activations of code type ``x``."""
    row = KernelRow(
        "imagined/linear",
        "q.linear_dyn",
        frozenset({"int8", "f8e4m3"}),
        frozenset({"channel"}),
        frozenset(),
        frozenset({"none"}),
        frozenset({"f32"}),
        "",
        "",
        "",
        "",
        x_codes=frozenset({x}),
        x_zeros=frozenset({"int"} if x == "uint8" else {"none"}),
        y_codes=frozenset({"float"}),
        dynamic=True,
        x_granularities=frozenset({granularity}),
        traits=frozenset({"more than two axes"}),
    )
    return Target("imagined", "", frozenset(), (row,), "onnx")


NET = """graph @main dialect=onnx meta {opset_import = [["", 21]]} {
  input %x : f32[batch, 4, 16]
  const %w : f32[16, 8] = rand:1
  %y : f32[batch, 4, 8] = onnx.MatMul(%x, %w) loc("up")
  return %y
}
"""


@pytest.mark.parametrize(
    ("x", "granularity", "taken"),
    [
        ("uint8", "tensor", "uint8 tensor asym dynamic"),
        ("int8", "token", "int8 token sym dynamic"),
        ("f8e4m3", "token", None),
    ],
)
def test_one_recipe_serves_targets_of_either_kind(x: str, granularity: str, taken: str | None) -> None:
    """The codes of the weight are the same bits on all of them."""
    steps = f'insert-qdq{{weights = "int8 channel sym"}}, {LINE}, fold-constants, fuse-integer, dce'
    codes = []
    for where in (target(x, granularity), None):
        graph = parse(NET)
        ctx = Context(where)
        run(graph, recipe.parse_line(steps).passes, ctx)
        op = next(iter(graph), None)
        assert op is not None
        if where is not None and taken is None:
            assert op.name == "onnx.MatMul"
            assert ctx.ledger["w"].status == "skipped"
            return
        assert op.name == "q.linear_dyn"
        if where is not None:
            assert op.attrs["x_scheme"].text == taken
            assert where.choose(request_of(op)) is not None
        payload = op.operands[1].payload  # type: ignore[union-attr]
        assert payload is not None
        codes.append(payload.array().tobytes())
    assert codes[0] == codes[1]
