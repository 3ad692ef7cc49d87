"""Files appear whole or not at all."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qcompiler import fileio
from qcompiler.errors import InputError
from qcompiler.fileio import Staged


def write(out: Path, main: str, **beside: str) -> None:
    with Staged(out) as stage:
        stage.main.write_text(main)
        for suffix, text in beside.items():
            stage.beside(f".{suffix}").write_text(text)
        stage.commit()


def attempt(out: Path | str, act: Callable[[Staged], object]) -> None:
    """Write ``out`` and do something else before the commit."""
    with Staged(out) as stage:
        stage.main.write_text("new")
        act(stage)
        stage.commit()


def raises(error: BaseException) -> Callable[[Staged], object]:
    def act(stage: Staged) -> None:
        stage.beside(".data").write_text("new data")
        raise error

    return act


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_files_come_into_place(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    with Staged(out) as stage:
        assert stage.main.name == "m.onnx"
        assert stage.beside(".data").name == "m.onnx.data"
        assert stage.main.parent == stage.beside(".data").parent == stage.folder
        stage.main.write_text("model")
        stage.beside(".data").write_text("weights")
        stage.beside(".report.json", bound=False)  # announced, and not written
        assert not out.exists()
        stage.commit()
        assert names(tmp_path) == sorted([stage.folder.name, "m.onnx", "m.onnx.data"])
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert out.read_text() == "model"


def test_without_a_commit_nothing_changes(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    write(out, "old", data="old data")
    with Staged(out) as stage:
        stage.main.write_text("new")
    for error in (KeyError(), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            attempt(out, raises(error))
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert (out.read_text(), (tmp_path / "m.onnx.data").read_text()) == ("old", "old data")


@pytest.mark.parametrize("dies_at", range(8))
@pytest.mark.parametrize("bound", [True, False])
def test_an_interruption_never_leaves_a_mixed_pair(tmp_path: Path, dies_at: int, bound: bool) -> None:
    """The machine may stop before any step of a commit; ``out`` is then absent or stands beside its own files."""
    out = tmp_path / "m.onnx"
    write(out, "old", data="old data")
    program = f"""
import os, sys
from pathlib import Path
from qcompiler import fileio
steps = 0
def counted(fn):
    def call(*args, **kw):
        global steps
        steps += 1
        if steps > {dies_at}:
            os._exit(3)
        return fn(*args, **kw)
    return call
with fileio.Staged({str(out)!r}) as stage:
    stage.main.write_text("new")
    stage.beside(".data", bound={bound}).write_text("new data")
    fileio.os.replace = counted(os.replace)
    fileio._sync = counted(fileio._sync)
    fileio.Path.unlink = counted(Path.unlink)
    stage.commit()
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode in (0, 3), done.stderr
    found = out.read_text() if out.exists() else None
    data = (tmp_path / "m.onnx.data").read_text()
    assert found in (None, "old", "new")
    if bound:
        assert found is None or data == f"{found} data"
    else:
        assert found is not None
    write(out, "newer")  # the next writer cleans up
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]


def test_what_dead_processes_left_is_removed_and_what_living_ones_write_is_not(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = tmp_path / f".m.onnx.partial-{dead.pid}-00ff"
    alive = tmp_path / f".m.onnx.partial-{os.getppid()}-00ff"
    other = tmp_path / f".n.onnx.partial-{dead.pid}-00ff"
    for folder in (gone, alive, other):
        folder.mkdir()
        (folder / "m.onnx").write_text("half")
    write(tmp_path / "m.onnx", "whole")
    assert names(tmp_path) == sorted([alive.name, other.name, "m.onnx"])


def test_several_writers_at_once(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    with Staged(out) as a, Staged(out) as b:
        a.main.write_text("a")
        b.main.write_text("b")
        b.commit()
        a.commit()
    assert out.read_text() == "a"
    assert names(tmp_path) == ["m.onnx"]


# -- errors ----------------------------------------------------------------------------------------------------


def refused(out: Path | str, error: OSError | None = None) -> str:
    with pytest.raises(InputError) as caught:
        attempt(out, raises(error) if error is not None else Staged.commit)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_folder_is_no_output(tmp_path: Path) -> None:
    assert refused(tmp_path) == f"{tmp_path} is a folder; name a file to write"
    assert refused("") == ". is a folder; name a file to write"


def test_an_absent_folder(tmp_path: Path) -> None:
    assert "does not exist; create it" in refused(tmp_path / "no" / "m.onnx")


def test_a_folder_made_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    with pytest.raises(InputError, match="cannot be written"):
        attempt(out, lambda _: out.mkdir())
    assert names(tmp_path) == ["m.onnx"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written (Permission denied)" in refused(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full while writing"),
        (errno.EDQUOT, "the disk is full while writing"),
        (errno.EROFS, "cannot be written (Read-only file system)"),
        (errno.EIO, "cannot be written: Input/output error"),
    ],
)
def test_what_the_system_says_becomes_a_sentence(tmp_path: Path, number: int, reason: str) -> None:
    assert reason in refused(tmp_path / "m.onnx", OSError(number, os.strerror(number)))
    assert names(tmp_path) == []


def test_a_full_disk_is_noticed(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")

    def fill(stage: Staged) -> None:
        stage.beside(".data").symlink_to("/dev/full")
        stage.beside(".data").write_text("x")

    with pytest.raises(InputError, match="the disk is full"):
        attempt(tmp_path / "m.onnx", fill)
    assert names(tmp_path) == []


def test_trouble_with_another_file_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        attempt(tmp_path / "m.onnx", lambda _: (tmp_path / "absent").read_text())


def test_an_error_of_the_commit_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "m.onnx"
    write(out, "old")

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(fileio, "_sync", full)
    assert "the disk is full" in refused(out)
    assert out.read_text() == "old"
    assert names(tmp_path) == ["m.onnx"]
