"""What a site computes, found in both graphs: by tensor, by node, through codes and what a kernel absorbed."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.backends.onnx.sitewise import SiteTap, site_taps
from qcompiler.ir import Graph
from qcompiler.reader import parse

FLOAT = """graph @main dialect=onnx {
  input %x : f32[1, 4]
  const %w : f32[4, 6] = rand:1
  const %b : f32[6] = rand:2
  %m : f32[1, 6] = onnx.MatMul(%x, %w) loc("fc")
  %a : f32[1, 6] = onnx.Add(%m, %b) loc("fc_bias")
  %r : f32[1, 6] = onnx.Relu(%a) loc("act")
  %y : f32[1, 6] = onnx.Sigmoid(%r) loc("end")
  return %y
}
"""


def graph(body: str) -> Graph:
    return parse(f"graph @main dialect=onnx {{\n  input %x : f32[1, 4]\n  {body}\n}}\n")


def taps(body: str) -> list[SiteTap]:
    return site_taps(parse(FLOAT), graph(body))


WEIGHT = """const %q : int8[4, 6] = rand:1
  const %s : f32[] = dense(0.5)
  const %z : int8[] = dense(3)
  const %ys : f32[] = dense(0.25)
  const %yz : uint8[] = dense(2)
  const %xq : uint8[1, 4] = rand:7"""


def test_by_tensor() -> None:
    """The node has another name and has absorbed the bias: its result is the Add's."""
    (tap,) = taps(
        f"""{WEIGHT}
  const %b : f32[6] = rand:2
  %a : f32[1, 6] = com.microsoft.DynamicQuantizeMatMul(%x, %q, %s, %z, %b) loc("other")
  %y : f32[1, 6] = onnx.Sigmoid(%a)
  return %y"""
    )
    assert (tap.name, tap.op, tap.tensor, tap.got.name, tap.reason) == ("other", "DynamicQuantizeMatMul", "a", "a", "")


def test_through_what_finishes_an_integer_product() -> None:
    """MatMulInteger -> Cast -> Mul by the scales -> the tensor of the reference."""
    (tap,) = taps(
        f"""{WEIGHT}
  %i : int32[1, 6] = onnx.MatMulInteger(%xq, %q) loc("fc")
  %f : f32[1, 6] = onnx.Cast(%i) {{to = 1}}
  %m : f32[1, 6] = onnx.Mul(%f, %s)
  %y : f32[1, 6] = onnx.Sigmoid(%m)
  return %y"""
    )
    assert (tap.name, tap.tensor, tap.got.name) == ("fc", "m", "m")


def test_a_batchnormalization_scales_and_biases_sums() -> None:
    """ConvInteger -> Cast -> BatchNormalization by scales that are known at run time -> the tensor of the reference."""
    (tap,) = taps(
        f"""{WEIGHT}
  const %w : uint8[6, 4, 1] = rand:1
  const %ws : f32[6] = rand:2
  const %b : f32[6] = rand:3
  const %image : uint8[1, 4, 1] = rand:4
  %dyn : f32[] = onnx.ReduceMax(%x) {{keepdims = 0}}
  %step : f32[6] = onnx.Mul(%dyn, %ws)
  %i : int32[1, 6, 1] = onnx.ConvInteger(%image, %w) loc("other")
  %f : f32[1, 6, 1] = onnx.Cast(%i) {{to = 1}}
  %a : f32[1, 6, 1] = onnx.BatchNormalization(%f, %step, %b, %b, %b)
  %y : f32[1, 6, 1] = onnx.Sigmoid(%a)
  return %y"""
    )
    assert (tap.name, tap.tensor, tap.got.name, tap.reason) == ("other", "a", "a", "")


def test_codes_by_node_and_the_constants_of_the_kernel() -> None:
    """The kernel has absorbed the bias and the Relu: what it computes is the value before the first op that is left."""
    (tap,) = taps(
        f"""{WEIGHT}
  %c : uint8[1, 6] = onnx.QLinearMatMul(%xq, %s, %yz, %q, %s, %z, %ys, %yz) loc("fc")
  %d : f32[1, 6] = onnx.DequantizeLinear(%c, %ys, %yz)
  %y : f32[1, 6] = onnx.Sigmoid(%d) loc("end")
  return %y"""
    )
    assert (tap.tensor, tap.got.name) == ("r", "c")
    codes = np.array([[0, 2, 255]], np.uint8)
    assert tap.as_float(codes).tolist() == [[-0.5, 0.0, 63.25]]


def test_by_the_name_of_the_weight() -> None:
    """A site is called like its weight where nothing else names it."""
    (tap,) = taps(
        f"""{WEIGHT}
  %c : uint8[1, 6] = onnx.QLinearMatMul(%xq, %s, %yz, %q, %s, %z, %ys, %yz) loc("w")
  %r : uint8[1, 6] = onnx.Relu(%c) loc("act")
  %d : f32[1, 6] = onnx.DequantizeLinear(%r, %ys, %yz)
  %y : f32[1, 6] = onnx.Sigmoid(%d) loc("end")
  return %y"""
    )
    assert (tap.name, tap.tensor, tap.got.name) == ("w", "a", "c")


def test_what_another_value_flows_into_is_not_the_site_s() -> None:
    """A residual sum behind the product is another tensor, whatever it is called."""
    (tap,) = taps(
        f"""{WEIGHT}
  %p : f32[1, 6] = com.microsoft.DynamicQuantizeMatMul(%x, %q, %s, %z) loc("other")
  %o : f32[1, 6] = onnx.Relu(%x)
  %a : f32[1, 6] = onnx.Add(%p, %o)
  return %a"""
    )
    assert "neither a tensor 'p' nor a node 'other'" in tap.reason
    assert tap.tensor == ""


def test_codes_without_constant_scale() -> None:
    (tap,) = taps(
        f"""{WEIGHT}
  %dyn : f32[] = onnx.ReduceMax(%x) {{keepdims = 0}}
  %c : uint8[1, 6] = onnx.QLinearMatMul(%xq, %s, %yz, %q, %s, %z, %dyn, %yz) loc("fc")
  return %c"""
    )
    assert tap.reason == "its result 'c' is uint8, with no constant scale"


@pytest.mark.parametrize(
    "op",
    ["%m : f32[1, 4] = onnx.MatMul(%x, %x)", "%m : f32[4, 8] = onnx.Gather(%q, %i)", "%m : f32[1, 4] = onnx.Relu(%x)"],
)
def test_what_is_no_site(op: str) -> None:
    assert not taps(f"{WEIGHT}\n  const %i : int64[4] = rand:1\n  {op}\n  return %m")


def test_a_float_site_that_kept_its_weight() -> None:
    (tap,) = site_taps(parse(FLOAT), parse(FLOAT))
    assert (tap.op, tap.tensor) == ("MatMul", "m")
