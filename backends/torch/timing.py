"""One .pt2 file in a process of its own, ready to be timed: :class:`qcompiler.backends.base.Timed` in torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from qcompiler.backends.onnx.workload import weight_bytes_read
from qcompiler.backends.torch.calling import Call
from qcompiler.backends.torch.capture import load
from qcompiler.backends.torch.workload import TorchWorkload
from qcompiler.backends.workers import WorkerTimed
from qcompiler.errors import InputError


class TorchTimed(WorkerTimed):
    """A program opened by :mod:`.stopwatch`, and the cases that it can run."""

    runtime: ClassVar[str] = "torch"
    module: ClassVar[str] = "qcompiler.backends.torch.stopwatch"

    def __init__(self, path: Path, threads: int, dims: Mapping[str, int], folder: Path) -> None:
        graph = load(path)
        self.weight_bytes = weight_bytes_read(graph)
        self.file_bytes = path.stat().st_size
        try:
            call = Call.of(graph)
        except InputError as e:
            raise InputError(f"{path.name} cannot be timed: {e}") from None
        super().__init__(path, TorchWorkload(graph, dims), folder, {"threads": threads, "call": call.to_json()})
