"""Open an artifact in ONNX Runtime as a user would, and keep what that shows: errors, the optimized graph, fallbacks.

A big artifact is opened without packing its weights, and its optimized graph is written without them: the weights stay
a mapped file that nothing reads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from qcompiler.backends.onnx.alone import probed_rows
from qcompiler.backends.onnx.feeds import made_up, nbytes
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.backends.onnx.probe import write_arrays
from qcompiler.backends.onnx.source import outlined
from qcompiler.backends.onnx.worker import ProbeDied, Worker
from qcompiler.dtypes import Array
from qcompiler.errors import InputError
from qcompiler.ir import Graph, Op, Value
from qcompiler.payload import UnreadablePayload
from qcompiler.target import Phase

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
OPTIMIZED, OUTSIDE = "optimized.onnx", "optimized.data"
MAPPED_OVER = 16 << 20
"""Size of a file whose weights are worth mapping."""
MANY_ROWS_BYTES = 1 << 20
"""Bytes of inputs above which only the smallest phase is run: rows of tokens are below, pictures above, and what a
picture becomes inside a model is a hundred times as large."""
ATTEMPTS = 4
"""How many guesses at the input shapes are tried."""
_TYPE_IN_ERROR = (
    re.compile(r"Fatal error: [\w.]*:(\w+)\("),
    re.compile(r"implementation for (\w+)\("),
    re.compile(r"Op \((\w+)\)"),
)
_NODE_IN_ERROR = (
    re.compile(r"node with name '([^']*)'"),
    re.compile(r"Name:'([^']*)'"),
    re.compile(r"[Nn]ode \(([^)]*)\)"),
    re.compile(r"In Node, \(?\"([^\"]*)\""),
)


@dataclass
class Opened:
    """What opening showed. ``runs`` has one entry a phase when inputs were found that the model takes."""

    loaded: bool
    error: str = ""
    crashed: bool = False
    graph: Graph | None = None
    runs: list[dict[str, Any]] = field(default_factory=list)
    feed: dict[str, Any] | None = None
    """The job entry of the inputs of the smallest phase."""
    optimized: Path | None = None
    whole: bool = True
    """The file of the optimized graph holds its weights."""
    notes: list[str] = field(default_factory=list)

    def blamed(self, source: Graph) -> str:
        """The node that the runtime names in its error, or the first one of the type it names; empty for neither."""
        if name := next((m[1] for p in _NODE_IN_ERROR if (m := p.search(self.error)) and m[1]), ""):
            return name
        kind = next((m[1] for p in _TYPE_IN_ERROR if (m := p.search(self.error))), "")
        return next((op.label for op in source.walk() if op.name.rpartition(".")[2] == kind), "")


def constant_bytes(graph: Graph) -> int:
    return sum(v.payload.nbytes for g in graph.graphs() for v in g.consts.values() if v.payload is not None)


def open_small(
    path: Path, graph: Graph, phases: Sequence[Phase], worker: Worker, folder: Path, session: dict[str, str]
) -> Opened:
    """Open with default options, write the optimized graph, run the smallest phase on made-up inputs, and the others
    where theirs are within :data:`MANY_ROWS_BYTES`."""
    optimized = folder / OPTIMIZED
    sizes = sorted({probed_rows(p.m) for p in phases})
    job: dict[str, Any] = {"model": str(path), "session": session}
    first: dict[str, Any] = {"optimized": str(optimized)}
    mapped = path.stat().st_size > MAPPED_OVER
    if mapped:
        job, first = _mapped(path, folder, session), _written_without_weights(folder)
    candidates = [[], *zip(*(made_up(graph, m) for m in sizes), strict=False)][: ATTEMPTS + 1]
    if len(candidates) > 1:
        del candidates[0]
    tried, out = "", Opened(False)
    for attempt, feeds in enumerate(candidates):
        entries = [
            _feed(feed, folder / f"feed{attempt}.{m}.npz")
            for m, feed in zip(sizes, feeds, strict=False)
            if m == sizes[0] or nbytes(feed) <= MANY_ROWS_BYTES
        ]
        answer = _ask(worker, job | {"feeds": entries} | ({} if attempt else first))
        if attempt == 0:
            if not answer.loaded:
                return answer
            out = Opened(True, optimized=optimized)
            if mapped:
                _read_without_weights(out, folder, graph)
            else:
                out.graph = _load(optimized, out)
        out.crashed |= answer.crashed
        if answer.runs and answer.runs[0]["ok"]:
            out.runs, out.feed = answer.runs, entries[0]
            out.error = next((r["error"] for r in answer.runs if not r["ok"]), "")
            return out
        tried = answer.error or (answer.runs[0]["error"] if answer.runs else "")
    out.error = tried
    if tried:
        out.notes.append(f"the model did not run on made-up inputs ({_short(tried)}); its low-bit nodes were run alone")
    else:
        out.notes.append("no inputs could be made up for the model; its low-bit nodes were run alone")
    return out


def _feed(arrays: dict[str, Array], path: Path) -> dict[str, Any]:
    """A job's entry for one set of inputs."""
    write_arrays(str(path), list(arrays.values()))
    return {"names": list(arrays), "arrays": str(path)}


