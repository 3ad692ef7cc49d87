"""The passes of W8A8 on captured networks: each step against the graph before it, in both spellings of a linear."""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import pytest

from qcompiler import recipe
from qcompiler.backends.torch import kernels
from qcompiler.backends.torch.capture import load
from qcompiler.backends.torch.running import runnable
from qcompiler.calibrate.calibrator import Calibrator
from qcompiler.calibrate.data import open_data
from qcompiler.dtypes import Array
from qcompiler.errors import RecipeError
from qcompiler.ir import Graph
from qcompiler.pipeline import Context, run
from qcompiler.spec import check
from qcompiler.target import Target
from tests.backends.torch.exports import program, sample
from tests.calibrate.test_running_torch import feed

WEIGHTS = (
    'insert-qdq{weights = "int8 channel sym", convs = "int8 channel sym", rounding = "balanced", '
    'products = "int8 tensor sym", embeddings = "int8 channel sym"}'
)
DYNAMIC = 'insert-activation-qdq{activations = "uint8 tensor asym dynamic"}'
STATIC = 'insert-activation-qdq{activations = "uint8 tensor asym"}'
FUSE = ("fold-constants", "propagate-qdq", "fold-qdq", "fuse-embedding", "fuse-integer", "fuse-linear", "dce")
LOSSY = {"insert-qdq": 33.0, "insert-activation-qdq": 33.0, "correct-bias": 33.0}
"""dB over the graph before: 8 bits of values up to 4 sigma are 40 dB; two layers take 3, ragged rows some."""
EXACT = {"fuse-integer": 120.0, "fold-batchnorm": 120.0, "smoothquant": 120.0}
"""Sums of f32 against sums of f64: 24 bits are 140 dB, a few layers on."""
SAME = 200.0
"""What moves and renames changes no bit."""


@functools.cache
def aot(name: str) -> object:
    """The program as AOT spells it: linears as view, transposed weight, mm or addmm, view."""
    return program(name).run_decompositions()


def graph_of(name: str, spelling: str) -> Graph:
    return load(program(name) if spelling == "export" else aot(name))  # type: ignore[arg-type]


def outputs(graph: Graph, given: dict[str, Array]) -> list[Array]:
    with runnable(graph, []) as call:
        found = call(given)
    return [found[v.name] for v in graph.outputs]


def decibels(want: list[Array], got: list[Array]) -> float:
    worst = np.inf
    for a, b in zip(want, got, strict=True):
        wide = a.astype(np.float64)
        noise = np.square(wide - b.astype(np.float64)).mean()
        worst = min(worst, 10 * np.log10(np.square(wide).mean() / max(noise, 1e-40)))
    return float(worst)


def steps_of(name: str, spelling: str, steps: tuple[str, ...], target: Target | None = None) -> tuple[Graph, Context]:
    """Run ``steps`` one by one; each changes the outputs by as little as it says."""
    graph = graph_of(name, spelling)
    given = feed(graph, sample(name).args)
    ctx = Context(target, calibration=Calibrator(open_data([given]), runnable))
    before = outputs(graph, given)
    for step in steps:
        run(graph, recipe.parse_line(step).passes, ctx)
        check(graph)
        now, word = outputs(graph, given), step.partition("{")[0]
        least = LOSSY.get(word, EXACT.get(word, SAME))
        assert (got := decibels(before, now)) >= least, (word, got)
        before = now
    return graph, ctx


def names(graph: Graph) -> Counter[str]:
    return Counter(op.name for op in graph.walk())


@pytest.mark.parametrize(("name", "count"), [("mlp", 2), ("llama_tied", 8)])
def test_both_spellings_give_the_same_sites(name: str, count: int) -> None:
    seen, made = [], []
    for spelling in ("export", "aot"):
        graph, ctx = graph_of(name, spelling), Context(None)
        run(graph, recipe.parse_line(", ".join(("normalise", "fold-batchnorm", WEIGHTS, DYNAMIC, *FUSE))).passes, ctx)
        assert names(graph)["q.linear_dyn"] == count
        made.append(outputs(graph, feed(graph, sample(name).args)))
        seen.append([(s.name, s.op, s.n, s.k, s.scheme) for s in ctx.ledger])
    assert seen[0] == seen[1]
    assert decibels(*made) >= 45  # the same numbers but for codes at ties: one of 255 in a few hundred


def test_conv1d_of_gpt2_shares_its_activations() -> None:
    graph, _ = steps_of("gpt2", "export", ("normalise", WEIGHTS, DYNAMIC, *FUSE))
    found = names(graph)
    assert (found["q.linear_dyn"], found["q.embedding"]) == (9, 2)
    assert not found["aten.addmm.default"] + found["aten.linear.default"]


@pytest.mark.parametrize("spelling", ["export", "aot"])
def test_static_codes_of_a_convolutional_net(spelling: str) -> None:
    """The batch norms are folded, the Relu and the pool run on codes, what a GELU reads is float."""
    steps = ("normalise", "fold-batchnorm", WEIGHTS, "correct-bias", STATIC, *FUSE)
    graph, ctx = steps_of("cnn", spelling, steps)
    found = names(graph)
    assert (found["q.conv"], found["q.linear_static"]) == (2, 1)
    assert not any("batch_norm" in name or "relu" in name for name in found)
    assert [op.operands[0].tensor.dtype.name for op in graph if op.name == "aten.max_pool2d.default"] == ["uint8"]  # type: ignore[union-attr]
    assert {s.status for s in ctx.ledger} == {"pending"}


@pytest.mark.parametrize("name", ["mlp", "llama_tied"])
def test_smoothing_is_exact_and_static_linears_fuse(name: str) -> None:
    graph, ctx = steps_of(name, "export", ("normalise", "smoothquant", WEIGHTS, "correct-bias", STATIC, *FUSE))
    assert names(graph)["q.linear_static"] == sum(s.op == "linear" for s in ctx.ledger)


def test_what_no_row_serves_is_named() -> None:
    """A target without kernels for convolutions keeps their weights in float and says so; linears are fused."""
    full = kernels.target("torch-cpu")
    rows = tuple(r for r in full.rows if not r.op.startswith("q.conv"))
    target = Target("torch-cpu", "", full.features | {"x86_64", "vnni"}, rows, "aten")
    for kind in (DYNAMIC, STATIC):
        graph, ctx = steps_of("cnn", "export", ("normalise", "fold-batchnorm", WEIGHTS, kind, *FUSE), target)
        assert names(graph)["aten.conv2d.default"] == 2
        skipped = {s.name: s.reason for s in ctx.ledger if s.status == "skipped"}
        assert skipped.keys() == {"0", "4"}
        assert all("no kernel for q.conv" in str(reason) for reason in skipped.values())


def test_a_weight_in_a_subgraph_is_named() -> None:
    graph = load(program("cond"))
    with pytest.raises(RecipeError, match=r"its weight is passed to a subgraph of higher_order\.cond"):
        run(graph, recipe.parse_line(f"normalise, {WEIGHTS}").passes, Context(None))
