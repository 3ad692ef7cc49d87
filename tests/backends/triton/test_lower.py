"""What the entry points of torch-cuda write: calls and layouts as text, one copy of a tied weight, right numbers."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler import dtypes
from qcompiler.backends.triton import layouts
from qcompiler.backends.triton.lower import exactly
from qcompiler.dtypes import BF16, F16, F32, DType
from qcompiler.errors import InputError
from qcompiler.ir import Graph, Op
from qcompiler.passes.dce import Dce
from qcompiler.payload import ComputedPayload
from qcompiler.pipeline import Context
from qcompiler.reader import parse
from qcompiler.spec import check
from qcompiler.text import show
from tests.backends.onnx.proof import table
from tests.backends.torch import proof
from tests.support import Golden

HOPPER = "torch-cuda:sm_90"

MIXED = """
graph @main dialect=aten {
  input %i : int64[b, s]
  const %table : int8[6, 24] = rand:1
  const %ts : f32[6, 1] = dense(0.5, 0.25, 1.0, 0.5, 0.125, 2.0)
  const %wq : int4[8, 24] = rand:2
  const %ws : f32[8, 1] = dense(0.5, 0.25, 1.0, 0.5, 0.125, 2.0, 1.0, 1.0)
  const %wz : int4[8, 1] = rand:3
  const %b : f32[8] = dense(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
  %x : f32[b, s, 24] = q.embedding(%i, %table, %ts) {scheme = <int8 channel sym axis=1>, site = "embed"} loc("emb")
  %q : f32[b, s, 8] = q.linear(%x, %wq, %ws, %wz, %b) {scheme = <int4 g32 asym axis=1>, site = "q_proj"} loc("q")
  %k : f32[b, s, 8] = q.linear(%x, %wq, %ws, %wz) {scheme = <int4 g32 asym axis=1>, site = "k_proj"} loc("k")
  %y : f32[b, s, 6] = q.linear(%x, %table, %ts) {scheme = <int8 channel sym axis=1>, site = "head"} loc("head")
  return %q, %k, %y
}
"""

CODES = """
graph @main dialect=aten {
  input %x : bf16[b, s, 24]
  const %f : bf16[24] = rand:1
  const %s : f32[] = dense(0.5)
  const %w : int8[8, 24] = rand:2
  const %ws : f32[8, 1] = dense(0.5, 0.25, 1.0, 0.5, 0.125, 2.0, 1.0, 1.0)
  const %v : int4[8, 24] = rand:3
  const %vs : f32[8, 1] = dense(0.5, 0.25, 1.0, 0.5, 0.125, 2.0, 1.0, 1.0)
  const %b : bf16[8] = rand:4
  %m : bf16[b, s, 24] = q.scale(%x, %f) loc("smooth")
  %q : bf16[b, s, 8] = q.linear_dyn(%m, %w, %ws, none, %b) {scheme = <int8 channel sym axis=1>, x_scheme = <int8 token sym dynamic>, site = "q_proj"} loc("q")
  %k : bf16[b, s, 8] = q.linear_dyn(%m, %v, %vs) {scheme = <int4 channel sym axis=1>, x_scheme = <int8 token sym dynamic>, site = "k_proj"} loc("k")
  %c : int8[b, s, 24] = q.quantize(%x, %s) {scheme = <int8 tensor sym>} loc("quantize")
  %y : bf16[b, s, 8] = q.linear_static(%c, %s, none, %w, %ws) {scheme = <int8 channel sym axis=1>, x_scheme = <int8 tensor sym>, site = "y_proj"} loc("y")
  return %q, %k, %y
}
"""  # noqa: E501  # an op is one line


def ops(graph: Graph, name: str) -> list[Op]:
    return [op for op in graph.walk() if op.name == f"qcompiler.{name}.default"]


@pytest.mark.parametrize(("name", "text"), [("mixed", MIXED), ("codes", CODES)])
def test_the_lowered_graph_as_text(name: str, text: str, golden: Golden) -> None:
    graph = parse(text)
    check(graph)
    proof.lower(graph, HOPPER)
    found = show(graph)
    assert show(parse(found)) == found
    golden(f"triton/{name}.qir", found)


def test_nothing_is_read_and_each_weight_is_laid_out_once() -> None:
    graph = proof.lower(parse(MIXED), HOPPER)
    laid = [v for v in graph.consts.values() if v.name.rpartition(".")[2].startswith("weight_")]
    assert all(isinstance(v.payload, ComputedPayload) for v in laid)
    assert sorted(v.name for v in laid) == [
        "embed.weight_fragments",
        "embed.weight_scales",
        "q_proj.weight_fragments",
        "q_proj.weight_scales",
        "q_proj.weight_zeros",
    ]
    (tied,) = (v for v in laid if v.name == "embed.weight_fragments")
    assert {u.name for u in tied.users} == {"qcompiler.wn_embedding.default", "qcompiler.wn_linear.default"}


def test_an_activation_is_quantized_once_and_its_factors_go_along() -> None:
    graph = proof.lower(parse(CODES), HOPPER)
    (quantize,) = ops(graph, "quantize_rows")
    assert [v.name for v in quantize.operands if v is not None] == ["x", "f"]
    assert [op.operand(0) for op in ops(graph, "a8_linear")[:2]] == [quantize.results[0]] * 2


def test_a_product_that_others_read_is_not_computed_by_the_quantizer() -> None:
    graph = proof.lower(parse(CODES.replace("return %q", "return %m, %q")), HOPPER)
    (quantize,) = ops(graph, "quantize_rows")
    assert [v.name for v in quantize.operands if v is not None] == ["m"]


NORMED = """
graph @main dialect=aten {{
  input %x : {t}[b, 24]
  const %weight : {t}[24] = rand:1
  const %w : int8[8, 24] = rand:2
  const %ws : f32[8, 1] = dense(0.5, 0.25, 1.0, 0.5, 0.125, 2.0, 1.0, 1.0)
{norm}
  %y : {t}[b, 8] = q.linear_dyn(%n, %w, %ws) {{scheme = <int8 channel sym axis=1>, x_scheme = <int8 token sym dynamic>, site = "y"}} loc("y")
  return %y
}}
"""  # noqa: E501  # an op is one line
PARTS = """
  %p : f32[b, 24] = aten.pow.Tensor_Scalar(%x) {args = [$0, 2]}
  %m : f32[b, 1] = aten.mean.dim(%p) {args = [$0, [-1], true]}
  %e : f32[b, 1] = aten.add.Tensor(%m) {args = [$0, 1e-05]}
  %r : f32[b, 1] = aten.rsqrt.default(%e) {args = [$0]}
  %z : f32[b, 24] = aten.mul.Tensor(%x, %r) {args = [$0, $1]}
  %n : f32[b, 24] = aten.mul.Tensor(%weight, %z) {args = [$0, $1]}
"""
WHOLE = "  %n : bf16[b, 24] = aten.rms_norm.default(%x, %weight) {args = [$0, [24], $1, 1e-05]}"


@pytest.mark.parametrize(("norm", "element"), [(PARTS, "f32"), (WHOLE, "bf16")])
def test_a_norm_is_computed_by_the_quantizer_behind_it(norm: str, element: str) -> None:
    text = NORMED.format(t=element, norm=norm)
    graph = proof.lower(parse(text), HOPPER)
    Dce().run(graph, Context())
    quantize, product = graph
    assert [v.name for v in quantize.operands if v is not None] == ["x", "weight"]
    assert (quantize.attrs["args"][1], quantize.attrs["args"][3], product.label) == (None, 1e-05, "y")
    apart = proof.lower(parse(text.replace("return %y", "return %y, %n")), HOPPER)
    assert next(op for op in apart if "quantize_rows" in op.name).operand(0) is apart.local("n")
    x = np.random.default_rng(0).standard_normal((5, 24)).astype(dtypes.TABLE[element].storage)
    # A code may fall on the other side of a half: the sums before it are added in another order.
    np.testing.assert_allclose(proof.run(graph, x)[0], proof.run(apart, x)[0], rtol=0.02, atol=0.5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[-1], true", "[0], true"),
        ("[$0, 2]", "[$0, 3]"),
        ("aten.rsqrt.default", "aten.sqrt.default"),
        ("aten.mul.Tensor(%x, %r)", "aten.mul.Tensor(%p, %r)"),
        ("const %weight : f32[24] = rand:1", "input %weight : f32[24]"),
    ],
)
def test_what_is_no_norm_is_left(old: str, new: str) -> None:
    text = NORMED.format(t="f32", norm=PARTS)
    assert old in text
    graph = proof.lower(parse(text.replace(old, new)), HOPPER)
    quantize = next(op for op in graph if "quantize_rows" in op.name)
    assert quantize.attrs["args"][2] is None


SCHEMES = (
    "int4 g32 asym",
    "int4 g128 sym",
    "int4 channel asym",
    "uint4 g64 asym",
    "int2 g32 asym",
    "int8 channel sym",
    "int8 g64 asym",
    "uint8 tensor asym",
)
ROUNDED = 3.5 * 2.0**-8
"""An activation, a weight times its scale, and a result, each rounded to bf16."""


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("element", [F32, F16, BF16])
def test_numbers_of_the_reference(text: str, element: DType) -> None:
    t = proof.bf16_table(text, 70, 200, element)
    graph = proof.lower(proof.linear(t), HOPPER)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 200)).astype(element.storage)
    (got,) = proof.run(graph, x)
    wide = x.astype(np.float64)
    assert (np.abs(got - wide @ t.values.T) <= ROUNDED * (np.abs(wide) @ np.abs(t.values.T))).all()


@pytest.mark.parametrize("text", ["int8 channel sym", "int4 g32 asym", "int8 tensor sym"])
@pytest.mark.parametrize("head_first", [False, True])
def test_a_tied_table_gives_its_rows_exactly(text: str, head_first: bool) -> None:
    t = proof.bf16_table(text, 70, 200, F32)
    graph = proof.lower(proof.tied(t, head_first=head_first), HOPPER)
    assert len([v for v in graph.consts.values() if v.name.endswith("weight_fragments")]) == 1
    index = np.array([[0, 69, 3], [3, 1, 2]])
    x = np.random.default_rng(2).standard_normal((4, 200)).astype(np.float32)
    found = proof.run(graph, *([x, index] if head_first else [index, x]))
    rows = found[1] if head_first else found[0]
    np.testing.assert_array_equal(rows, t.values[index])  # every factor has few bits


def test_scales_that_a_shorter_type_does_not_hold_are_refused() -> None:
    with pytest.raises(InputError, match=r"'proj': 1 of 2 scales, such as 1.001.*not exact in bf16 \(QC205\)"):
        exactly(np.array([1.0, 1.001]), BF16, "proj")


def test_scales_of_others_stay_as_wide_as_they_are() -> None:
    graph = proof.lower(proof.linear(table("int4 g32 asym", 8, 64, F32)), HOPPER)
    (scales,) = (v for v in graph.consts.values() if v.name.endswith("weight_scales"))
    assert scales.tensor.dtype == F32  # nothing says that they are exact in bf16
    assert scales.tensor.static_shape == (layouts.scale_rows(64, 32), layouts.ROWS)


def test_weights_that_are_no_constants_are_refused() -> None:
    text = MIXED.replace("const %wq : int4[8, 24] = rand:2", "input %wq : int4[8, 24]")
    with pytest.raises(InputError, match=r"'q_proj': the codes .* is no constant"):
        proof.lower(parse(text), HOPPER)
