"""One grammar: what is printed reads back and prints the same; what cannot be read says where."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.dtypes import F32, TABLE, dtype
from qcompiler.errors import InputError
from qcompiler.ir import Atom, Graph, Hole, Loc, OpaqueType, TensorType
from qcompiler.payload import FilePayload, RandomPayload, constant
from qcompiler.reader import parse, parse_attrs
from qcompiler.scheme import Scheme, parse_scheme
from qcompiler.spec import check
from qcompiler.text import show, show_attr, show_attrs

EXAMPLE = """\
graph @main dialect=onnx meta {opset = [["", 21]]} {
  input %x : f32[batch, 128]
  input %flag : bool[] = dense(true)
  const %w : f32[128, 256] = rand:7
  const %"a:b c" : int64[2] = dense(1, -2)
  const %e : f32[] = dense(-inf)
  const %t : string[2] = dense("a", "b\\"c")
  %y : f32[batch, 256] = onnx.MatMul(%x, %w) {a = 1, b = 1.0, c = "q\\"x", d = [none, true]} loc("n", "", "f.py:3")
  %z : ?[*], %u : opaque"seq(tensor)" = onnx.If(%flag, none) meta {k = hex"00ff"} regions {
    then_branch = graph @g dialect=onnx {
      %q : f32[2, ?] = "my domain.Foo"(%x)
      return %q
    }
    else_branch = graph @h dialect=onnx {
      %q : f32[2, "a + 1"] = onnx.Neg(%x)
      return %q
    }
  }
  return %z, %y
}
"""


def test_the_example_reads_back_as_itself() -> None:
    g = parse(EXAMPLE)
    check(g)
    assert show(g) == EXAMPLE


def test_attributes_of_every_kind_read_back() -> None:
    attrs = {
        "i": -3,
        "f": 1e-7,
        "inf": float("-inf"),
        "s": 'ä\n"',
        "b": b"\x00\xff",
        "t": (1, (2.5, "x"), ()),
        "scheme": parse_scheme("int4 g128 asym axis=0"),
        "dtype": dtype("f8e4m3"),
        "type": TensorType(F32, ("n", None, 3)),
        "opaque": OpaqueType("SymInt"),
        "atom": Atom("torch.dtype", "float32"),
        "hole": Hole(2),
        "odd key!": True,
    }
    assert parse_attrs(show_attrs(attrs)) == attrs


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**62), 2**62)
        | st.floats(allow_nan=False)
        | st.text()
        | st.binary(max_size=8)
        | st.builds(Atom, st.from_regex(r"[a-z]+\.[a-z]+", fullmatch=True), st.text()),
        lambda inner: st.lists(inner, max_size=3).map(tuple),
        max_leaves=8,
    )
)
def test_any_attribute_reads_back(value) -> None:  # type: ignore[no-untyped-def]
    back = parse_attrs(f"{{v = {show_attr(value)}}}")["v"]
    assert back == value
    assert type(back) is type(value)


NAMES = st.text(min_size=1, max_size=6)


@settings(max_examples=60)
@given(st.data())
def test_random_graphs_read_back(data: st.DataObject) -> None:
    g = Graph("g", "onnx")
    dims = st.none() | st.integers(0, 9) | NAMES
    types = st.builds(
        TensorType,
        st.none() | st.sampled_from(sorted(TABLE)).map(dtype),
        st.none() | st.lists(dims, max_size=3).map(tuple),
    )
    values = [g.add_input(g.fresh(data.draw(NAMES)), data.draw(types)) for _ in range(2)]
    values.append(g.add_const(g.fresh("c"), RandomPayload(3, F32, (2, 3))))
    for _ in range(data.draw(st.integers(0, 4))):
        operands = data.draw(st.lists(st.none() | st.sampled_from(values), max_size=3))
        results = [(g.fresh(data.draw(NAMES)), data.draw(types))]
        loc = Loc(data.draw(st.text(max_size=3)), "", data.draw(st.text(max_size=3)))
        values += g.create(data.draw(NAMES), operands, {data.draw(NAMES): 1}, results, loc=loc).results
    g.add_output(values[-1])
    text = show(g)
    assert show(parse(text)) == text


@pytest.mark.parametrize("name", sorted(set(TABLE) - {"c64", "c128", "string"}))
def test_dense_constants_of_every_type_read_back(name: str) -> None:
    element = dtype(name)
    values = np.array([[0, 1], [1, 0]]).astype(element.storage)
    g = Graph()
    g.add_const("c", constant(values, element))
    back = parse(show(g)).consts["c"].payload
    assert back is not None
    assert back.dtype == element
    assert back.array().tobytes() == values.tobytes()


def test_dense_floats_are_exact() -> None:
    values = np.array([0.1, 1e-45, np.nan, -0.0, 3e38], np.float32)
    half = np.array([0.1, 6e-8, -np.inf], ml_dtypes.bfloat16)
    g = Graph()
    g.add_const("a", constant(values))
    g.add_const("b", constant(half))
    back = parse(show(g))
    np.testing.assert_array_equal(
        back.consts["a"].payload.array().view(np.uint32)[[0, 1, 3, 4]], values.view(np.uint32)[[0, 1, 3, 4]]
    )  # type: ignore[union-attr]
    assert np.isnan(back.consts["a"].payload.array()[2])  # type: ignore[union-attr]
    assert back.consts["b"].payload.array().tobytes() == half.tobytes()  # type: ignore[union-attr]


def test_a_reference_prints_but_holds_no_values(tmp_path: Path) -> None:
    file = tmp_path / "w.bin"
    file.write_bytes(bytes(4 * 100))
    g = Graph()
    g.add_const("w", FilePayload(file, 0, F32, (100,)))
    g.add_const("big", constant(np.arange(100.0, dtype=np.float32)))
    text = show(g)
    assert '@"file:w.bin:0"' in text
    again = parse(text)
    assert show(again) == text
    with pytest.raises(InputError, match="printed without its values"):
        again.consts["big"].payload.array()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("graph @g dialect=onnx {\n  %y : f32[] = onnx.Neg(%x)\n  return %y\n}\n", "%x is used before it is defined"),
        ("graph @g dialect=onnx {\n  %y : f33[] = onnx.Neg()\n return }", "unknown dtype 'f33'"),
        ("graph @g dialect=onnx {\n  input %x : f32[2\n}", "line 3, column 1: expected ','"),
        ("graph @g dialect=onnx {\n  const %x : f32[2] = dense(1.0)\n return }", "2 values for f32"),
        ("graph @g dialect=onnx {\n  return\n", "expected '}', got the end of the text"),
        ("graph @g dialect=onnx { ^ }", "expected a token"),
    ],
)
def test_errors_say_where(text: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        parse(text)


# -- schemes: the one-line text ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "int4 g128 asym",
        "int8 tensor sym",
        "int8 channel sym axis=0",
        "uint8 tensor asym dynamic",
        "int8 token sym dynamic",
        "f8e4m3 b128x128 sym",
        "nf4 g64 sym",
        "f4e2m1 g32 sym scale=f8e8m0",
        "f8e5m2 g32 sym scale=f8e8m0 axis=1",
        "f4e2m1 g16 sym scale=f8e4m3",
        "f8e4m3 token sym dynamic",
        "f8e4m3 b1x128 sym dynamic",
        "int2 g32 asymf axis=1",
    ],
)
def test_scheme_text_reads_back(text: str) -> None:
    scheme = parse_scheme(text)
    assert str(scheme) == text
    assert isinstance(scheme, Scheme)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("int4 g100", "a group size is a power of two"),
        ("int4 token", "add the word 'dynamic'"),
        ("f8e4m3 tensor asym", "have no zero point"),
        ("int4 g128 odd", "unknown word 'odd'"),
        ("int5 g128", "unknown dtype 'int5'"),
        ("", "an empty scheme"),
        ("int4 g32 sym dynamic", "dynamic quantization is per tensor or per token"),
        ("f8e4m3 b128x128 sym dynamic", "in blocks b1xM of a row"),
        ("nf4 g64 asym", "nf4 codes have no zero point"),
        (
            "f4e2m1 g64 sym scale=f8e8m0",
            "groups of 32 \\(OCP Microscaling Formats\\); write 'f4e2m1 g32 sym scale=f8e8m0'",
        ),
        ("f4e2m1 channel sym scale=f8e4m3", "groups of 16 \\(NVFP4\\); write 'f4e2m1 g16 sym scale=f8e4m3'"),
        ("int4 g32 sym scale=f8e8m0", "f8e8m0 scales belong to f4e2m1 or f8e4m3 or f8e5m2 codes"),
        ("nf4 g64 sym scale=f16", "scales are f8e8m0 or f8e4m3"),
        ("nf4 g64 sym scale=odd", "unknown word 'scale=odd'"),
    ],
)
def test_a_scheme_names_the_law_it_breaks(text: str, why: str) -> None:
    with pytest.raises(Exception, match=why):
        parse_scheme(text)
