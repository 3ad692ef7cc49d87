"""A float program and a compiled one, both open in torch, fed alike batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from qcompiler.backends.base import Output, Pair
from qcompiler.backends.onnx.feeds import table_rows
from qcompiler.backends.torch.calling import Opened, is_float, result_values
from qcompiler.backends.torch.opening import opened
from qcompiler.backends.torch.quiet import sentence_of
from qcompiler.backends.torch.running import runnable
from qcompiler.backends.torch.sitewise import SiteTap, site_taps
from qcompiler.backends.torch.workload import TorchWorkload
from qcompiler.dtypes import Array
from qcompiler.errors import InputError
from qcompiler.ir import Value
from qcompiler.text import show_type


class TorchPair(Pair):
    """Two .pt2 files with the same inputs and results. With ``per_site`` each is run once more, op by op, so that what
    its sites compute can be seen. Raises InputError where they do not match or one does not load."""

    def __init__(self, reference: Path, artifact: Path, *, per_site: bool = False) -> None:
        self.paths = reference, artifact
        for path in self.paths:
            if path.suffix != ".pt2":
                raise InputError(f"{path.name} is no .pt2 file; a compiled .pt2 is compared with a float .pt2")
        self.notes: list[str] = []
        self.programs = opened(reference), opened(artifact)
        floats, compiled = self.programs
        self.inputs = _fed(floats)
        self.feeds = self._inputs_matched(self.inputs, _fed(compiled))
        self.kinds = {v.name: v.tensor.dtype for v in compiled.graph.inputs}
        wanted = self._results_matched(result_values(floats.graph), result_values(compiled.graph))
        self.outputs = [_output(name, value) for name, value in wanted if is_float(value)]
        self.left_out = [name for name, value in wanted if not is_float(value)]
        work = TorchWorkload(floats.graph, {})
        self.ids = work.tokens
        self.vocabulary = 0 if self.ids is None else table_rows(self.ids)
        self.stack = ExitStack()
        self.sites: list[SiteTap] = []
        if per_site:
            self._tap()

    def _inputs_matched(self, first: list[Value], second: list[Value]) -> dict[str, str]:
        """Name in the reference -> name in the artifact: by name, or by place where the names differ."""
        if {v.name for v in first} == {v.name for v in second}:
            return {v.name: v.name for v in first}
        if len(first) != len(second) or not all(map(_alike, first, second)):
            raise self._unlike("inputs", first, second)
        self.notes.append("inputs are matched by place: " + _pairs(first, second))
        return {a.name: b.name for a, b in zip(first, second, strict=True)}

    def _results_matched(self, first: list[Value], second: list[Value]) -> list[tuple[str, Value]]:
        """The results of the reference under their names, which those of the artifact follow in order."""
        names = [program.names for program in self.programs]
        if len(first) != len(second) or not all(map(_alike, first, second)):
            raise self._unlike("results", first, second)
        if names[0] != names[1] and set(names[0]) == set(names[1]):
            raise self._unlike("orders of results", first, second)
        return list(zip(names[0], first, strict=True))

    def _unlike(self, what: str, first: list[Value], second: list[Value]) -> InputError:
        told = [", ".join(f"{v.name} {show_type(v.type)}" for v in vs) or "none" for vs in (first, second)]
        a, b = (p.name for p in self.paths)
        return InputError(f"{a} and {b} have different {what} and cannot be compared: {told[0]} against {told[1]}")

    def _tap(self) -> None:
        graphs = [program.graph for program in self.programs]
        self.sites = site_taps(*graphs)
        seen = [s for s in self.sites if not s.reason]
        wants = list(dict.fromkeys(s.want.name for s in seen))
        gots = list(dict.fromkeys(s.got.name for s in seen if s.got is not None))
        self.runs = [self.stack.enter_context(runnable(g, t)) for g, t in zip(graphs, (wants, gots), strict=True)]

    def run(self, feed: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        want = self._run(0, feed)
        got = dict(zip(want, self._run(1, self._for_artifact(feed)).values(), strict=True))
        for name, a in want.items():
            if a.shape != got[name].shape:
                raise InputError(
                    f"result {name} has shape {list(a.shape)} in {self.paths[0].name} and {list(got[name].shape)} in "
                    f"{self.paths[1].name}: they cannot be compared"
                )
        kept = [o.name for o in self.outputs]
        return {n: want[n] for n in kept}, {n: got[n] for n in kept}

    def run_reference(self, feed: Mapping[str, Array], output: str) -> Array:
        return self._run(0, feed)[output]

    def _run(self, which: int, feed: Mapping[str, Array]) -> dict[str, Array]:
        program = self.programs[which]
        try:
            return dict(zip(program.names, program.run(feed), strict=True))
        except InputError:
            raise
        except Exception as e:  # torch's operators raise what they like
            raise InputError(f"{self.paths[which].name} does not run on this data: {sentence_of(e)}") from None

    def run_sites(self, feed: Mapping[str, Array]) -> Iterator[tuple[int, Array, Array]]:
        want, got = (self.runs[i](self._whole(i, f)) for i, f in enumerate((feed, self._for_artifact(feed))))
        for i, site in enumerate(self.sites):
            if not site.reason and site.got is not None:
                yield i, want[site.want.name], got[site.got.name]

    def _whole(self, which: int, feed: Mapping[str, Array]) -> dict[str, Array]:
        """The feed with the plain values that the program was captured with, which its graph takes too."""
        constants = {s.name: s.value for s in self.programs[which].call.slots if s.constant}
        return {n: np.asarray(v) for n, v in constants.items()} | dict(feed)

    def _for_artifact(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """The feed under the artifact's names, floats in the type that it takes."""
        out = {}
        for name, array in feed.items():
            own = self.feeds[name]
            kind = self.kinds[own]
            cast = kind is not None and kind.is_float and array.dtype.kind == "f" and array.dtype != kind.storage
            out[own] = array.astype(kind.storage) if cast and kind is not None else array
        return out

    def close(self) -> None:
        self.stack.close()


def _fed(program: Opened) -> list[Value]:
    """The inputs that a caller gives: tensors and sizes."""
    names = set(program.call.fed)
    return [v for v in program.graph.inputs if v.name in names]


def _alike(a: Value, b: Value) -> bool:
    """Whether two values may stand for each other: floats or the same type, of one rank."""
    x, y = a.tensor, b.tensor
    same = x.dtype is y.dtype or (x.dtype is not None and y.dtype is not None and x.dtype.is_float and y.dtype.is_float)
    return same and x.rank == y.rank


def _pairs(first: list[Value], second: list[Value]) -> str:
    return ", ".join(f"{a.name} = {b.name}" for a, b in zip(first, second, strict=True))


def _output(name: str, value: Value) -> Output:
    shape = value.tensor.shape
    last = shape[-1] if shape else None
    return Output(name, None if shape is None else len(shape), last if isinstance(last, int) else None)
