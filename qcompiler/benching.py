"""Several files timed against each other: turns in random order, ratios round by round, the spread beside the median.

Each file lives in a process of its own, so its peak memory is its own; the processes take turns and a turn ends when
its process is idle, so two never compete for the processor. Within a round every file is timed once, in an order drawn
anew, after an untimed run that brings its weights back into the caches. A speedup is the median over rounds of the
ratio within the round: drift of the machine falls on both sides of it.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.backends import backend_for
from qcompiler.backends.base import Case, Progress, Silent, Timed
from qcompiler.errors import InputError
from qcompiler.target import PHASES, Phase

SCHEMA = 1
ROUNDS = 10
LEAST_ROUNDS = 3
UNTIMED = 2
"""Runs that begin a turn and are not counted."""
TURN_S, MOST_RUNS = 0.05, 500
"""A turn lasts about this long, and has at most so many runs."""
PAST = 128
"""Tokens in a key/value cache."""
NOISY = 0.2
"""Spread of a file's rounds, from the 10th to the 90th percentile over the median, from which the machine is noisy."""
BUSY = 0.5
"""Load per processor above which the machine is busy with something else."""


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile, and the least."""

    median: float
    p10: float
    p90: float
    least: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; percentiles are interpolated."""
        p10, median, p90 = (float(x) for x in np.percentile(np.asarray(values, np.float64), (10, 50, 90)))
        return cls(median, p10, p90, float(min(values)))

    def to_json(self) -> dict[str, float]:
        return {"median": self.median, "p10": self.p10, "p90": self.p90, "least": self.least}


@dataclass(frozen=True)
class CaseTiming:
    """One file at one size. ``rounds`` holds the seconds of every timed run, by round; ``speedup`` is the first file's
    time over this one's, round by round, and None for the first file and where the first file has not this size."""

    case: Case
    rounds: tuple[tuple[float, ...], ...]
    weight_bytes: int
    speedup: Spread | None = None

    @property
    def latency(self) -> Spread:
        """Seconds of a run."""
        return Spread.of([s for r in self.rounds for s in r])

    @property
    def noise(self) -> float:
        """How far the medians of the rounds lie apart: (90th - 10th percentile) / median."""
        medians = Spread.of([statistics.median(r) for r in self.rounds])
        return (medians.p90 - medians.p10) / medians.median

    @property
    def rate(self) -> float:
        """Tokens, rows or samples per second, at the median."""
        return self.case.count / self.latency.median

    @property
    def bandwidth(self) -> float:
        """Weight bytes per second, at the median."""
        return self.weight_bytes / self.latency.median

    def to_json(self) -> dict[str, Any]:
        case = self.case
        times = {k: round(v * 1e3, 6) for k, v in self.latency.to_json().items()}
        return {
            "phase": case.phase,
            "m": case.m,
            "batch": case.batch,
            "past": case.past,
            "latency_ms": times,
            "rate": {"unit": f"{case.unit}/s", "value": self.rate},
            "weight_bytes_per_s": self.bandwidth,
            "speedup": None if self.speedup is None else self.speedup.to_json(),
            "noise": self.noise,
            "rounds_ms": [[round(s * 1e3, 6) for s in r] for r in self.rounds],
        }


@dataclass(frozen=True)
class FileTimings:
    """What was measured of one file. ``peak_bytes`` is of its own process, of which ``before_bytes`` were there before
    the model was opened; ``weight_bytes`` are those that one run reads."""

    path: str
    file_bytes: int
    weight_bytes: int
    load_s: float
    peak_bytes: int
    before_bytes: int
    timings: tuple[CaseTiming, ...]
    left_out: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.path,
            "bytes": self.file_bytes,
            "weight_bytes_read": self.weight_bytes,
            "load_s": self.load_s,
            "peak_bytes": self.peak_bytes,
            "before_bytes": self.before_bytes,
            "left_out": list(self.left_out),
            "runs": [t.to_json() for t in self.timings],
        }


