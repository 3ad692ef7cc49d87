"""What insert-activation-qdq refuses, skips and asks for; where it puts pairs stands in the text cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from qcompiler import recipe
from qcompiler.backends.onnx import kernels
from qcompiler.calibrate.calibrator import Planned
from qcompiler.calibrate.observers import Observer
from qcompiler.errors import CalibrationError, RecipeError
from qcompiler.ir import Graph
from qcompiler.pairs import scalar_parameters
from qcompiler.pipeline import Context, run
from qcompiler.reader import parse
from qcompiler.scheme import parse_scheme

WEIGHTS = 'insert-qdq{weights = "int8 channel sym", convs = "int8 channel sym"}'
CHAIN = """
graph @main dialect=onnx meta {opset_import = [["", 17]]} {
  input %x : f32[1, 4, 8, 8]
  const %w1 : f32[8, 4, 3, 3] = rand:1
  const %w2 : f32[8, 8, 1, 1] = rand:2
  const %w3 : f32[8, 8, 1, 1] = rand:3
  %a : f32[1, 8, 6, 6] = onnx.Conv(%x, %w1) loc("a")
  %s : f32[1, 8, 6, 6] = onnx.Sigmoid(%a) loc("act")
  %b : f32[1, 8, 6, 6] = onnx.Conv(%s, %w2) loc("b")
  %c : f32[1, 8, 6, 6] = onnx.Conv(%b, %w3) loc("c")
  return %c
}
"""


class Ranges(Planned):
    """Says of each value what it is told: its least and greatest, or nothing where it was never seen."""

    def __init__(self, known: Mapping[str, tuple[float, float] | None]) -> None:
        super().__init__()
        self.known = known
        self.asked: list[str] = []

    def observe(self, graph: Graph, wanted: Mapping[str, Sequence[Observer]]) -> None:
        self.asked += wanted
        for name, observers in wanted.items():
            ends = self.known.get(name, (-1.0, 1.0))
            for observer in observers if ends is not None else ():
                observer.update(np.linspace(*ends, 1024, dtype=np.float32))


def inserted(text: str, calibration: Planned | None, options: str = "") -> tuple[Graph, Context]:
    graph = parse(text)
    ctx = Context(kernels.target("ort-cpu:avx512vnni"), calibration=calibration)
    options = options or 'activations = "uint8 tensor asym", observer = "minmax"'
    run(graph, recipe.parse_line(f"{WEIGHTS}, insert-activation-qdq{{{options}}}").passes, ctx)
    return graph, ctx


def pairs(graph: Graph) -> dict[str, tuple[float, int]]:
    """Activation that is quantized -> its scale and zero point."""
    out = {}
    for op in graph:
        found = scalar_parameters(op) if op.name == "q.quantize" else None
        if found is not None and op.operands[0] is not None:
            out[op.operands[0].name] = (float(found[0]), 0 if found[1] is None else int(found[1]))
    return out


def test_ranges_become_parameters() -> None:
    graph, _ = inserted(CHAIN, Ranges({"x": (-1.0, 3.0), "a": (-3.0, 1.0), "s": (0.0, 1.0), "b": (0.5, 2.0)}))
    found = pairs(graph)
    assert found["x"] == (pytest.approx(4 / 255), 64)
    assert found["a"] == (pytest.approx(4 / 255), 191)
    assert found["s"] == (pytest.approx(1 / 255), 0)
    assert found["b"] == (pytest.approx(2 / 255), 0)  # a range always holds zero
    assert set(found) == {"x", "a", "s", "b", "c_float"}


def test_symmetric_activations() -> None:
    graph, _ = inserted(CHAIN, Ranges({"x": (-1.0, 3.0)}), 'activations = "int8 tensor sym", observer = "minmax"')
    scale, zero = pairs(graph)["x"]
    assert scale == pytest.approx(3 / 127.5)
    assert zero == 0


def test_data_is_asked_for() -> None:
    with pytest.raises(CalibrationError, match="insert-activation-qdq measures activations and needs --calibration"):
        inserted(CHAIN, None)


def test_dynamic_needs_no_data() -> None:
    graph, _ = inserted(CHAIN, None, 'activations = "uint8 tensor asym dynamic"')
    assert [op.name for op in graph].count("q.choose_qparams") == 3


def test_what_was_never_seen_stays_float() -> None:
    """Nothing reached the result of b: the two convolutions that make or read it stay float, the others do not."""
    graph, ctx = inserted(CHAIN, Ranges({"b": None}))
    assert ctx.ledger["w1"].status == "pending"
    for site in ("w2", "w3"):
        assert ctx.ledger[site].status == "skipped"
        assert ctx.ledger[site].reason == "no calibration data reached its activation or its result"
    float_convs = {op.label for op in graph if op.name == "onnx.Conv" and op.operands[1] is graph.consts.get("w2")}
    assert float_convs == {"b"}
    assert "b" not in pairs(graph)


def test_a_range_that_only_a_function_lacks_costs_no_convolution() -> None:
    """Nothing reached the sum between two functions: they run in float, the convolutions around them on codes."""
    text = CHAIN.replace(
        '%b : f32[1, 8, 6, 6] = onnx.Conv(%s, %w2) loc("b")',
        '%t : f32[1, 8, 6, 6] = onnx.Add(%s, %s) loc("sum")\n  %u : f32[1, 8, 6, 6] = onnx.LeakyRelu(%t) loc("leak")\n'
        '  %b : f32[1, 8, 6, 6] = onnx.Conv(%u, %w2) loc("b")',
    )
    graph, ctx = inserted(text, Ranges({"t": None}))
    assert all(s.status == "pending" for s in ctx.ledger)
    assert {"a", "u", "b"} <= set(pairs(graph))
    assert "t" not in pairs(graph)


def test_globs_in_vain() -> None:
    with pytest.raises(
        RecipeError, match=r"insert-activation-qdq\.skip = 'nothing' matched nothing; sites are: w1, w2"
    ):
        inserted(CHAIN, Planned(), 'activations = "uint8 tensor asym", skip = ["nothing"]')


@pytest.mark.parametrize("scheme", ["int8 channel sym", "nf4 tensor sym", "f4e2m1 token sym dynamic"])
def test_schemes_without_a_kernel(scheme: str) -> None:
    assert parse_scheme(scheme)
    with pytest.raises(RecipeError, match="or a block b1xM; the nearest is 'uint8 tensor asym'"):
        inserted(CHAIN, Planned(), f'activations = "{scheme}"')


def test_only_what_needs_a_range_is_watched() -> None:
    calibration = Ranges({})
    inserted(CHAIN, calibration)
    assert sorted(calibration.asked) == ["a", "b", "c", "s", "x"]


LAYER = """graph @main dialect=onnx meta {opset_import = [["", 21]]} {
  input %x : f32[batch, 128]
  const %w : f32[128, 64] = rand:1
  %y : f32[batch, 64] = onnx.MatMul(%x, %w) loc("up")
  return %y
}
"""


@pytest.mark.parametrize("name", ["fp8", "w4a8"])
def test_codes_of_activations_that_no_kernel_takes_refuse_the_model(name: str) -> None:
    """One finding for all layers, which names the nearest that there are."""
    graph, ctx = parse(LAYER), Context(kernels.target("ort-cpu:avx512vnni"))
    run(graph, [p for p in recipe.load(name).passes if p.name != "choose-layout"], ctx)
    (finding,) = [f for f in ctx.findings if f.severity == "error"]
    assert (finding.code, finding.op) == ("QC201", "insert-activation-qdq")
    assert "kernels of ort-cpu:avx512vnni take activations as int8 tensor, uint8 tensor, uint8 tensor" in finding.reason
    assert finding.fix == "choose one of int8 tensor, uint8 tensor, uint8 tensor dynamic"


@pytest.mark.parametrize("name", ["f8a16", "nf4", "fp4", "mxfp4", "nvfp4"])
def test_codes_of_weights_that_no_kernel_takes_are_refused(name: str) -> None:
    graph, ctx = parse(LAYER), Context(kernels.target("ort-cpu:avx512vnni"))
    run(graph, [p for p in recipe.load(name).passes if p.name != "choose-layout"], ctx)
    assert [op.name for op in graph] == ["q.dequantize", "onnx.MatMul"]
    (refusal,) = [r for r in ctx.refusals if r.rule == "fuse_dequant_into_linear"]
    assert refusal.reason.code == "QC201"
    assert refusal.reason.fix == "choose one of int4, int8, uint4, uint8"
