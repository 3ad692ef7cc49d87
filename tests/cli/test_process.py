"""The command as a process: interrupted, terminated, with its reader gone, and how much it loads to answer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAVY = ("numpy", "ml_dtypes", "torch", "onnx", "onnxruntime", "networkx", "rich", "transformers")

# A source whose construction says that it began, then takes its time.
SLOW = """
import pathlib, time

def make():
    pathlib.Path("began").touch()
    time.sleep(60)
"""


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "qcompiler", *arguments]


def _loaded(*arguments: str) -> set[str]:
    script = f"""
import sys
from qcompiler.cli import status
assert status({list(arguments)!r}) == 0
print(file=sys.stderr)
print(*set({HEAVY!r}).intersection(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["compile", "--help"], ["explain", "QC101"]])
def test_what_needs_no_model_loads_nothing_heavy(arguments: list[str]) -> None:
    assert _loaded(*arguments) == set()


def test_a_loaded_package_would_be_seen() -> None:
    assert "numpy" in _loaded("recipes")


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that starts the tests in its background has it ignored


def _begun(folder: Path) -> subprocess.Popen[str]:
    """`compile` of a source that takes a minute to build, once it has begun."""
    (folder / "slow.py").write_text(SLOW)
    process = subprocess.Popen(
        _command("compile", "slow:make", "-o", "out.onnx"),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_interrupts,
    )
    deadline = time.monotonic() + 90
    while not (folder / "began").exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGINT, 130, "qcompiler: interrupted\n"), (signal.SIGTERM, 143, "")]
)
def test_stopped_in_the_middle(tmp_path: Path, number: signal.Signals, status: int, said: str) -> None:
    process = _begun(tmp_path)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (status, "", said)
    assert {p.name for p in tmp_path.iterdir()} <= {"slow.py", "began", "__pycache__"}


@pytest.mark.parametrize("arguments", [["recipes"], ["explain", "QC104"], ["kernels", "--json"]])
def test_reader_that_went_away(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(_command(*arguments), stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (process.returncode, process.stderr) == (141, "")


def test_terminal_that_knows_ascii_only(tmp_path: Path) -> None:
    """A name that the terminal cannot show, or that is no text at all, is escaped and not a failure."""
    graph = 'graph @main dialect=onnx {\n  input %"größe" : f32[n]\n  return %"größe"\n}\n'
    path = tmp_path / os.fsdecode(b"gr\xf6\xdfe.qir")
    path.write_text(graph, encoding="utf-8")
    for option in ([], ["--text"], ["--json"], ["--text", "--html", str(tmp_path / "page.html")]):
        done = subprocess.run(
            _command("inspect", str(path), *option),
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout


def test_status_reaches_the_shell() -> None:
    done = subprocess.run(_command("explain", "QC999"), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("qcompiler: there is no finding code")