@dataclass(frozen=True)
class Comparison:
    """Everything that one call of :func:`bench` measured."""

    files: tuple[FileTimings, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Schema 1; times are milliseconds, sizes bytes."""
        machine = {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system()}
        return {
            "schema": SCHEMA,
            "files": [f.to_json() for f in self.files],
            "settings": dict(self.settings),
            "machine": machine,
            "versions": dict(self.versions),
            "warnings": list(self.warnings),
        }


def bench(
    files: Sequence[str | Path],
    *,
    phases: Sequence[Phase] | None = None,
    batches: Sequence[int] = (1,),
    rounds: int | None = None,
    seconds: float | None = None,
    threads: int | None = None,
    past: int = PAST,
    dims: Mapping[str, int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Time ``files`` against the first of them, on made-up inputs of every phase and batch.

    ``rounds`` turns are taken by each file at each size (:data:`ROUNDS` by default), or as many as fit into ``seconds``
    of timed runs for a file and size. ``threads`` are those of the runtime, by default one for each core; ``past`` is
    how many tokens key/value caches hold; ``dims`` fixes open dimensions by name; ``seed`` draws the order of turns.
    Raises InputError for a file that does not load or runs at none of the sizes.
    """
    if rounds is not None and seconds is not None:
        raise InputError("rounds and seconds both say how long to measure; give one")
    count = core_count() if threads is None else threads
    told = progress or Silent()
    if not files:
        raise InputError("there is no file to time")
    chosen, load = tuple(PHASES if phases is None else phases), os.getloadavg()[0]
    warnings = []
    if load > BUSY * (os.cpu_count() or 1):
        warnings.append(f"the machine was busy before this began: a load of {load:.1f} on {os.cpu_count()} processors")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qcompiler-bench-")))
        opened: list[Timed] = []
        for path in map(Path, files):
            told.stage(f"open {path.name}")
            timed = backend_for(path).timed(path, count, dims or {}, folder)
            stack.callback(timed.close)
            timed.prepare(chosen, batches, past)
            opened.append(timed)
        measured = _race(opened, rounds, seconds, random.Random(seed), told)
        found = tuple(_summed(timed, measured[i], measured[0]) for i, timed in enumerate(opened))
    settings = {
        "threads": count,
        "rounds": ROUNDS if rounds is None and seconds is None else rounds,
        "seconds": seconds,
        "untimed_runs": UNTIMED,
        "seed": seed,
        "phases": {p.name: p.m for p in chosen},
        "batches": list(batches),
        "past": past,
        "dims": dict(dims or {}),
        "load_before": round(load, 2),
    }
    versions = {name: v for path in files for name, v in backend_for(Path(path)).versions().items()}
    return Comparison(found, settings, versions, tuple(warnings + _noise(found)))


def core_count() -> int:
    """Cores that this process may use; the threads that share one count once, where the system says so."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    shared = set()
    for cpu in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            shared.add(path.read_text())
        except OSError:
            shared.add(str(cpu))
    return max(1, len(shared))


Rounds = dict[Case, list[tuple[float, ...]]]


def _race(
    opened: Sequence[Timed], rounds: int | None, seconds: float | None, order: random.Random, told: Progress
) -> list[Rounds]:
    """The rounds of every file by case; a round is one turn of each file that has the case."""
    out: list[Rounds] = [{} for _ in opened]
    cases = list(dict.fromkeys(c for timed in opened for c in timed.cases))
    for number, case in enumerate(cases, 1):
        told.stage(f"time {case.text} ({number} of {len(cases)})")
        racers = [i for i, timed in enumerate(opened) if case in timed.cases]
        runs = {i: _settled(opened[i], case) for i in racers}
        done = 0
        while not _enough(done, rounds, seconds, [out[i].get(case, []) for i in racers]):
            order.shuffle(racers)
            for i in racers:
                out[i].setdefault(case, []).append(tuple(opened[i].turn(case, UNTIMED, runs[i])))
            done += 1
            told.advance(done, max(done, rounds or ROUNDS), "rounds")
    return out


def _settled(timed: Timed, case: Case) -> int:
    """How many runs make up a turn; the second run of a model is the first that says how long one takes."""
    once = min(timed.turn(case, 1, 2))
    return min(MOST_RUNS, max(1, round(TURN_S / once)))


def _enough(
    done: int, rounds: int | None, seconds: float | None, measured: Sequence[Sequence[tuple[float, ...]]]
) -> bool:
    if seconds is None:
        return done >= (ROUNDS if rounds is None else rounds)
    return done >= LEAST_ROUNDS and min(sum(map(sum, m)) for m in measured) >= seconds


def _summed(timed: Timed, own: Rounds, first: Rounds) -> FileTimings:
    timings = []
    for case in timed.cases:
        rounds, speedup = own[case], None
        if own is not first and case in first:
            pairs = zip(first[case], rounds, strict=True)
            speedup = Spread.of([statistics.median(a) / statistics.median(b) for a, b in pairs])
        timings.append(CaseTiming(case, tuple(rounds), timed.weight_bytes, speedup))
    return FileTimings(
        str(timed.path),
        timed.file_bytes,
        timed.weight_bytes,
        timed.load_s,
        timed.peak_bytes(),
        timed.before_bytes,
        tuple(timings),
        tuple(timed.left_out),
    )


def _noise(files: Sequence[FileTimings]) -> list[str]:
    """A warning for each measurement whose rounds lie far apart."""
    return [
        f"noisy: the rounds of {Path(f.path).name} at {t.case.text} spread over {t.noise:.0%} of their median; "
        "trust the ratios of the rounds, or measure again on an idle machine"
        for f in files
        for t in f.timings
        if t.noise > NOISY
    ]
