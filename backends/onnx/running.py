"""Run a graph as it stands, taps included: host ops in ONNX Runtime, ``q.*`` ops by their reference semantics.

Host ops are cut into as few parts as their ``q.*`` neighbours allow; each is a model of its own that the runtime opens
without optimizing it, so that a tapped value is what its op computed and a tap changes nothing. The exception is f16:
the CPU runtime computes it in f32 and rounds where it must, so a tapped value is rounded, and what reads it too. A
``q.*`` op of constants is computed once and becomes a constant.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler import numerics
from qcompiler.backends.onnx.emit import emit_onnx
from qcompiler.dtypes import Array, dtype_of
from qcompiler.errors import InputError
from qcompiler.ir import Graph, Op, TensorType, Value
from qcompiler.memory import give_back
from qcompiler.payload import Computation, Payload
from qcompiler.subgraph import Run, needed, part, reads

MAPPED_OVER = 32 << 20
"""Bytes of constants above which a part's weights lie in a file beside it, which the runtime maps."""


@contextmanager
def runnable(graph: Graph, taps: Sequence[str]) -> Iterator[Run]:
    """``graph`` as a function: inputs by name -> its outputs and the values named in ``taps``, by name.

    ``graph`` is not changed. A tap names an input, a constant or a result at the top of the graph. Raises InputError
    for a name that is not there, for a ``q.*`` op inside a region that depends on more than constants, for inputs
    that are not the graph's, and where the runtime cannot open or run a part.
    """
    folder = Path(tempfile.mkdtemp(prefix="qcompiler-run-"))
    try:
        yield Program(graph, taps, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Program:
    """A graph cut into steps; calling it runs them."""

    def __init__(self, graph: Graph, taps: Sequence[str], folder: Path) -> None:
        self.inputs = list(graph.inputs)
        self.wanted = dict.fromkeys([*graph.outputs, *(_tapped(graph, name) for name in taps)])
        self.folded = _folded(graph)
        ops = [op for op in needed(graph, self.wanted) if not _is_folded(op, self.folded)]
        self.steps: list[Step | Op] = []
        for number, (host, ours) in enumerate(_stages(ops, self.folded)):
            if host:
                later = _read_elsewhere(host, ops) | set(self.wanted)
                outputs = [r for op in host for r in op.results if r in later]
                self.steps.append(Step(graph, host, outputs, self.folded, folder / f"part{number}.onnx"))
            self.steps += ours
        for step in self.steps:
            if isinstance(step, Step):
                step.alone = len(self.steps) == 1
        self.last = self._last_uses()

    def _last_uses(self) -> list[list[Value]]:
        """For each step what is read by it and by none after it, unless it is wanted."""
        seen: set[Value] = set(self.wanted)
        out: list[list[Value]] = []
        for step in reversed(self.steps):
            own = [*(step.inputs if isinstance(step, Step) else reads(step))]
            own += step.outputs if isinstance(step, Step) else step.results
            out.append([v for v in dict.fromkeys(own) if v not in seen])
            seen.update(own)
        return out[::-1]

    def __call__(self, given: Mapping[str, Array]) -> dict[str, Array]:
        known = self._fed(given)
        for step, done in zip(self.steps, self.last, strict=True):
            if isinstance(step, Step):
                known.update(zip(step.outputs, step.run(known), strict=True))
            else:
                known.update(zip(step.results, self._evaluated(step, known), strict=True))
            for value in done:
                known.pop(value, None)
        if len(self.steps) > 1:
            give_back()
        return {v.name: self._array(v, known) for v in self.wanted}

    def _fed(self, given: Mapping[str, Array]) -> dict[Value, Array]:
        names = {v.name for v in self.inputs}
        absent = [v.name for v in self.inputs if v.payload is None and v.name not in given]
        if absent or not names.issuperset(given):
            extra = sorted(set(given) - names)
            what = f"inputs {', '.join(absent)} are missing" if absent else f"there is no input {', '.join(extra)}"
            raise InputError(f"the graph cannot be run: {what}; it takes {', '.join(v.name for v in self.inputs)}")
        return {v: np.asarray(given[v.name]) for v in self.inputs if v.name in given}

    def _array(self, value: Value, known: Mapping[Value, Array]) -> Array:
        """What ``value`` is: computed, given, or constant."""
        if value in known:
            return known[value]
        payload = self.folded.get(value) or value.payload
        assert payload is not None, f"{value!r} was not computed"
        return payload.array()

    def _evaluated(self, op: Op, known: Mapping[Value, Array]) -> list[Array]:
        return numerics.evaluate_all(
            op.name, [None if v is None else self._array(v, known) for v in op.operands], op.attrs
        )


class Step:
    """A part of the graph that the runtime runs; it is opened when it is first run."""

    def __init__(
        self, graph: Graph, ops: Sequence[Op], outputs: list[Value], folded: Mapping[Value, Payload], path: Path
    ) -> None:
        self.outputs, self.path = outputs, path
        self.part, self.inputs = part(graph, ops, outputs, folded)
        self.session: Any = None
        self.alone = False
        """It is the only step."""

    def run(self, known: Mapping[Value, Array]) -> list[Any]:
        if self.session is None:
            self._open(known)
        feeds = {
            name: known[v]
            for name, v in zip(self.names, self.inputs, strict=True)
            if v in known  # others have a default
        }
        try:
            found: list[Any] = self.session.run(self.results, feeds)
        except Exception as e:
            raise InputError(f"ONNX Runtime cannot run the model: {_line(e)}") from None
        return found

    def _open(self, known: Mapping[Value, Array]) -> None:
        import onnxruntime as ort

        for copy, value in zip(self.part.inputs, self.inputs, strict=True):
            if value in known and copy.tensor.dtype is None and isinstance(copy.type, TensorType):
                copy.type = TensorType(dtype_of(known[value].dtype), copy.type.shape)
        size = sum(v.payload.nbytes for g in self.part.graphs() for v in g.consts.values() if v.payload is not None)
        emit_onnx(self.part, self.path, external=True if size > MAPPED_OVER else None)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # One arena is filled alike by every batch and stays as it is; many would keep the sum of their peaks.
        options.enable_cpu_mem_arena = self.alone
        options.enable_mem_pattern = False  # it plans for shapes that change with every batch
        if size > MAPPED_OVER:
            options.add_session_config_entry("session.disable_prepacking", "1")  # packed weights are copies
        try:
            self.session = ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        except Exception as e:
            raise InputError(f"ONNX Runtime cannot open the model to run it: {_line(e)}") from None
        self.names = [v.name for v in self.part.inputs]
        self.results = [o.name for o in self.session.get_outputs()]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _tapped(graph: Graph, name: str) -> Value:
    value = graph.local(name)
    if value is None:
        raise InputError(f"the graph has no value %{name} to tap")
    return value


def _is_folded(op: Op, folded: Mapping[Value, Payload]) -> bool:
    return bool(op.results) and all(r in folded for r in op.results)


def _folded(graph: Graph) -> dict[Value, Payload]:
    """The results of ``q.*`` ops that depend on constants alone, as computations that are run when they are read."""
    out: dict[Value, Payload] = {}
    for op in graph.walk():
        if not _ours(op):
            continue
        given = [None if v is None else out.get(v) or (v.payload if v.is_const else None) for v in op.operands]
        if all(p is not None or v is None for p, v in zip(given, op.operands, strict=True)) and _typed(op):
            out |= zip(op.results, _computed(op, given), strict=True)
        elif op.graph is not graph:
            raise InputError(f"{op.name} '{op.label}' stands inside a region and cannot be run there")
    return out


def _typed(op: Op) -> bool:
    return all(r.tensor.dtype is not None and r.tensor.static_shape is not None for r in op.results)


def _computed(op: Op, given: Sequence[Payload | None]) -> Sequence[Payload]:
    name, attrs = op.name, dict(op.attrs)
    places = [p is not None for p in given]

    def compute(*payloads: Payload) -> list[Array]:
        arrays = iter(p.array() for p in payloads)
        return numerics.evaluate_all(name, [next(arrays) if there else None for there in places], attrs)

    results = [(r.tensor.dtype, r.tensor.static_shape) for r in op.results]
    return Computation(name, compute, [p for p in given if p is not None], results).outputs()  # type: ignore[arg-type]


def _stages(ops: Sequence[Op], folded: Mapping[Value, Payload]) -> list[tuple[list[Op], list[Op]]]:
    """Host ops, then ``q.*`` ops, of each stage; a host op that reads what a ``q.*`` op gives stands a stage later."""
    stage: dict[Op, int] = {}
    fixed: set[Op] = set()
    for op in ops:
        before = [v.owner for v in reads(op) if v.owner is not None and v.owner in stage]
        stage[op] = max((stage[b] + (not _ours(op) and _ours(b)) for b in before), default=0)
        if not _ours(op) and op.results and all(v.is_const or v in folded or v.owner in fixed for v in reads(op)):
            fixed.add(op)
    first: dict[Op, int] = {}
    for op in reversed(ops):
        if op in fixed:  # a transposed weight, say: it is computed where it is read, not carried there
            stage[op] = first.get(op, stage[op])
        for v in reads(op):
            if v.owner is not None:
                first[v.owner] = min(first.get(v.owner, stage[op]), stage[op])
    out: list[tuple[list[Op], list[Op]]] = [([], []) for _ in range(max(stage.values(), default=-1) + 1)]
    for op in ops:
        out[stage[op]][_ours(op)].append(op)
    return out


def _ours(op: Op) -> bool:
    return op.name.startswith("q.")


def _read_elsewhere(host: Sequence[Op], ops: Sequence[Op]) -> set[Value]:
    inside = set(host)
    return {v for op in ops if op not in inside for v in reads(op)}
