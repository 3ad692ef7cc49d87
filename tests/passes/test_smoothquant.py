"""The pass against the graph before it: exact where factors are powers of two, refused where it cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler import migration, recipe, smoothing
from qcompiler.backends.onnx.running import runnable
from qcompiler.calibrate.calibrator import Calibrator, Planned
from qcompiler.calibrate.data import open_data
from qcompiler.dtypes import Array
from qcompiler.errors import CalibrationError, Error, RecipeError
from qcompiler.ir import Graph
from qcompiler.passes import smoothquant
from qcompiler.passes.smoothquant import SmoothQuant, difference
from qcompiler.payload import constant
from qcompiler.pipeline import Context, run
from qcompiler.reader import parse
from qcompiler.rewrite import Declined
from qcompiler.text import show
from qcompiler.views import LINEAR_OPS, as_linear
from tests.passes.test_text_passes import CASES

SMOOTH = [c for c in CASES if c.stem.startswith("smooth_") and "region" not in c.stem]


def batches(graph: Graph, seed: int = 0, count: int = 20) -> list[dict[str, Array]]:
    """Normal inputs whose third channel is an outlier."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        shapes = {v.name: [d if isinstance(d, int) else 50 for d in v.tensor.shape or ()] for v in graph.inputs}
        batch = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
        for x in batch.values():
            x[..., 2] *= 40
        out.append(batch)
    return out


def calibrator(graph: Graph) -> Calibrator:
    return Calibrator(open_data(batches(graph)), runnable)


def outputs(graph: Graph) -> list[Array]:
    with runnable(graph, ()) as call:
        found = [call(batch) for batch in batches(graph, seed=7)]
    return [f[v.name] for f in found for v in graph.outputs]


