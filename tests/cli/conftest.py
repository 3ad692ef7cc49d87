"""Run the command line in this process, with the Python interface replaced where a test is about form only."""

import types
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest


class Outcome(NamedTuple):
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run("verify", "x.onnx")``: exit status, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")

    def call(*arguments: str) -> Outcome:
        from qcompiler.cli import status

        capsys.readouterr()
        ended = status(list(arguments))
        return Outcome(ended, *capsys.readouterr())

    return call


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `qcompiler.api`, whose functions a test may replace; it goes back to what it was."""
    from qcompiler import api as real

    fake = types.SimpleNamespace(calls=[])

    def replace(name: str, result: Any) -> None:
        def answer(*given: Any, **options: Any) -> Any:
            fake.calls.append((name, given, options))
            if isinstance(result, BaseException):
                raise result
            return result(*given, **options) if callable(result) else result

        monkeypatch.setattr(real, name, answer)

    fake.replace = replace
    return fake
