"""What surrounds a command: progress on standard error, and one exit status for each way to end.

0 accepted, 1 rejected, 2 the request or the input is at fault, 3 an internal error, 130 interrupted, 141 the reader of
the output went away, 143 terminated. No status but 3 has more to say than one sentence.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec

import typer

from qcompiler.errors import Error, RejectedError, StructureError

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

P = ParamSpec("P")

ACCEPTED, REJECTED, FAULT, INTERNAL, INTERRUPTED, PIPE, TERMINATED = 0, 1, 2, 3, 130, 141, 143

EXTRAS = {"onnxruntime": "cpu", "triton": "gpu"}
"""Optional packages and the extra that installs them."""


def complain(text: str) -> None:
    """One sentence on standard error."""
    with contextlib.suppress(OSError):
        print(f"qcompiler: {' '.join(text.split())}", file=sys.stderr)


def command(run: Callable[P, int]) -> Callable[P, None]:
    """A command that ends through :class:`typer.Exit` with the status that belongs to what happened."""

    @functools.wraps(run)
    def ended(*args: P.args, **options: P.kwargs) -> None:
        try:
            with _terminable():
                status = run(*args, **options)
                sys.stdout.flush()
        except typer.Exit:
            raise
        except BaseException as error:
            status = status_of(error)
        raise typer.Exit(status)

    return ended


def status_of(error: BaseException) -> int:
    """The exit status for ``error``, after saying on standard error what has to be said."""
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else INTERNAL
        case KeyboardInterrupt():
            complain("interrupted")
            return INTERRUPTED
        case BrokenPipeError():
            _close_stdout()
            return PIPE
        case RejectedError():
            complain(str(error))
            return REJECTED
        case StructureError():
            return _internal(error)
        case Error():
            complain(str(error))
            return FAULT
        case ModuleNotFoundError() if (extra := EXTRAS.get((error.name or "").partition(".")[0])) is not None:
            complain(f"this needs the package {error.name}, which is not installed: pip install 'qcompiler[{extra}]'")
            return FAULT
        case MemoryError():
            complain("the memory is used up; give more, or see with 'qcompiler plan' what this needs")
            return FAULT
        case OSError() if error.filename is not None:
            complain(f"{os.fsdecode(error.filename)}: {error.strerror or error}")
            return FAULT
    return _internal(error)


def _internal(error: BaseException) -> int:
    """Say which file holds what is needed to see the error again; where none can be written, say it all here."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    what = f"internal error: {type(error).__name__}: {error}{place}"
    try:
        path = getattr(error, "repro", None)
        if path is None:
            from qcompiler import debug

            error.add_note(f"arguments: {sys.argv[1:]}")
            path = debug.write_repro(error)
    except Exception:
        complain(f"{what}; no repro file could be written")
        traceback.print_exception(error, file=sys.stderr)
    else:
        complain(f"{what}; please report it with {path}, which holds what is needed to see it again")
    return INTERNAL


def _close_stdout() -> None:
    """Point standard output at nothing, so that closing it at exit does not fail once more."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Within the block, SIGTERM ends the command as an exception does, so that nothing half-written stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Progress:
    """A bar on standard error, made when the first stage begins; a listener as the Python interface wants one."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._task: TaskID | None = None

    def stage(self, text: str) -> None:
        """A new step begins; how long it takes is not known yet."""
        bars = self._started()
        if self._task is not None:
            bars.remove_task(self._task)
        self._task = bars.add_task(text, total=None, detail="")

    def advance(self, done: int, total: int, unit: str) -> None:
        """``done`` of ``total`` are behind the current step; bytes are shown in units that fit."""
        bars = self._started()
        if self._task is None:
            self._task = bars.add_task("working", total=None, detail="")
        bars.update(self._task, completed=done, total=total, detail=_amount(done, total, unit))

    def _started(self) -> Bars:
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars

            text, detail = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[detail]}")
            columns = (SpinnerColumn(), text, BarColumn(bar_width=24), detail, TimeElapsedColumn())
            self._bars = Bars(*columns, console=Console(stderr=True), transient=True)
            self._bars.start()
        return self._bars

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()


def _amount(done: int, total: int, unit: str) -> str:
    if unit in ("bytes", "B"):
        from qcompiler.report.words import human_bytes

        return f"{human_bytes(done)} of {human_bytes(total)}"
    return f"{done} of {total} {unit}"


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def working(*, quiet: bool) -> Iterator[Any]:
    """For the time of the work: a progress listener (None when ``quiet`` or when nobody watches standard error), and
    standard output kept for the result, whatever a model's own code prints."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield None if quiet or not sys.stderr.isatty() else stack.enter_context(Progress())
