"""Float against compiled: both in ONNX Runtime on the same inputs, output by output.

One model is open at a time, and one batch of outputs is in memory: those of the float model wait in files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.backends.onnx.feeds import made_up, nbytes
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.backends.onnx.probe import read_arrays, write_arrays
from qcompiler.calibrate.data import Data
from qcompiler.dtypes import Array
from qcompiler.memory import give_back
from qcompiler.report.model import OutputQuality, Quality
from qcompiler.verify.findings import Finding

ROWS = (32, 8, 2, 1)
"""Rows (tokens, pictures) of the made-up inputs: the most of these whose inputs are within :data:`INPUT_BYTES`."""
INPUT_BYTES = 1 << 16
SEEDS = 4
BATCHES = 4
"""Batches of data that are compared."""
BLOCK = 1 << 18
"""Elements of an output that are compared at a time: float64 copies of all of it are large."""


def compare(reference: Path, artifact: Path, data: Data | None = None) -> Quality | Finding | str:
    """Cosine, signal-to-noise and largest difference of every float output, over ``data`` or over made-up inputs.

    Of data the first :data:`BATCHES` batches are taken. Made-up inputs are random: for a language model they are random
    token ids, so the figures bound what the artifact does rather than say how well it speaks. Returns the reason when
    the float model cannot be run on the inputs, and a finding when it can but the artifact cannot.
    """
    try:
        float_model = _opened(reference)
    except Exception as e:
        return f"not compared: the float model does not load in the runtime ({_first_line(e)})"
    names = [o.name for o in float_model.get_outputs()]
    with tempfile.TemporaryDirectory(prefix="qcompiler.quality.") as folder:
        feeds, wanted = _run_float(float_model, reference, data, Path(folder))
        if not feeds:
            return f"not compared: {'no made-up inputs' if data is None else data.label + ' has nothing'} that it takes"
        del float_model
        give_back()
        try:
            compiled = _opened(artifact)
            seen = [Difference() for _ in names]
            for feed, file in zip(feeds, wanted, strict=True):
                for difference, want, got in zip(seen, read_arrays(str(file)), compiled.run(names, feed), strict=True):
                    difference.add(want, got)
        except Exception as e:
            message = f"the artifact does not run on inputs that the float model takes: {_first_line(e)}"
            fix = "the float model may run only because the runtime fuses what is wrong in it; check its shapes"
            return Finding("QC902", artifact.name, message, "", fix)
    outputs = {name: d.figures() for name, d in zip(names, seen, strict=True) if d.comparable}
    if not outputs:
        return "not compared: the model has no float output"
    return Quality("cosine", outputs)


def _opened(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False  # it grows in powers of two and keeps what one batch needed
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run_float(session: Any, path: Path, data: Data | None, folder: Path) -> tuple[list[dict[str, Array]], list[Path]]:
    """Inputs that the float model takes, batches of data or one for each seed, and the files of its outputs."""
    graph = load_onnx(path)
    feeds: list[dict[str, Array]] = []
    files: list[Path] = []
    if data is None:
        rows = next((m for m in ROWS if nbytes(next(made_up(graph, m), {})) <= INPUT_BYTES), ROWS[-1])
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
            files.append(folder / f"{len(files)}.npz")
            write_arrays(str(files[-1]), [a if _is_float(a) else np.zeros(0) for a in found])
            break
    return feeds, files


def _is_float(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


class Difference:
    """What one output of the compiled model is off by, summed up batch by batch."""

    def __init__(self) -> None:
        self.comparable, self.fits = True, True
        self.noise = self.signal = self.power = self.product = self.largest = 0.0

    def add(self, want: Array, got: Any) -> None:
        """See one batch; an empty ``want`` is one that is no float."""
        if not want.size:
            self.comparable = False
        elif want.shape != np.shape(got):
            self.fits = False
        else:
            x, y = want.reshape(-1), got.reshape(-1)
            for at in range(0, x.size, BLOCK):
                self._add(x[at : at + BLOCK].astype(np.float64), y[at : at + BLOCK].astype(np.float64))

    def _add(self, a: Array, b: Array) -> None:
        self.signal, self.power = self.signal + float(a @ a), self.power + float(b @ b)
        self.product += float(a @ b)
        a -= b
        self.noise += float(a @ a)
        self.largest = float(np.maximum(self.largest, np.abs(a).max(initial=0.0)))

    def figures(self) -> OutputQuality:
        if not self.fits:
            return OutputQuality(None, None, None)
        norms = float(np.sqrt(self.signal) * np.sqrt(self.power))
        cosine = self.product / norms if norms > 0 else None
        if self.noise == 0:
            return OutputQuality(cosine, float("inf"), self.largest)
        ratio = 10 * np.log10(self.signal / self.noise) if self.signal > 0 else float("-inf")
        return OutputQuality(cosine, float(ratio), self.largest)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]
