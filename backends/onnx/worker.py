"""The parent's side of the probe process: start it, hand it jobs, notice when it dies or hangs."""

from __future__ import annotations

import contextlib
import json
import selectors
import signal
import subprocess
import sys
from types import TracebackType
from typing import Any

TIMEOUT = 600.0
"""Seconds that one job may take before the process is ended."""


class ProbeDied(Exception):
    """The process ended during a job; the text says how."""


class Worker:
    """A process that serves jobs, a line of JSON each; started at the first job and again after it died. Use it in a
    ``with`` block. ``module`` is what the process runs."""

    def __init__(self, timeout: float = TIMEOUT, module: str = "qcompiler.backends.onnx.probe") -> None:
        self.timeout, self.module = timeout, module
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        process, self.process = self.process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        process.kill()  # it holds nothing that an orderly end would save
        process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self.process

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """The answer to one job; raises ProbeDied when the process crashes on it or takes too long."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
            line = self._line(process)
        except BrokenPipeError:
            line = b""
        if not line:
            raise ProbeDied(self._epitaph())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _line(self, process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(self.timeout):
                process.kill()
                self.process = None
                process.wait()
                raise ProbeDied(f"the runtime gave no answer in {self.timeout:.0f} s")
        return process.stdout.readline()

    def _epitaph(self) -> str:
        process, self.process = self.process, None
        if process is None:
            return "the probe process is gone"
        code = process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if code < 0:
            return f"the runtime crashed: signal {signal.Signals(-code).name}"
        return f"the probe process ended with status {code}"
