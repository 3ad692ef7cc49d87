"""The progress bar: what it shows, and that it leaves nothing behind."""

import io
from contextlib import redirect_stderr

import pytest

from qcompiler import cli_session
from qcompiler.cli_session import Progress, working


class Terminal(io.StringIO):
    """A stream that says that somebody watches it."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def test_stages_and_amounts(terminal: Terminal) -> None:
    with redirect_stderr(terminal), working(quiet=False) as progress:
        assert isinstance(progress, Progress)
        progress.stage("pass fuse-linear")
        progress.advance(3, 7, "tensors")
        progress.stage("quantize [and] write")
        progress.advance(1 << 20, 3 << 20, "bytes")
    shown = terminal.getvalue()
    assert "quantize [and] write" in shown
    assert "1.0 MiB of 3.0 MiB" in shown
    assert shown.endswith("\x1b[2K"), "the bar is erased at the end"


def test_amount_before_any_stage(terminal: Terminal) -> None:
    with redirect_stderr(terminal), working(quiet=False) as progress:
        progress.advance(1, 2, "files")
    assert "1 of 2 files" in terminal.getvalue()


def test_bar_ends_with_an_error(terminal: Terminal) -> None:
    def fail() -> None:
        with redirect_stderr(terminal), working(quiet=False) as progress:
            progress.stage("work")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert terminal.getvalue().endswith("\x1b[2K")


def test_quiet_has_no_listener(terminal: Terminal) -> None:
    with redirect_stderr(terminal), working(quiet=True) as progress:
        assert progress is None
    assert terminal.getvalue() == ""


def test_no_bar_where_nobody_watches() -> None:
    out = io.StringIO()
    with redirect_stderr(out), working(quiet=False) as progress:
        assert progress is None
        print("stray")
    assert out.getvalue() == "stray\n"


def test_statuses_differ() -> None:
    names = ("ACCEPTED", "REJECTED", "FAULT", "INTERNAL", "INTERRUPTED", "PIPE", "TERMINATED")
    assert [getattr(cli_session, n) for n in names] == [0, 1, 2, 3, 130, 141, 143]
