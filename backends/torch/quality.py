"""Float against compiled: two programs on the same inputs, output by output.

One program is open at a time, and one batch of outputs is in memory: those of the float one wait in files.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

import numpy as np

from qcompiler.backends.onnx.probe import read_arrays, write_arrays
from qcompiler.backends.torch.calling import Opened, is_float, result_values
from qcompiler.backends.torch.opening import opened
from qcompiler.backends.torch.quiet import sentence_of
from qcompiler.backends.torch.workload import guesses
from qcompiler.calibrate.data import Data
from qcompiler.dtypes import Array
from qcompiler.errors import InputError
from qcompiler.ir import TensorType
from qcompiler.memory import give_back
from qcompiler.metrics import Closeness
from qcompiler.report.model import OutputQuality, Quality
from qcompiler.verify.findings import Finding

SEEDS = 4
BATCHES = 4
"""Batches of data that are compared."""
ATTEMPTS = 4
"""How many guesses at inputs are tried for each seed."""


def compare(reference: Path, artifact: Path, data: Data | None = None) -> Quality | Finding | str:
    """Cosine (mean over batches), signal-to-noise and largest difference of every float result, over ``data`` or over
    made-up inputs.

    Of data the first :data:`BATCHES` batches are taken. Made-up inputs are random: for a language model they are random
    token ids, so the figures bound what the artifact does rather than say how well it speaks. Returns the reason when
    the float program cannot be run on the inputs, and a finding when it can but the artifact cannot.
    """
    try:
        floats = opened(reference)
    except InputError as e:
        return f"not compared: the float model does not load in torch ({sentence_of(e)})"
    names, kinds = floats.names, [is_float(v) for v in result_values(floats.graph)]
    if not any(kinds):
        return "not compared: the model has no float output"
    with tempfile.TemporaryDirectory(prefix="qcompiler.quality.") as folder:
        feeds, wanted = _run_float(floats, kinds, data, Path(folder))
        if not feeds:
            return f"not compared: {'no made-up inputs' if data is None else data.label + ' has nothing'} that it takes"
        del floats
        let_go()
        try:
            seen = _compared(opened(artifact), feeds, wanted)
        except Exception as e:
            message = f"the artifact does not run on inputs that the float model takes: {sentence_of(e)}"
            return Finding("QC902", artifact.name, message, "", "compile it again; the file may be damaged")
    return Quality("cosine", {n: s for n, s, kept in zip(names, seen, kinds, strict=True) if kept})


def let_go() -> None:
    """Return the memory of programs that nothing refers to any more."""
    gc.collect()
    give_back()


def _run_float(
    floats: Opened, kinds: list[bool], data: Data | None, folder: Path
) -> tuple[list[dict[str, Array]], list[Path]]:
    """Inputs that the float program takes, batches of data or one for each seed, and the files of its float results."""
    graph = floats.graph
    if data is None:
        candidates: Iterable[Iterable[Mapping[str, Array]]] = (
            islice(guesses(graph, seed), ATTEMPTS) for seed in range(SEEDS)
        )
    else:
        inputs = [v for v in graph.inputs if isinstance(v.type, TensorType) and v.payload is None]
        candidates = ([batch] for batch in islice(data.batches(inputs), BATCHES))
    feeds: list[dict[str, Array]] = []
    files: list[Path] = []
    for tried in candidates:
        for feed in tried:
            try:
                found = floats.run(feed)
            except Exception:  # these inputs do not suit the model: torch says so in many ways
                continue
            feeds.append(dict(feed))
            files.append(folder / f"{len(files)}.npz")
            write_arrays(str(files[-1]), [a if kept else np.zeros(0) for a, kept in zip(found, kinds, strict=True)])
            break
    return feeds, files


def _compared(compiled: Opened, feeds: list[dict[str, Array]], wanted: list[Path]) -> list[OutputQuality]:
    """One figure for each result; empty figures where its shape is another or it is no float."""
    sums: list[Closeness | None] = []
    for feed, file in zip(feeds, wanted, strict=True):
        want, got = read_arrays(str(file)), compiled.run(feed)
        sums = sums or [Closeness() for _ in want]
        for i, (a, b) in enumerate(zip(want, got, strict=True)):
            held = sums[i]
            if held is None or a.shape != b.shape:
                sums[i] = None
            else:
                held.add(a, b)
    return [_figures(s) for s in sums]


def _figures(sums: Closeness | None) -> OutputQuality:
    return OutputQuality(None, None, None) if sums is None else OutputQuality(sums.cosine, sums.sqnr_db, sums.max_abs)
