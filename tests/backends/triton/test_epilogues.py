"""What is computed behind a product goes into its call: text in, text out, and what is left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcompiler.backends.torch.kernels import target
from qcompiler.backends.torch.reference import FUNCTIONS
from qcompiler.ir import Graph
from qcompiler.passes.choose_layout import ChooseLayout
from qcompiler.pipeline import Context, run
from qcompiler.reader import parse
from qcompiler.spec import check
from qcompiler.text import show
from tests.backends.torch import proof
from tests.support import Golden

HOPPER = "torch-cuda:sm_90"
HEAD = """
graph @main dialect=aten {
  input %x : f32[m, 24]
  input %r : f32[m, 8]
  input %z : f32[1, 8]
  const %wq : int4[8, 24] = rand:2
  const %ws : f32[8, 1] = dense(0.5, 0.25, 1.0, 0.5, 0.125, 2.0, 1.0, 1.0)
  const %vq : int8[8, 24] = rand:3
  const %b : f32[8] = dense(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
  %g : f32[m, 8] = q.linear(%x, %wq, %ws, none, %b) {scheme = <int4 g32 sym axis=1>, site = "gate"} loc("gate")
"""
UP = """
  %u : f32[m, 8] = q.linear_dyn(%x, %vq, %ws) {scheme = <int8 channel sym axis=1>, x_scheme = <int8 token sym dynamic>, site = "up"} loc("up")
"""  # noqa: E501  # an op is one line
SWIGLU = f"""{HEAD}
  %s : f32[m, 8] = aten.silu.default(%g) {{args = [$0]}} loc("silu")
{UP}
  %m : f32[m, 8] = aten.mul.Tensor(%s, %u) {{args = [$0, $1]}} loc("mul")
  %y : f32[m, 8] = aten.add.Tensor(%r, %m) {{args = [$0, $1]}} loc("add")
  return %y
}}
"""


def lowered(text: str) -> tuple[Graph, list[str]]:
    graph = parse(text)
    check(graph)
    ctx = Context(target(HOPPER))
    run(graph, [ChooseLayout()], ctx)
    return graph, ctx.notes


def tail(ops: str, outputs: str = "%y") -> str:
    return f"{HEAD}{ops}\n  return {outputs}\n}}\n"


def test_a_gate_takes_its_function_its_factor_and_the_residual(golden: Golden) -> None:
    graph, notes = lowered(SWIGLU)
    golden("triton/swiglu.qir", show(graph))
    assert notes == ["computed by the kernels of the products before them: 1 function, 1 factor, 1 summand"]


def test_the_numbers_stay() -> None:
    rng = np.random.default_rng(0)
    x, r = rng.standard_normal((5, 24)).astype(np.float32), rng.standard_normal((5, 8)).astype(np.float32)
    z = np.zeros((1, 8), np.float32)
    (fused,) = proof.run(lowered(SWIGLU)[0], x, r, z)
    apart = lowered(SWIGLU.replace("return %y", "return %y, %g, %s, %u, %m"))[0]
    assert sum(op.name.startswith("aten.") for op in apart) == 3
    # Between the ops f32 was rounded to f32: the kernel does the same in one go.
    np.testing.assert_allclose(fused, proof.run(apart, x, r, z)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        ("aten.relu.default(%g) {args = [$0]}", "relu"),
        ("aten.silu.default(%g) {args = [$0]}", "silu"),
        ("aten.gelu.default(%g) {args = [$0]}", "gelu"),
        ('aten.gelu.default(%g) {args = [$0], kwargs = [["approximate", "tanh"]]}', "gelu_tanh"),
        ('aten.gelu.default(%g) {args = [$0], kwargs = [["approximate", "none"]]}', "gelu"),
    ],
)
def test_functions(call: str, word: str) -> None:
    text = tail(f'  %y : f32[m, 8] = {call} loc("f")')
    graph, _ = lowered(text)
    (op,) = graph
    assert (op.label, op.attrs["args"][-1], op.results[0].name) == ("gate", word, "y")
    x = np.random.default_rng(1).standard_normal((3, 24)).astype(np.float32)
    r, z = np.zeros((3, 8), np.float32), np.zeros((1, 8), np.float32)
    plain, _ = lowered(tail("", "%g"))
    want = FUNCTIONS[word](torch.from_numpy(proof.run(plain, x, r, z)[0]))
    np.testing.assert_allclose(proof.run(graph, x, r, z)[0], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("ops", "outputs", "left"),
    [
        ("  %y : f32[m, 8] = aten.relu.default(%g) {args = [$0]}", "%y, %g", ["relu"]),  # others read the sums
        ("  %y : f32[m, 8] = aten.mul.Tensor(%g, %z) {args = [$0, $1]}", "%y", ["mul"]),  # another shape
        ("  %y : f32[m, 8] = aten.mul.Tensor(%g, %g) {args = [$0, $1]}", "%y", ["mul"]),
        ('  %y : f32[m, 8] = aten.add.Tensor(%g, %r) {args = [$0, $1], kwargs = [["alpha", 2]]}', "%y", ["add"]),
        ("  %y : f32[m, 8] = aten.sigmoid.default(%g) {args = [$0]}", "%y", ["sigmoid"]),
        (
            "  %a : f32[m, 8] = aten.add.Tensor(%g, %r) {args = [$0, $1]}\n"
            "  %y : f32[m, 8] = aten.relu.default(%a) {args = [$0]}",
            "%y",
            ["relu"],  # the kernel adds behind the function
        ),
    ],
)
def test_what_is_left_alone(ops: str, outputs: str, left: list[str]) -> None:
    graph, _ = lowered(tail(ops, outputs))
    assert [op.name.split(".")[1] for op in graph if op.name.startswith("aten.")] == left


def test_of_two_products_one_takes_the_other_as_its_factor() -> None:
    graph, _ = lowered(tail(f"{UP}\n  %y : f32[m, 8] = aten.mul.Tensor(%g, %u) {{args = [$0, $1]}}"))
    assert [op.label for op in graph] == ["up.quantize", "up", "gate"]


def test_a_sum_of_what_is_written_in_place_stays() -> None:
    text = tail(
        "  %w : f32[m, 8] = aten.add_.Tensor(%r, %z) {args = [$0, $1]}\n"
        "  %y : f32[m, 8] = aten.add.Tensor(%g, %w) {args = [$0, $1]}"
    )
    graph = parse(text)
    for op in graph:
        if op.name.endswith("add_.Tensor"):
            op.meta["effect"] = "write"
    run(graph, [ChooseLayout()], Context(target(HOPPER)))
    assert [op.name.split(".")[1] for op in graph] == ["wn_linear", "add_", "add"]
