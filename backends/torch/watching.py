"""A program run op by op under torch's profiler: what each low-bit call ran and allocated, and how right it was."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from qcompiler.backends.torch.capture import load
from qcompiler.backends.torch.held import LowBit
from qcompiler.backends.torch.judge import metadata_of
from qcompiler.backends.torch.nodes import low_bit_nodes
from qcompiler.backends.torch.quiet import quietly
from qcompiler.backends.torch.reference import Reference
from qcompiler.backends.torch.running import Interpreter
from qcompiler.dtypes import Array
from qcompiler.ir import Graph, Op, Value

MARK = "qcompiler.op:"
MEMORY = "[memory]"


@dataclass(frozen=True)
class Span:
    """One event of the profiler, times in nanoseconds."""

    name: str
    start: int
    end: int
    bytes: int = 0


class Watched(Interpreter):
    """A graph that is run op by op; ``at`` is a file that always holds the label of the op that runs."""

    def __init__(self, graph: Graph, at: str | None) -> None:
        super().__init__(graph, ())
        self.nodes: dict[Op, LowBit] = {n.op: n for n in low_bit_nodes(graph)}
        self.file = None if at is None else os.open(at, os.O_CREAT | os.O_WRONLY)
        self.seen: dict[Op, dict[str, Any]] = {}
        self.checked: set[Any] = set()
        self.reference = Reference(metadata_of(graph))

    @classmethod
    def of(cls, path: Path, at: str | None) -> Watched:
        """The program in the file at ``path``; raises InputError."""
        with quietly():
            return cls(load(path), at)

    def measured(self, feed: Mapping[str, Array]) -> dict[str, Any]:
        """Run twice, the second time under the profiler: ``peak`` bytes beyond the weights, and ``ops`` by label."""
        self.seen = {}
        self(feed)  # what is packed or looked up once is packed here
        with quietly(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            self(feed)
        spans = _spans(found)
        memory = sorted((s for s in spans if s.name == MEMORY), key=lambda s: s.start)
        marks = {s.name.removeprefix(MARK): s for s in spans if s.name.startswith(MARK)}
        ops = [s for s in spans if "::" in s.name]
        out = {}
        for op, facts in self.seen.items():
            inside = marks.get(op.label)
            if inside is not None:
                ran = [s.name for s in ops if inside.start <= s.start and s.end <= inside.end]
                facts |= {"ran": list(dict.fromkeys(ran)), "temp": _temporary(memory, inside)}
            out[op.label] = facts
        return {"peak": _peak(memory), "ops": out}

    def _results(self, op: Op, known: Mapping[Value, Any]) -> list[Any]:
        if self.file is not None:
            os.pwrite(self.file, op.label.encode()[:256].ljust(256), 0)
        node = self.nodes.get(op)
        if node is None:
            return super()._results(op, known)
        with record_function(MARK + op.label):
            results = super()._results(op, known)
        self._note(node, known, results)
        return results

    def _note(self, node: LowBit, known: Mapping[Value, Any], results: Sequence[Any]) -> None:
        x, y = known.get(node.x) if node.x is not None else None, results[0]
        elements = y.numel() + (x.numel() if isinstance(x, torch.Tensor) else 0)
        # A convolution has a row for each of its windows.
        like = x if isinstance(x, torch.Tensor) and node.kind != "conv" else y
        rows = math.prod(like.shape[:-1]) if node.kind != "conv" else y.numel() // max(1, node.rows)
        facts = self.seen.setdefault(node.op, {"off": None})
        facts |= {"m": rows, "elements": elements}
        key = (node.op.name, node.rows, node.columns, node.scheme_text, rows)
        if key not in self.checked:
            self.checked.add(key)
            facts["off"] = self.reference.relative_error(node, known, results[0])


def _spans(found: Any) -> list[Span]:
    """The profiler's events. They are read where torch 2.6 to 2.13 keep them; raises RuntimeError elsewhere."""
    results = getattr(getattr(found, "profiler", None), "kineto_results", None)
    if results is None:
        raise RuntimeError(f"torch {torch.__version__} does not show the events of its profiler")
    return [
        Span(e.name(), e.start_ns(), e.start_ns() + e.duration_ns(), e.nbytes() if e.name() == MEMORY else 0)
        for e in results.events()
    ]


def _temporary(memory: Sequence[Span], inside: Span) -> int:
    """The most bytes that were allocated at once inside, those left out that are still there at the end."""
    held = peak = 0
    for s in memory:
        if inside.start <= s.start <= inside.end:
            held += s.bytes
            peak = max(peak, held)
    return peak - max(held, 0)


def _peak(memory: Sequence[Span]) -> int:
    held = peak = 0
    for s in memory:
        held += s.bytes
        peak = max(peak, held)
    return peak
