"""The child process that times one model in ONNX Runtime, so that its memory is its own and a crash is a message.

``python -m qcompiler.backends.onnx.stopwatch`` answers jobs as :mod:`.probe` does, a line of JSON each. In order::

    {"open": path, "threads": 2, "session": {key: value}}    -> {"error": "", "before_bytes": 0, "load_s": 0.0}
    {"feed": name, "inputs": [...], "arrays": npz}           -> {"error": "", "first_s": 0.0}
    {"turn": name, "untimed": 1, "count": 5}                 -> {"error": "", "seconds": [...]}
    {"drop": name}                                           -> {"error": ""}
    {"memory": true}                                         -> {"error": "", "peak_bytes": 0}

The threads of a session go on spinning for some milliseconds after a run, as they should while runs follow each other.
A turn answers only once they have stopped: another process that is timed next has the processor for itself.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from qcompiler.backends.onnx.probe import read_arrays

QUIET_S, WAIT_S = 0.004, 1.0
"""A process is quiet when it uses no processor for the first of these; the second is how long that is waited for."""


def peak_bytes() -> int:
    """Peak resident bytes of this process. Linux counts them anew in a new program, ``ru_maxrss`` does not."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next((x for x in status.read_text().splitlines() if x.startswith("VmHWM:")), "")
        if line:
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def rest() -> None:
    """Wait until the threads of this process have gone to sleep."""
    end = time.perf_counter() + WAIT_S
    while time.perf_counter() < end:
        before = time.process_time()
        time.sleep(QUIET_S)  # the interval over which processor time is looked at
        if time.process_time() - before < QUIET_S / 4:
            return


class Stopwatch:
    """One opened model, its inputs by the name of their job."""

    def __init__(self) -> None:
        self.session: Any = None
        self.feeds: dict[str, Any] = {}

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """The answer to one job; what the runtime raises is its text under ``error``."""
        try:
            return {"error": ""} | self._done(job)
        except Exception as e:  # the runtime's own exceptions derive from nothing else
            return {"error": str(e) or type(e).__name__}

    def _done(self, job: dict[str, Any]) -> dict[str, Any]:
        if "open" in job:
            before, begin = self.prepared(job), time.perf_counter()
            self.open(job)
            return {"before_bytes": before, "load_s": time.perf_counter() - begin}
        if "feed" in job:
            self.feeds[job["feed"]] = self.fed(job, read_arrays(job["arrays"]))
            begin = time.perf_counter()
            self.run(self.feeds[job["feed"]])
            return {"first_s": time.perf_counter() - begin}
        if "turn" in job:
            seconds = self._turn(self.feeds[job["turn"]], job["untimed"], job["count"])
            rest()
            return {"seconds": seconds}
        if "drop" in job:
            del self.feeds[job["drop"]]
            return {}
        return {"peak_bytes": peak_bytes()}

    def prepared(self, job: dict[str, Any]) -> int:
        """Load the runtime; peak resident bytes of a process that has it and no model yet."""
        import onnxruntime  # noqa: F401

        return peak_bytes()

    def open(self, job: dict[str, Any]) -> None:
        """Open the model of an ``open`` job."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = job["threads"]
        for key, value in job["session"].items():
            options.add_session_config_entry(key, value)
        self.session = ort.InferenceSession(job["open"], options, providers=["CPUExecutionProvider"])

    def fed(self, job: dict[str, Any], arrays: list[Any]) -> Any:
        """The inputs of a ``feed`` job as :meth:`run` takes them."""
        return dict(zip(job["inputs"], arrays, strict=True))

    def run(self, feed: Any) -> None:
        """One run of the model, finished when this returns."""
        self.session.run(None, feed)

    def _turn(self, feed: Any, untimed: int, count: int) -> list[float]:
        out = []
        gc.collect()
        gc.disable()
        try:
            for i in range(-untimed, count):
                begin = time.perf_counter()
                self.run(feed)
                if i >= 0:
                    out.append(time.perf_counter() - begin)
        finally:
            gc.enable()
        return out


def serve(watch: Stopwatch) -> None:
    """Answer jobs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the runtime prints must not mix with the answers
    for line in sys.stdin:
        answers.write(json.dumps(watch.answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(Stopwatch())