@pytest.mark.parametrize("case", SMOOTH, ids=lambda p: p.stem)
@pytest.mark.parametrize("explicit", [True, False])
def test_powers_of_two_change_no_bit(case: Path, explicit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A product or sum with factors that are powers of two rounds as it did: the outputs are the same bits."""
    exact = smoothing.smoothing_factors

    def rounded(x: Array, w: Array, alpha: float) -> Array:
        out: Array = np.exp2(np.rint(np.log2(exact(x, w, alpha)))).astype(np.float32)
        return out

    monkeypatch.setattr(smoothquant, "smoothing_factors", rounded)
    graph = parse(case.read_text())
    want = outputs(graph)
    ctx = Context(calibration=calibrator(graph))
    run(graph, [SmoothQuant(alpha=0.5, explicit=explicit)], ctx)
    for a, b in zip(want, outputs(graph), strict=True):
        np.testing.assert_array_equal(a, b)
    if explicit or case.stem not in ("smooth_refused", "smooth_residual_needs_q_scale"):
        assert "rescaled" in show(graph)


@pytest.mark.parametrize("case", SMOOTH, ids=lambda p: p.stem)
@pytest.mark.parametrize("alpha", ["search", 0.0, 1.0])
def test_any_alpha_is_the_same_function_up_to_rounding(case: Path, alpha: Any) -> None:
    graph = parse(case.read_text())
    want = outputs(graph)
    run(graph, [SmoothQuant(alpha=alpha)], Context(calibration=calibrator(graph)))
    for a, b in zip(want, outputs(graph), strict=True):
        finite = np.isfinite(a)  # f16 in one case
        # at most 96 products of f32 in each of five layers, each off by three roundings (2e-7); f16 rounds at 1e-3
        bound = 2e-3 if a.dtype == np.float16 else 1e-4
        assert difference(a[finite].astype(np.float64), b[finite].astype(np.float64)) < bound


OUTLIER = """
graph @main dialect=onnx {
  input %x : f32[batch, 64]
  const %ln.weight : f32[64] = rand:1
  const %fc1.weight : f32[64, 48] = rand:3
  const %fc2.weight : f32[48, 16] = rand:4
  %h : f32[batch, 64] = onnx.Mul(%x, %ln.weight)
  %y : f32[batch, 48] = onnx.MatMul(%h, %fc1.weight)
  %r : f32[batch, 48] = onnx.Relu(%y)
  %z : f32[batch, 16] = onnx.MatMul(%r, %fc2.weight)
  return %z
}
"""


def test_outliers_go_from_the_activation_into_the_weight() -> None:
    graph = parse(OUTLIER)
    before = Observed(graph, "h")
    run(graph, [SmoothQuant()], Context(calibration=calibrator(graph)))
    after = Observed(graph, "h")
    assert before.spread > 10 * after.spread
    weight = graph.consts["fc1.weight"].payload
    assert weight is not None
    magnitudes = np.abs(weight.array()).max(axis=1)
    assert magnitudes[2] == magnitudes.max()


class Observed:
    """The largest magnitude of the channels of a value over their median one."""

    def __init__(self, graph: Graph, name: str) -> None:
        with runnable(graph, [name]) as call:
            x = np.concatenate([np.abs(call(b)[name]) for b in batches(graph)])
        channels = x.max(axis=0)
        self.spread = float(channels.max() / np.median(channels))


def test_the_note_says_what_became_of_the_groups() -> None:
    graph = parse(OUTLIER)
    ctx = Context(calibration=calibrator(graph))
    run(graph, [SmoothQuant(alpha=0.5)], ctx)
    assert ctx.notes == ["smoothquant: 2 of 2 groups of linears smoothed, alpha 0.5 to 0.5, 0 by a q.scale"]


def test_calibration_data_is_asked_for_where_there_is_something_to_smooth() -> None:
    with pytest.raises(CalibrationError, match="smoothquant measures activations and needs --calibration"):
        run(parse(OUTLIER), [SmoothQuant()], Context())
    run(parse("graph @main dialect=onnx {\n  input %x : f32[2]\n  return %x\n}"), [SmoothQuant()], Context())


def test_planning_changes_nothing_and_reads_nothing() -> None:
    graph = parse(OUTLIER)
    before = show(graph)
    run(graph, [SmoothQuant()], Context(calibration=Planned()))
    assert show(graph) == before


@pytest.mark.parametrize("key", ["match", "skip"])
def test_a_glob_in_vain_is_an_error(key: str) -> None:
    graph = parse(OUTLIER)
    with pytest.raises(
        RecipeError, match=rf"QC402: smoothquant.{key} = 'nothing' matched nothing; linears are: fc1, fc2"
    ):
        run(graph, [SmoothQuant(**{key: ("nothing",)})], Context(calibration=calibrator(graph)))


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(RecipeError, match="alpha is a number from 0 to 1"):
        SmoothQuant(alpha=1.5)
    with pytest.raises(RecipeError, match="alpha is a number from 0 to 1"):
        SmoothQuant(grid=(0.1, -1.0))


def test_weights_that_hold_nan_leave_their_group_alone() -> None:
    graph = parse(OUTLIER)
    graph.consts["fc2.weight"].payload = constant(np.full((48, 16), np.nan, np.float32))
    ctx = Context(calibration=calibrator(graph))
    run(graph, [SmoothQuant(alpha=0.5)], ctx)
    assert [r.reason.message for r in ctx.refusals] == ["its weights hold NaN or infinity"]
    assert "1 of 2 groups" in ctx.notes[0]


def broken(edits: list[migration.Edit], factors: Array) -> list[Any]:
    """The division of one channel is forgotten."""
    factors = factors.copy()
    factors[5] = 1
    return migration.apply_edits(edits, factors)


def test_a_rescale_that_is_not_exact_is_caught_and_its_group_named(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = parse(OUTLIER)
    monkeypatch.setattr(smoothquant, "apply_edits", broken)
    with pytest.raises(Error, match=r"rescaling changed the group of fc1: %y differs by 0\.\d+ of its largest value"):
        run(graph, [SmoothQuant(alpha=1.0, skip=("fc2",))], Context(calibration=calibrator(graph)))


class Empty(Calibrator):
    """Data that never reaches the graph's values."""

    def observe(self, graph: Graph, wanted: Any) -> None:
        self.used = True

    def outputs(self, graph: Graph, names: Any, count: int) -> Iterator[dict[str, Array]]:
        return iter(())


def test_a_group_that_was_never_seen_is_left_alone() -> None:
    graph = parse(OUTLIER)
    before = show(graph)
    ctx = Context(calibration=Empty(open_data([]), runnable))
    run(graph, [SmoothQuant()], ctx)
    assert show(graph) == before
    assert [r.reason.message for r in ctx.refusals] == [
        "no calibration data reached its input %r",
        "no calibration data reached its input %h",
    ]


ATEN = """
graph @main dialect=aten {
  input %x : f32[batch, 64]
  const %ln.weight : f32[64] = rand:1
  const %ln.bias : f32[64] = rand:2
  const %up.weight : f32[96, 64] = rand:3
  const %up.bias : f32[96] = rand:4
  const %gate.weight : f32[96, 64] = rand:5
  const %down.weight : f32[32, 96] = rand:6
  %h : f32[batch, 64] = aten.layer_norm.default(%x, %ln.weight, %ln.bias) {args = [$0, [64], $1, $2, 0.00001]}
  %u : f32[batch, 96] = aten.linear.default(%h, %up.weight, %up.bias) {args = [$0, $1, $2]}
  %g : f32[batch, 96] = aten.linear.default(%h, %gate.weight) {args = [$0, $1]}
  %s : f32[batch, 96] = aten.silu.default(%g) {args = [$0]}
  %m : f32[batch, 96] = aten.mul.Tensor(%s, %u) {args = [$0, $1]}
  %y : f32[batch, 32] = aten.linear.default(%m, %down.weight) {args = [$0, $1]}
  return %y
}
"""


def test_aten_graphs_have_the_same_groups_and_places() -> None:
    graph = parse(ATEN)
    groups = migration.find_groups([as_linear(op) for op in graph if op.name in LINEAR_OPS])
    assert [(g.source.name, [lin.weight.name for lin in g.linears]) for g in groups] == [
        ("h", ["up.weight", "gate.weight"]),
        ("m", ["down.weight"]),
    ]
    places = [[(e.op.results[0].name, e.slot, e.axis) for e in migration.fold(g)] for g in groups]
    assert places == [[("h", 1, -1), ("h", 2, -1)], [("u", 1, 0), ("u", 2, -1)]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("%h : f32[batch, 64] = onnx.Softmax(%a)", "onnx.Softmax 'h' does not commute"),
        ("%h : f32[batch, 64] = onnx.Add(%a, %one)", "onnx.Add 'h' does not commute"),
        ("%h : f32[batch, 64] = onnx.Mul(%a, %a)", "onnx.Mul 'h' does not commute"),
        ("%h : f32[batch, 64] = onnx.Div(%row, %a)", "onnx.Div 'h' does not commute"),
        ("%h : f32[batch, 64] = onnx.Div(%a, %row)", "onnx.Div 'h' does not commute"),
    ],
)
def test_what_a_factor_cannot_pass_is_named(line: str, reason: str) -> None:
    graph = parse(f"""
    graph @main dialect=onnx {{
      input %x : f32[batch, 64]
      const %one : f32[] = dense(1.0)
      const %row : f32[64] = rand:9
      const %before.weight : f32[64, 64] = rand:1
      const %w : f32[64, 8] = rand:2
      %a : f32[batch, 64] = onnx.MatMul(%x, %before.weight)
      {line}
      %y : f32[batch, 8] = onnx.MatMul(%h, %w)
      return %y
    }}
    """)
    group = migration.find_groups([as_linear(op) for op in graph if op.name in LINEAR_OPS])[-1]
    with pytest.raises(Declined, match=reason):
        migration.fold(group)


