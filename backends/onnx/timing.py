"""One .onnx file in a process of its own, ready to be timed: :class:`qcompiler.backends.base.Timed` in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from qcompiler.backends.onnx.judge import session_of
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.backends.onnx.workload import Workload, weight_bytes_read
from qcompiler.backends.workers import WorkerTimed
from qcompiler.ir import Graph
from qcompiler.payload import FilePayload


class OrtTimed(WorkerTimed):
    """A model opened by :mod:`.stopwatch`, and the cases that it can run."""

    runtime: ClassVar[str] = "ONNX Runtime"
    module: ClassVar[str] = "qcompiler.backends.onnx.stopwatch"

    def __init__(self, path: Path, threads: int, dims: Mapping[str, int], folder: Path) -> None:
        graph = load_onnx(path)
        self.weight_bytes = weight_bytes_read(graph)
        self.file_bytes = sum(p.stat().st_size for p in files_of(path, graph))
        super().__init__(path, Workload(graph, dims), folder, {"threads": threads, "session": session_of(graph)})


def files_of(path: Path, graph: Graph) -> set[Path]:
    """The file of a model and those that hold its weights."""
    payloads = [v.payload for g in graph.graphs() for v in g.consts.values()]
    return {path.absolute()} | {p.path.absolute() for p in payloads if isinstance(p, FilePayload)}
