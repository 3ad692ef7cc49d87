"""Did ONNX Runtime's own rewriting change what the model computes? Compare it with itself, optimizations off.

Both graphs give out the results of the nodes that the optimizer made; the first one that is far off is to blame.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from qcompiler.backends.onnx.nodes import low_bit_nodes
from qcompiler.backends.onnx.opening import Names, Opened
from qcompiler.backends.onnx.probe import read_arrays
from qcompiler.backends.onnx.worker import ProbeDied, Worker
from qcompiler.dtypes import Array
from qcompiler.ir import Graph
from qcompiler.verify.findings import Finding

TOLERANCE = 0.25
"""Error of a result, root mean square, over its spread. int8 activations cost about 0.01 a layer, and some of it adds
up over layers; what the optimizer gets wrong (scales that it loses or reads as others) costs 0.5 and more."""


def made_by_runtime(final: Graph, source: Graph) -> list[tuple[str, str]]:
    """Results of low-bit nodes that the source computes in another way: (value name, op name in the artifact)."""
    own = {op.results[0].name: op.name for op in source.walk() if op.results}
    names = Names(source)
    return [
        (node.op.results[0].name, names.of(node.op))
        for node in low_bit_nodes(final)
        if node.op.graph is final and own.get(node.op.results[0].name, node.op.name) != node.op.name
    ]


def compare(path: Path, source: Graph, opened: Opened, worker: Worker, folder: Path) -> list[Finding]:
    """QC303 for the first node whose result the runtime's rewriting changed; empty when there is none to compare."""
    if opened.graph is None or opened.feed is None or opened.optimized is None:
        return []
    made = made_by_runtime(opened.graph, source)
    if not made:
        return []
    final = opened.optimized if opened.whole else _with_weights(path, worker, folder)
    if final is None:
        return []
    found = []
    for label, file in (("source", path), ("final", final)):
        answer = _outputs(label, file, [name for name, _ in made], opened.feed, worker, folder)
        if answer is None:
            return []
        found.append(answer)
    for name, op in made:
        want, got = found[0].get(name), found[1].get(name)
        if want is None or got is None or want.shape != got.shape:
            continue
        off = distance(got, want)
        if off > TOLERANCE:
            message = f"what ONNX Runtime makes of '{op}' computes something else"
            reason = f"with optimizations on, '{name}' is off by {off:.3g} of its spread"
            fix = "emit the low-bit node itself, or give the weight scales that the runtime's rewriting keeps"
            return [Finding("QC303", op, message, reason, fix)]
    return []


def _with_weights(path: Path, worker: Worker, folder: Path) -> Path | None:
    """The optimized graph once more, this time with its weights."""
    file = folder / "whole.onnx"
    try:
        answer = worker.ask({"model": str(path), "optimized": str(file)})
    except ProbeDied:
        return None
    return file if answer["loaded"] else None


def distance(got: Array, want: Array) -> float:
    """Root mean square error over the standard deviation of ``want``."""
    a, b = got.astype(np.float64), want.astype(np.float64)
    off = float(np.sqrt(np.mean((a - b) ** 2))) if a.size else 0.0
    spread = float(np.std(b)) or float(np.abs(b).max(initial=0.0)) or 1.0
    return off / spread if np.isfinite(off) else float("inf")


def _outputs(
    label: str, file: Path, names: Iterable[str], feed: dict[str, Any], worker: Worker, folder: Path
) -> dict[str, Array] | None:
    """The named values when ``file`` runs unoptimized; None when it does not run that way."""
    model = onnx.load(file)
    have = {o.name for o in model.graph.output}
    model.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in dict.fromkeys(names) if n not in have)
    changed, out = folder / f"{label}.outputs.onnx", folder / f"{label}.outputs"
    out.mkdir()
    try:
        onnx.save(model, changed)
        answer = worker.ask({"model": str(changed), "level": "none", "feeds": [feed], "outputs": str(out)})
    except (ProbeDied, ValueError):
        return None
    finally:
        changed.unlink(missing_ok=True)
    if not answer["runs"] or not answer["runs"][0]["ok"]:
        return None
    run = answer["runs"][0]
    return dict(zip(run["names"], read_arrays(run["arrays"]), strict=True))