def open_big(path: Path, graph: Graph, worker: Worker, folder: Path, session: dict[str, str]) -> Opened:
    """Open without packing weights and write the optimized graph without them."""
    job = _mapped(path, folder, session)
    out = _ask(worker, job | _written_without_weights(folder) | {"prepack": False})
    if out.loaded:
        _read_without_weights(out, folder, graph)
    out.notes.append("the artifact is big: it was opened without its weights, and one node of each kind was run alone")
    return out


def _written_without_weights(folder: Path) -> dict[str, str]:
    """A job's optimized graph, whose weights go nowhere."""
    if os.name == "posix":
        (folder / OUTSIDE).symlink_to(os.devnull)
    return {"optimized": str(folder / OPTIMIZED), "external": OUTSIDE}


def _read_without_weights(out: Opened, folder: Path, source: Graph) -> None:
    """Read the optimized graph; constants that kept their name and type get the bytes of the source's."""
    optimized, outside = folder / OPTIMIZED, folder / OUTSIDE
    if os.name == "posix":
        outside.unlink(missing_ok=True)  # the runtime may have removed the link itself
        with open(outside, "wb") as f:
            f.truncate(_length(optimized))
    out.optimized, out.whole = optimized, False
    out.graph = _load(optimized, out)
    if out.graph is not None:
        _lend_weights(out.graph, source)


def _mapped(path: Path, folder: Path, session: dict[str, str]) -> dict[str, Any]:
    """A job's model: the artifact, its weights named as ranges of its file, so that they are mapped and not copied."""
    beside = folder / "outlined.onnx"
    beside.write_bytes(outlined(path).SerializeToString())
    return {"model": str(beside), "session": session | {WEIGHTS_FOLDER: str(path.absolute().parent)}}


def _length(model: Path) -> int:
    """How long the data file would be that the optimized graph refers to."""
    ends = [0]
    for tensor in onnx.load(model, load_external_data=False).graph.initializer:
        entries = {e.key: e.value for e in tensor.external_data}
        if entries:
            ends.append(int(entries.get("offset", 0)) + int(entries.get("length", 0)))
    return max(ends)


def _lend_weights(optimized: Graph, source: Graph) -> None:
    """Give constants that kept their name and type their bytes; the others cannot be read."""
    for graph in optimized.graphs():
        for value in graph.consts.values():
            own = source.local(value.name)
            assert value.payload is not None
            if own is not None and own.payload is not None and own.type == value.type:
                value.payload = own.payload
            elif value.payload.ref() is not None:
                payload = value.payload
                value.payload = UnreadablePayload(f"optimized:{value.name}", payload.dtype, payload.shape)


def _load(path: Path, out: Opened) -> Graph | None:
    try:
        return load_onnx(path)
    except InputError as e:
        out.notes.append(
            f"the runtime's optimized graph cannot be read ({e}); the verdict rests on the artifact itself"
        )
        return None


def _ask(worker: Worker, job: dict[str, Any]) -> Opened:
    try:
        answer = worker.ask(job)
    except ProbeDied as e:
        return Opened(False, str(e), crashed=True)
    return Opened(answer["loaded"], answer["error"], runs=answer["runs"])


def _short(text: str) -> str:
    return text.replace("\n", " ")[:160]


class Names:
    """What the artifact calls an op of the optimized graph."""

    def __init__(self, source: Graph) -> None:
        self.labels = {op.label for op in source.walk()}
        self.makers = {r.name: op.label for op in source.walk() for r in op.results}
        self.readers: dict[str, str] = {}
        for op in source.walk():
            for value in op.operands:
                if value is not None:
                    self.readers.setdefault(value.name, op.label)

    def of(self, op: Op) -> str:
        """The op's own name where the artifact has it, else that of the op which gave its result or read its codes."""
        if op.label in self.labels:
            return op.label
        for result in op.results:
            if result.name in self.makers:
                return self.makers[result.name]
        stem = re.split(r"/duplicated|_token_|/MatMulAddFusion", op.label)[0]
        if stem in self.labels:
            return stem
        return self._through(op.operands) or op.label

    def allowed(self, graph: Graph, allowed: Mapping[str, str]) -> dict[str, str]:
        """``allowed`` (label in the artifact -> reason) with the labels of the optimized graph.

        An op that the runtime made of several is allowed where one is that gave its result or read its operands.
        """
        out = {}
        for op in graph.walk() if allowed else ():
            names = [self.of(op)]
            if op.label not in self.labels:
                names += [self.readers.get(v.name, "") for v in op.operands if v is not None]
            reason = next((allowed[n] for n in names if n in allowed), None)
            if reason is not None:
                out[op.label] = reason
        return out

    def _through(self, operands: Iterable[Value | None]) -> str:
        names = [v.name for v in operands if v is not None]
        return next((self.readers[n] for n in reversed(names) if n in self.readers), "")
