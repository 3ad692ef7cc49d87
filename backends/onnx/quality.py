"""Float against compiled: both in ONNX Runtime on the same inputs, output by output."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.backends.onnx.feeds import made_up
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.calibrate.data import Data
from qcompiler.dtypes import Array
from qcompiler.report.model import OutputQuality, Quality
from qcompiler.verify.findings import Finding

ROWS = (32, 8, 2, 1)
"""Rows (tokens, pictures) of the made-up inputs: the most of these whose inputs are within :data:`INPUT_BYTES`."""
INPUT_BYTES = 1 << 16
SEEDS = 4
BATCHES = 4
"""Batches of data that are compared."""


def compare(reference: Path, artifact: Path, data: Data | None = None) -> Quality | Finding | str:
    """Cosine, signal-to-noise and largest difference of every float output, over ``data`` or over made-up inputs.

    Of data the first :data:`BATCHES` batches are taken. Made-up inputs are random: for a language model they are random
    token ids, so the figures bound what the artifact does rather than say how well it speaks. Returns the reason when
    the float model cannot be run on the inputs, and a finding when it can but the artifact cannot.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        float_model = ort.InferenceSession(str(reference), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        return f"not compared: the float model does not load in the runtime ({_first_line(e)})"
    feeds, wanted = _run_float(float_model, reference, data)
    if not feeds:
        return f"not compared: {'no made-up inputs' if data is None else data.label + ' has nothing'} that it takes"
    names = [o.name for o in float_model.get_outputs()]
    del float_model
    try:
        compiled = ort.InferenceSession(str(artifact), options, providers=["CPUExecutionProvider"])
        given = [compiled.run(names, feed) for feed in feeds]
    except Exception as e:
        message = f"the artifact does not run on inputs that the float model takes: {_first_line(e)}"
        fix = "the float model may run only because the runtime fuses what is wrong in it; check its shapes"
        return Finding("QC902", artifact.name, message, "", fix)
    outputs: dict[str, OutputQuality] = {}
    for i, name in enumerate(names):
        want, got = [w[i] for w in wanted], [g[i] for g in given]
        if all(isinstance(w, np.ndarray) and w.dtype.kind == "f" and w.size for w in want):
            outputs[name] = _figures(want, got)
    if not outputs:
        return "not compared: the model has no float output"
    return Quality("cosine", outputs)


def _run_float(session: Any, path: Path, data: Data | None) -> tuple[list[dict[str, Array]], list[list[Any]]]:
    """Inputs that the float model takes, batches of data or one for each seed, and its outputs."""
    graph = load_onnx(path)
    feeds: list[dict[str, Array]] = []
    outputs: list[list[Any]] = []
    if data is None:
        rows = next((m for m in ROWS if _nbytes(next(made_up(graph, m), {})) <= INPUT_BYTES), ROWS[-1])
        candidates: Iterable[Iterable[dict[str, Array]]] = (made_up(graph, rows, seed) for seed in range(SEEDS))
    else:
        candidates = ([batch] for batch in islice(data.batches(graph.inputs), BATCHES))
    for tried in candidates:
        for feed in tried:
            try:
                found = session.run(None, feed)
            except Exception:  # these inputs do not suit the model: the runtime says so in many ways
                continue
            feeds.append(feed)
            outputs.append(found)
            break
    return feeds, outputs


def _nbytes(feed: dict[str, Array]) -> int:
    return sum(a.nbytes for a in feed.values())


def _figures(want: list[Array], got: list[Array]) -> OutputQuality:
    if any(w.shape != g.shape for w, g in zip(want, got, strict=True)):
        return OutputQuality(None, None, None)
    noise = signal = power = product = largest = 0.0
    for w, g in zip(want, got, strict=True):  # a batch at a time: float64 copies of all of them are large
        a, b = w.astype(np.float64).ravel(), g.astype(np.float64).ravel()
        signal, power, product = signal + float(a @ a), power + float(b @ b), product + float(a @ b)
        a -= b
        noise, largest = noise + float(a @ a), float(np.maximum(largest, np.abs(a).max(initial=0.0)))
    norms = float(np.sqrt(signal) * np.sqrt(power))
    cosine = product / norms if norms > 0 else None
    ratio = float("inf") if noise == 0 else 10 * np.log10(signal / noise) if signal > 0 else float("-inf")
    return OutputQuality(cosine, float(ratio), largest)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
