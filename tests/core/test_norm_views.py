"""What is a normalisation, in each of its spellings, and what is not."""

import pytest

from qcompiler.ir import Graph
from qcompiler.norm_views import NormView, as_norm
from qcompiler.reader import parse
from qcompiler.rewrite import Declined


def made_by(text: str, consts: str = "", dialect: str = "onnx") -> Graph:
    return parse(
        f"""graph @main dialect=onnx {{
          input %x: f32[2, 3, 4]
          const %w: f32[4] = dense(1, 2, 3, 4)
          const %b: f32[4] = dense(0, 1, 0, 1)
          const %two: f32[] = dense(2)
          const %eps: f32[] = dense(1e-5)
          const %axes: int64[1] = dense(-1)
          {consts}
          {text}
          return %y
        }}""".replace("dialect=onnx", f"dialect={dialect}")
    )


def norm_of(graph: Graph) -> NormView:
    assert graph.outputs[0].owner is not None
    return as_norm(graph.outputs[0].owner)


RMS_IN_PARTS = """
  %sq: f32[2, 3, 4] = onnx.Pow(%x, %two)
  %m: f32[2, 3, 1] = onnx.ReduceMean(%sq, %axes)
  %e: f32[2, 3, 1] = onnx.Add(%m, %eps)
  %r: f32[2, 3, 1] = onnx.Sqrt(%e)
  %i: f32[2, 3, 1] = onnx.Reciprocal(%r)
  %n: f32[2, 3, 4] = onnx.Mul(%x, %i)
  %y: f32[2, 3, 4] = onnx.Mul(%w, %n)
"""
LAYER_IN_PARTS = """
  %m: f32[2, 3, 1] = onnx.ReduceMean(%x, %axes)
  %c: f32[2, 3, 4] = onnx.Sub(%x, %m)
  %sq: f32[2, 3, 4] = onnx.Pow(%c, %two)
  %v: f32[2, 3, 1] = onnx.ReduceMean(%sq, %axes)
  %e: f32[2, 3, 1] = onnx.Add(%v, %eps)
  %r: f32[2, 3, 1] = onnx.Sqrt(%e)
  %n: f32[2, 3, 4] = onnx.Div(%c, %r)
  %s: f32[2, 3, 4] = onnx.Mul(%n, %w)
  %y: f32[2, 3, 4] = onnx.Add(%s, %b)
"""
FLAX_IN_PARTS = """
  %m: f32[2, 3, 1] = onnx.ReduceMean(%x, %axes)
  %c: f32[2, 3, 4] = onnx.Sub(%x, %m)
  %v: f32[2, 3, 1] = onnx.ReduceMean(%c, %axes)
  %r: f32[2, 3, 1] = onnx.Sqrt(%v)
  %i: f32[2, 3, 1] = onnx.Reciprocal(%r)
  %n: f32[2, 3, 4] = onnx.Mul(%i, %w)
  %s: f32[2, 3, 4] = onnx.Mul(%c, %n)
  %y: f32[2, 3, 4] = onnx.Add(%s, %b)
"""

SPELLINGS = [
    ("%y: f32[2, 3, 4] = onnx.LayerNormalization(%x, %w, %b) {axis = -1}", "layer", True),
    ("%y: f32[2, 3, 4] = onnx.LayerNormalization(%x, %w) {axis = 2}", "layer", False),
    ("%y: f32[2, 3, 4] = onnx.SimplifiedLayerNormalization(%x, %w)", "rms", False),
    ("%y: f32[2, 3, 4] = onnx.RMSNormalization(%x, %w)", "rms", False),
    ("%y: f32[2, 3, 4] = com.microsoft.SkipLayerNormalization(%x, %x, %w, %b)", "layer", True),
    ("%y: f32[2, 3, 4] = com.microsoft.SkipSimplifiedLayerNormalization(%x, %x, %w)", "rms", False),
    (RMS_IN_PARTS, "parts", False),
    (LAYER_IN_PARTS, "parts", True),
    (FLAX_IN_PARTS, "parts", True),
    ("%y: f32[2, 3, 4] = aten.layer_norm.default(%x, %w, %b) {args = [$0, [4], $1, $2, 1e-5]}", "layer", True),
    ("%y: f32[2, 3, 4] = aten.rms_norm.default(%x, %w) {args = [$0, [4], $1]}", "rms", False),
]


@pytest.mark.parametrize(("text", "kind", "bias"), SPELLINGS)
def test_each_spelling_is_read(text: str, kind: str, bias: bool) -> None:
    view = norm_of(made_by(text))
    assert (view.kind, view.k, view.axis, view.result.name) == (kind, 4, -1, "y")
    assert view.scale.name == "w" and view.scale_op.operand(view.scale_slot) is view.scale
    assert (None if view.bias is None else view.bias.name) == ("b" if bias else None)
    if bias:
        assert view.bias_op is not None and view.bias_slot is not None
        assert view.bias_op.operand(view.bias_slot) is view.bias
    else:
        assert view.bias_op is None and view.bias_slot is None


def test_batch_normalisation_has_its_channels_on_axis_1() -> None:
    graph = parse(
        """graph @main dialect=onnx {
          input %x: f32[2, 3, 4]
          const %w: f32[3] = dense(1, 2, 3)
          const %b: f32[3] = dense(0, 1, 0)
          %y: f32[2, 3, 4] = onnx.BatchNormalization(%x, %w, %b, %b, %w)
          return %y
        }"""
    )
    view = norm_of(graph)
    assert (view.kind, view.k, view.axis) == ("batch", 3, 1)


NOT_ONE = [
    ("%y: f32[2, 3, 4] = onnx.LayerNormalization(%x, %w, %b) {axis = 1}", "not the last one alone"),
    ("%y: f32[2, 3, 4] = onnx.Mul(%x, %w)", ""),
    ("%r: f32[2, 3, 4] = onnx.Sqrt(%x)\n%y: f32[2, 3, 4] = onnx.Mul(%r, %w)", ""),
    ("%y: f32[2, 3, 4] = onnx.Add(%x, %b)", ""),
    ("%y: f32[2, 3, 4] = onnx.Relu(%x)", ""),
    ("%y: f32[2, 3, 4] = onnx.LayerNormalization(%x, %x)", "no constant scale"),
    ("%y: f32[2, 3, 4] = aten.layer_norm.default(%x) {args = [$0, [4]]}", "no constant scale"),
    ("%y: f32[2, 3, 4] = onnx.LayerNormalization(%x, %w, %x) {axis = -1}", "no constant of 4 elements"),
]


@pytest.mark.parametrize(("text", "reason"), NOT_ONE)
def test_what_is_none_says_why(text: str, reason: str) -> None:
    with pytest.raises(Declined) as e:
        norm_of(made_by(text))
    assert e.value.quiet is (not reason)
    assert reason in e.value.reason.message


def test_a_multiplication_that_widens_its_operand_is_no_scale() -> None:
    text = (
        "%r: f32[2, 3, 1] = onnx.Sqrt(%x1)\n%n: f32[2, 3, 1] = onnx.Div(%x1, %r)\n%y: f32[2, 3, 4] = onnx.Mul(%n, %w)"
    )
    with pytest.raises(Declined):
        norm_of(made_by(text, "input %x1: f32[2, 3, 1]"))
