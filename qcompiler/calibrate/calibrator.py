"""Runs data through a graph, batch by batch, and shows observers what passes the places they watch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from qcompiler.calibrate.cache import Cache, Entry, graph_digest
from qcompiler.calibrate.data import Data
from qcompiler.calibrate.observers import Observer
from qcompiler.dtypes import Array
from qcompiler.errors import CalibrationError
from qcompiler.ir import Graph, Value
from qcompiler.subgraph import Runner
from qcompiler.verify.findings import Finding

Wanted: TypeAlias = Mapping[str, Sequence[Observer]]
"""Value name -> what shall watch it."""


class Calibrator:
    """Calibration data, and what runs a graph over it.

    ``told(done, total, unit)`` hears of progress; findings (QC305, a warning for each value that no data reached) are
    appended to ``findings``. ``cache`` None keeps nothing on disk.
    """

    measured = True
    """False for :class:`Planned`, whose ranges are made up."""

    def __init__(
        self,
        data: Data,
        runner: Runner,
        *,
        cache: Cache | None = None,
        told: Callable[[int, int, str], None] = lambda done, total, unit: None,
        findings: list[Finding] | None = None,
    ) -> None:
        self.data, self.runner, self.cache, self.told = data, runner, cache, told
        self.findings: list[Finding] = [] if findings is None else findings
        self.used = False
        """Something was observed."""
        self.measurements = 0
        """How often the data ran through a graph."""
        self.batches = 0
        """In how many batches, the last time."""
        self.hits = 0
        """Values whose observers were filled from the cache."""

    def observe(self, graph: Graph, wanted: Wanted) -> None:
        """Show every observer in ``wanted`` all that its value takes while the data runs through ``graph`` as it is.

        The names are those of inputs, constants and results at the top of ``graph``; values inside regions cannot be
        watched. Raises CalibrationError for a name that is not there, for NaN and infinity, and where there is no
        data; InputError where the data does not fit the graph.
        """
        self.used = True
        wanted = {name: tuple(observers) for name, observers in wanted.items() if observers}
        if not wanted:
            return
        for name in wanted:
            if graph.local(name) is None:
                raise CalibrationError(f"the graph has no value %{name} to watch; regions cannot be watched")
        entry = None if self.cache is None else self.cache.open(graph_digest(graph), self.data.digest())
        left = wanted if entry is None else self._from_cache(entry, wanted)
        if left:
            self._run(graph, left)
            if entry is not None:
                entry.save({(name, o.key()): o.state() for name, observers in left.items() for o in observers})
        for name, observers in wanted.items():
            if not all(o.seen for o in observers):
                self.findings.append(never_seen(graph.local(name) or name))

    def outputs(self, graph: Graph, names: Sequence[str], count: int) -> Iterator[dict[str, Array]]:
        """The values called ``names`` of ``graph`` as it is, on each of the first ``count`` batches of the data.

        For proofs that a rewrite changed nothing: nothing is cached. Raises InputError where the data does not fit.
        """
        with self.runner(graph, list(names)) as run:
            for batch in itertools.islice(self.data.batches(graph.inputs), count):
                found = run(batch)
                yield {name: found[name] for name in names}

    def _from_cache(self, entry: Entry, wanted: Wanted) -> Wanted:
        """Fill the observers that the cache knows; what is left."""
        left = {}
        for name, observers in wanted.items():
            rest = [o for o in observers if not entry.fill(name, o)]
            if rest:
                left[name] = rest
            else:
                self.hits += 1
        return left

    def _run(self, graph: Graph, wanted: Wanted) -> None:
        done = 0
        self.measurements += 1
        with self.runner(graph, list(wanted)) as run:
            for batch in self.data.batches(graph.inputs):
                found = run(batch)
                for name, observers in wanted.items():
                    x = found.pop(name)  # what was seen makes room before the next batch needs it
                    for observer in observers:
                        self._show(observer, name, x)
                del found, x
                done += 1
                self.told(done, max(done, self.data.count or 0), "batches")
        if not done:
            raise CalibrationError(f"{self.data.label} holds no samples; give at least one")
        self.batches = done

    def summary(self) -> str:
        """What was done with the data, in one clause for the report."""
        if not self.used:
            return f"calibration: the recipe measures no activations; {self.data.label} served for the comparison alone"
        if not self.measurements:
            return f"calibration: all that {self.data.label} gives was measured before and came from the cache"
        times = "once" if self.measurements == 1 else f"{self.measurements} times"
        return f"calibration: {self.batches} batches of {self.data.label} ran through the model {times}"

    def _show(self, observer: Observer, name: str, x: Array) -> None:
        try:
            observer.update(x)
        except CalibrationError as e:
            raise CalibrationError(
                f"calibration: %{name} {e}; see whether the data is what the model expects, or leave the op that "
                "computes it in float with --skip"
            ) from None


class Planned(Calibrator):
    """Stands in for data where nothing is run: every observer is told that values lie in -1..1."""

    measured = False

    def __init__(self) -> None:
        self.used = False
        self.findings = []

    def observe(self, graph: Graph, wanted: Wanted) -> None:
        self.used = True
        for name, observers in wanted.items():
            value = graph.local(name)
            if value is None:
                raise CalibrationError(f"the graph has no value %{name} to watch; regions cannot be watched")
            shape = tuple(d if isinstance(d, int) else 1 for d in value.tensor.shape or ())
            for observer in observers:
                observer.stand_in(shape)


def never_seen(value: Value | str) -> Finding:
    """The finding for a value that no calibration data reached."""
    name = value if isinstance(value, str) else value.name
    op = value.owner.label if isinstance(value, Value) and value.owner is not None else name
    return Finding(
        "QC305",
        op,
        f"no calibration data reached %{name}: it was empty in every sample",
        "",
        "calibrate with data that takes this branch, leave the op out with --skip, or quantize it dynamically",
        severity="warning",
    )
