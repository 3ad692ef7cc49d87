"""One file in a process of its own, ready to be timed: what every runtime's :class:`.base.Timed` shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from qcompiler.backends.base import Case, Timed
from qcompiler.backends.onnx.probe import write_arrays
from qcompiler.backends.onnx.worker import ProbeDied, Worker
from qcompiler.backends.onnx.workload import Size, Workload
from qcompiler.dtypes import Array
from qcompiler.errors import InputError
from qcompiler.target import Phase

DECLINED = 300
"""Characters of the runtime's own words that a message repeats."""


class WorkerTimed(Timed):
    """A model opened by the process ``module``, and the cases that it can run. ``work`` makes its inputs; ``job`` is
    what the process needs to open the file besides its path. Raises InputError where the file does not load."""

    runtime: ClassVar[str]
    module: ClassVar[str]

    def __init__(self, path: Path, work: Workload, folder: Path, job: Mapping[str, Any]) -> None:
        self.path, self.folder, self.work = path, folder, work
        self.left_out: list[str] = []
        self.cases: dict[Case, str] = {}
        self.first_s: dict[Case, float] = {}
        self.worker = Worker(module=self.module)
        try:
            if reason := self.work.refusal():
                raise InputError(f"{path.name} cannot be timed: {reason}")
            opened = self._ask({"open": str(path.absolute()), **job})
            if opened["error"]:
                raise InputError(f"{path.name} does not load in {self.runtime}: {_short(opened['error'])}")
        except BaseException:
            self.worker.close()
            raise
        self.load_s, self.before_bytes = float(opened["load_s"]), int(opened["before_bytes"])

    def prepare(self, phases: Sequence[Phase], batches: Sequence[int], past: int) -> None:
        work, sizes = self.work, dict[Case, Size]()
        phased: Sequence[Phase | None] = phases if work.varies_rows else (None,)
        sized: Sequence[int | None] = batches if work.varies_batch else (None,)
        if not work.varies_rows and phases:
            names = ", ".join(f"{p.name}={p.m}" for p in phases)
            self.left_out.append(f"{names}: no input has a sequence axis that is open, so phases do not apply")
        if not work.varies_batch and (given := [b for b in batches if b != work.fixed_batch]):
            text = ", ".join(map(str, given))
            self.left_out.append(f"batch {text}: the model fixes the batch at {work.fixed_batch}")
        for phase in phased:
            for batch in sized:
                m = phase.m if phase is not None else None
                kept = past if work.keeps_past else None
                case = Case(phase.name if phase else None, m, batch or work.fixed_batch, kept, *self._rate(m, batch))
                sizes[case] = Size(batch or work.fixed_batch, m or 1, past)
        for case, size in sizes.items():
            self._load(case, size)
        if not self.cases:
            raise InputError(f"{self.path.name} runs with none of the sizes asked for; {'; '.join(self.left_out)}")

    def _load(self, case: Case, size: Size) -> None:
        try:
            feed = self.work.feed(size)
        except InputError as e:
            self.left_out.append(f"{case.text}: {e}")
            return
        arrays, name = self.folder / f"feed{len(self.cases)}.npz", f"case{len(self.cases)}"
        write_arrays(str(arrays), list(feed.values()))
        try:
            answer = self._ask({"feed": name, "inputs": list(feed), "arrays": str(arrays), **self._told(feed)})
        finally:
            arrays.unlink()
        if answer["error"]:
            self.left_out.append(f"{case.text}: {self.runtime} refuses made-up inputs: {_short(answer['error'])}")
            self._ask({"drop": name})
            return
        self.cases[case], self.first_s[case] = name, float(answer["first_s"])

    def _rate(self, m: int | None, batch: int | None) -> tuple[str, int]:
        """What one run handles, and how many of it."""
        count, tokens = batch or self.work.fixed_batch, self.work.tokens
        if m is not None:
            return ("tokens" if tokens is not None else "rows"), count * m
        length = None if tokens is None or tokens.tensor.shape is None else tokens.tensor.shape[1]
        return ("tokens", count * length) if isinstance(length, int) else ("samples", count)

    def turn(self, case: Case, untimed: int, count: int) -> list[float]:
        answer = self._ask({"turn": self.cases[case], "untimed": untimed, "count": count})
        if answer["error"]:
            raise InputError(f"{self.path.name} failed while it was timed: {_short(answer['error'])}")
        return [float(s) for s in answer["seconds"]]

    def peak_bytes(self) -> int:
        return int(self._ask({"memory": True})["peak_bytes"])

    def close(self) -> None:
        self.worker.close()

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        try:
            return self.worker.ask(job)
        except ProbeDied as e:
            raise InputError(f"{self.path.name} cannot be timed: {e}") from None

    def _told(self, feed: Mapping[str, Array]) -> dict[str, Any]:
        """What the process has to know of a feed besides its arrays."""
        return {}


def _short(text: str) -> str:
    return " ".join(text.split())[:DECLINED]
