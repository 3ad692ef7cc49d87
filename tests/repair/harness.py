"""Repair a graph and compare it with what its own text says: every quantize and dequantize executed as it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

import qcompiler
from qcompiler.backends.onnx.evidence import verify_file
from qcompiler.backends.onnx.kernels import target
from qcompiler.errors import InputError, RejectedError
from qcompiler.report.model import Report
from tests.verify.build import Array

Feeds = Sequence[Mapping[str, Array]]

EXACT = 1e-5
"""Share of the largest output: int32 sums and f32 sums of a few hundred products round so much."""
INT8_ACTIVATIONS = 0.02
"""Share of the largest output where the kernel rounds its activation to int8 in blocks of K: half a step of 1/127 of
each block's largest element is an error of 0.7 % (one sigma) of an output's own spread; 4 sigma of it over outputs
whose largest is 3 sigma are 0.9 %, and this is twice that."""
FREED = 0.03
"""The same where the rounding of the activation that the graph states (half a step of 1/255 of its range) went too."""
HALF = 2e-3
"""Share of the largest output of a model in f16: two roundings to 11 bits."""
REQUANTIZING = ("MatMulNBits.int8", "MatMulNBits.w2int8")


@dataclass
class Outcome:
    """What became of a graph: codes that rejected it before, then an artifact, or the words of the refusal."""

    before: frozenset[str]
    refusal: str = ""
    report: Report | None = None
    off: float = 0.0
    step: float = 0.0
    half: bool = False
    kernels: frozenset[str] = field(default_factory=frozenset)

    @property
    def allowed(self) -> float:
        """The share of the largest output by which the artifact may be off: what the kernels that it runs round, and
        one step where the output is made of codes (a tie may fall to the other side)."""
        rounds = INT8_ACTIVATIONS if any(k.endswith(REQUANTIZING) for k in self.kernels) else EXACT
        return max(rounds, HALF if self.half else 0.0) + 1.01 * self.step


def literal(path: Path, feeds: Feeds) -> list[list[Array]]:
    """The outputs with every optimizer of the runtime off: each node by its own kernel, in the order of the file."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [session.run(None, dict(feed)) for feed in feeds]


def optimized(path: Path, feeds: Feeds) -> list[list[Array]]:
    """The outputs as users get them: default options."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [session.run(None, dict(feed)) for feed in feeds]


def off_by(got: Sequence[Sequence[Array]], want: Sequence[Sequence[Array]]) -> float:
    """The largest difference, as a share of the largest output."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        for x, y in zip(a, b, strict=True):
            wide = np.asarray(y, np.float64)
            assert np.isfinite(wide).all()
            worst = max(worst, float(np.abs(np.asarray(x, np.float64) - wide).max() / max(np.abs(wide).max(), 1e-30)))
    return worst


def repair(
    path: Path, feeds: Feeds, *, expect: Callable[[Mapping[str, Array]], Array] | None = None, run: bool = False
) -> Outcome:
    """Judge the graph at ``path``, repair it, run both.

    ``expect``: the answer, where the runtime's own kernels are no yardstick.
    ``run``: the runtime's own optimized graph decides the first verdict, too.
    """
    _, findings, _ = verify_file(path, target("ort-cpu"), run=run)
    out = Outcome(frozenset(f.code for f in findings if f.severity == "error"))
    made = path.with_name("repaired.onnx")
    try:
        artifact = qcompiler.compile(str(path), target="ort-cpu", recipe="repair", out=str(made))
    except RejectedError as e:
        out.report = e.report
        out.refusal = "; ".join(f"{f.message}: {f.reason}" for f in e.report.findings)
        return out
    except InputError as e:
        out.refusal = str(e)
        return out
    out.report = artifact.report
    out.kernels = frozenset(k for s in artifact.report.sites for k in s.kernel.values())
    want = [[expect(f)] for f in feeds] if expect is not None else literal(path, feeds)
    got = optimized(made, feeds)
    out.off, out.half = off_by(got, want), any(a.dtype == np.float16 for arrays in got for a in arrays)
    largest = min(max(np.abs(np.asarray(a, np.float64)).max() for a in arrays) for arrays in want)
    out.step = last_step(onnx.load(path)) / max(largest, 1e-30)
    return out


PASSED = frozenset({"Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "MaxPool"})


def last_step(model: onnx.ModelProto) -> float:
    """The scale of the DequantizeLinear that makes the output, through movement; 0 where the output is no codes."""
    makers = {o: n for n in model.graph.node for o in n.output}
    values = {t.name: t for t in model.graph.initializer}
    node = makers.get(model.graph.output[0].name)
    while node is not None and node.op_type in PASSED:
        node = makers.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear" or node.input[1] not in values:
        return 0.0
    return float(np.abs(onnx.numpy_helper.to_array(values[node.input[1]]).astype(np.float64)).max())


def saved(model: onnx.ModelProto, folder: Path, name: str = "source.onnx") -> Path:
    onnx.save(model, folder / name)
    return folder / name
