"""The passes around pairs of activations on random networks: exact ones change no bit, fusing changes codes at ties."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from qcompiler.backends.onnx import kernels
from qcompiler.errors import CalibrationError
from qcompiler.ir import Graph, Op
from qcompiler.pairs import is_activation, is_constant
from qcompiler.views import CONV_OPS, LINEAR_OPS
from tests.passes.nets import PAIRS, apply, nets, outputs, samples

SOME = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MOVE = "propagate-qdq, fold-qdq, dce"
FUSE = "fuse-integer, dce"


def dequantized(op: Op) -> bool:
    return any(v is not None and v.owner is not None and v.owner.name == "q.dequantize" for v in op.operands)


def paired(graph: Graph, passes: str) -> None:
    """Pairs on a net whose values stay finite; calibration refuses one whose exponentials overflow."""
    try:
        apply(graph, passes)
    except CalibrationError as e:
        if "infinite" not in str(e):
            raise
        reject()


@SOME
@given(nets())
def test_moving_and_folding_change_no_bit(graph: Graph) -> None:
    paired(graph, PAIRS)
    feed = samples(graph, 1, seed=9)[0]
    before = outputs(graph, feed)
    apply(graph, MOVE)
    for a, b in zip(before, outputs(graph, feed), strict=True):
        np.testing.assert_array_equal(a, b)


SCHEMES = st.sampled_from(["uint8 tensor asym", "int8 tensor sym", "int8 tensor asym", "uint8 tensor asym dynamic"])


@SOME
@given(nets(), SCHEMES)
def test_fused_ops_compute_what_the_pairs_did(graph: Graph, scheme: str) -> None:
    """The host ops before sum in f32, the reference after in f64: a code moves by one where they fall on either side
    of a tie, which is rare, and one code of 255 is 48 dB below the range of even a handful of numbers."""
    paired(graph, f"{PAIRS.replace('uint8 tensor asym', scheme)}, {MOVE}")
    feed = samples(graph, 1, seed=9)[0]
    before = outputs(graph, feed)
    if any(np.abs(b).max(initial=0.0) > 1e15 or not np.isfinite(b).all() for b in before):
        reject()  # exponentials of these inputs overflow, or their squares do
    ctx = apply(graph, FUSE, kernels.target("ort-cpu:avx512vnni"))
    for a, b in zip(before, outputs(graph, feed), strict=True):
        noise, signal = np.square(a - b).mean(), np.square(a).mean()
        assert noise <= 1e-3 * signal + 1e-12, f"{noise / signal}"
    every_product_is_fused(graph)
    every_island_is_named(graph, {s.name for s in ctx.ledger if s.op == "float"})


def every_product_is_fused(graph: Graph) -> None:
    left = [op for op in graph.walk() if (op.name in CONV_OPS or op.name in LINEAR_OPS) and dequantized(op)]
    assert not left, [op.label for op in left]


def every_island_is_named(graph: Graph, named: set[str]) -> None:
    for op in graph.walk():
        if op.name.startswith("q.") or not dequantized(op):
            continue
        again = [u for r in op.results for u in r.users if u.name == "q.quantize"]
        assert not again or op.label in named, op.label
    for op in graph.walk():
        if op.name == "q.dequantize" and is_activation(op) and not is_constant(op.operand(0)):
            source = op.operands[0].owner  # type: ignore[union-attr]  # a dequantize has codes
            assert source is None or source.name != "q.quantize", "a pair around nothing"