def test_a_scalar_factor_is_passed() -> None:
    graph = parse("""
    graph @main dialect=onnx {
      input %x : f32[batch, 64]
      const %half : f32[] = dense(0.5)
      const %before.weight : f32[64, 64] = rand:1
      const %w : f32[64, 8] = rand:2
      %a : f32[batch, 64] = onnx.MatMul(%x, %before.weight)
      %b : f32[batch, 64] = onnx.Mul(%half, %a)
      %c : f32[batch, 64] = onnx.Div(%b, %half)
      %d : f32[batch, 64] = onnx.LeakyRelu(%c)
      %y : f32[batch, 8] = onnx.MatMul(%d, %w)
      return %y
    }
    """)
    group = migration.find_groups([as_linear(op) for op in graph if op.name in LINEAR_OPS])[-1]
    assert [(e.op.results[0].name, e.slot, e.axis) for e in migration.fold(group)] == [("a", 1, 1)]


def test_the_recipe_is_w8a8_with_one_pass_more() -> None:
    with_smoothing = recipe.load("w8a8-smooth").passes
    assert [p for p in with_smoothing if not isinstance(p, SmoothQuant)] == list(recipe.load("w8a8").passes)
    at = [p.name for p in with_smoothing].index("smoothquant")
    assert at < [p.name for p in with_smoothing].index("insert-qdq")
