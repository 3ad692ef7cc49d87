"""A float model and a compiled one, both open in ONNX Runtime as a user opens them, fed alike batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.backends.base import Output, Pair
from qcompiler.backends.onnx.feeds import table_rows
from qcompiler.backends.onnx.judge import session_of
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.backends.onnx.running import runnable
from qcompiler.backends.onnx.sitewise import SiteTap, site_taps
from qcompiler.backends.onnx.workload import Workload
from qcompiler.dtypes import Array
from qcompiler.errors import InputError
from qcompiler.ir import Graph, Value
from qcompiler.text import show_type


class OrtPair(Pair):
    """Two .onnx files with the same inputs and outputs. With ``per_site`` each is run once more, unoptimized, so that
    what its sites compute can be seen. Raises InputError where they do not match or one does not load."""

    def __init__(self, reference: Path, artifact: Path, *, per_site: bool = False) -> None:
        self.reference, self.artifact = reference, artifact
        self.graphs = load_onnx(reference), load_onnx(artifact)
        self.notes: list[str] = []
        self.sessions = tuple(_opened(p, g) for p, g in zip((reference, artifact), self.graphs, strict=True))
        float_graph, graph = self.graphs
        self.inputs = list(float_graph.inputs)
        self.feeds = self._matched("input", [v for v in self.inputs if v.payload is None], _fed(graph))
        self.results = self._matched("output", list(float_graph.outputs), list(graph.outputs), part=True)
        self.outputs = [_output(v) for v in float_graph.outputs if v.name in self.results and _is_float(v)]
        self.left_out = [v.name for v in float_graph.outputs if v.name in self.results and not _is_float(v)]
        self.kinds = {v.name: v.tensor.dtype for v in graph.inputs}
        self.ids = Workload(float_graph, {}).tokens
        self.vocabulary = 0 if self.ids is None else table_rows(self.ids)
        self.stack = ExitStack()
        self.sites: list[SiteTap] = []
        if per_site:
            self._tap()

    def _matched(self, what: str, first: list[Value], second: list[Value], *, part: bool = False) -> dict[str, str]:
        """Name in the reference -> name in the artifact: by name, or by place where no name agrees."""
        names, other = [v.name for v in first], {v.name for v in second}
        if common := [n for n in names if n in other]:
            missing = [n for n in names if n not in other] + sorted(other - set(names))
            if not missing:
                return {n: n for n in names}
            if part:
                self.notes.append(f"{what}s that only one of the models has are left out: {', '.join(missing)}")
                return {n: n for n in common}
        elif len(first) == len(second) and all(map(_alike, first, second)):
            pairs = list(zip(first, second, strict=True))
            self.notes.append(f"{what}s are matched by place: {', '.join(f'{a.name} = {b.name}' for a, b in pairs)}")
            return {a.name: b.name for a, b in pairs}
        told = [", ".join(f"{v.name} {show_type(v.type)}" for v in vs) or "none" for vs in (first, second)]
        raise InputError(
            f"{self.reference.name} and {self.artifact.name} have different {what}s and cannot be compared: "
            f"{told[0]} against {told[1]}"
        )

    def _tap(self) -> None:
        float_graph, graph = self.graphs
        self.sites = site_taps(float_graph, graph)
        seen = [s for s in self.sites if not s.reason]
        taps = [list(dict.fromkeys(s.want.name for s in seen)), list(dict.fromkeys(s.got.name for s in seen))]
        self.runs = [self.stack.enter_context(runnable(g, t)) for g, t in zip((float_graph, graph), taps, strict=True)]

    def run(self, feed: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        names = [o.name for o in self.outputs]
        want = _run(self.sessions[0], self.reference, names, feed)
        got = _run(self.sessions[1], self.artifact, [self.results[n] for n in names], self._for_artifact(feed))
        for name, a, b in zip(names, want, got, strict=True):
            if a.shape != b.shape:
                raise InputError(
                    f"output {name} has shape {list(a.shape)} in {self.reference.name} and {list(b.shape)} in "
                    f"{self.artifact.name}: they cannot be compared"
                )
        return dict(zip(names, want, strict=True)), dict(zip(names, got, strict=True))

    def run_reference(self, feed: Mapping[str, Array], output: str) -> Array:
        (found,) = _run(self.sessions[0], self.reference, [output], feed)
        return found

    def run_sites(self, feed: Mapping[str, Array]) -> Iterator[tuple[int, Array, Array]]:
        want, got = self.runs[0](feed), self.runs[1](self._for_artifact(feed))
        for i, site in enumerate(self.sites):
            if not site.reason:
                yield i, want[site.want.name], site.as_float(got[site.got.name])

    def _for_artifact(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """The feed under the artifact's names, floats in the type that it takes."""
        out = {}
        for name, array in feed.items():
            if (own := self.feeds.get(name)) is None:
                continue  # an input with a default, which the artifact may have folded
            kind = self.kinds[own]
            cast = kind is not None and kind.is_float and array.dtype.kind == "f" and array.dtype != kind.storage
            out[own] = array.astype(kind.storage) if cast and kind is not None else array
        return out

    def close(self) -> None:
        self.stack.close()
        self.sessions = ()


def _alike(a: Value, b: Value) -> bool:
    """Whether two values may stand for each other: floats or the same type, of one rank."""
    x, y = a.tensor, b.tensor
    same = x.dtype is y.dtype or (x.dtype is not None and y.dtype is not None and x.dtype.is_float and y.dtype.is_float)
    return same and x.rank == y.rank


def _fed(graph: Graph) -> list[Value]:
    return [v for v in graph.inputs if v.payload is None]


def _is_float(value: Value) -> bool:
    element = value.tensor.dtype
    return element is not None and element.is_float


def _output(value: Value) -> Output:
    shape = value.tensor.shape
    last = shape[-1] if shape else None
    return Output(value.name, None if shape is None else len(shape), last if isinstance(last, int) else None)


def _opened(path: Path, graph: Graph) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    for key, value in session_of(graph).items():
        options.add_session_config_entry(key, value)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as e:
        raise InputError(f"{path.name} does not load in ONNX Runtime: {_line(e)}") from None


def _run(session: Any, path: Path, names: list[str], feed: Mapping[str, Array]) -> list[Array]:
    try:
        return [np.asarray(a) for a in session.run(names, dict(feed))]
    except Exception as e:
        raise InputError(f"{path.name} does not run on this data: {_line(e)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
