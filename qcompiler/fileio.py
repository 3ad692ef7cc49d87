"""Files that appear whole or not at all: written aside, then renamed into place."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal

from qcompiler.errors import InputError


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class Staged:
    """A folder beside ``out`` for the files of one result, moved to their places by :meth:`commit`.

    ::

        with Staged(out) as stage:
            write(stage.main)                # becomes out
            write(stage.beside(".data"))     # becomes out.data
            stage.commit()

    The files stand in the folder under their final names, so that the result can be opened and tried before it is
    committed. Leaving the block without a commit, by an exception too, removes the folder and changes nothing else.
    OSError inside the block becomes InputError (``out`` is a folder, cannot be written, the disk is full).
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self._beside: dict[str, bool] = {}
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        """The staging folder; it exists inside the ``with`` block only."""
        assert self._folder is not None, "Staged is used inside its with block"
        return self._folder

    @property
    def main(self) -> Path:
        """Where to write the file that becomes ``out``."""
        return self.folder / self.out.name

    def beside(self, suffix: str, *, bound: bool = True) -> Path:
        """Where to write the file that becomes ``out`` + ``suffix``, if it is written at all.

        ``bound``: ``out`` is of no use without it (its data, unlike a report on it).
        """
        self._beside[suffix] = bound
        return self.folder / (self.out.name + suffix)

    def __enter__(self) -> Staged:
        if self.out.is_dir() or not self.out.name:
            raise InputError(f"{self.out} is a folder; name a file to write")
        with self._explained():
            if not self.out.parent.is_dir():
                raise InputError(f"the folder {self.out.parent} does not exist; create it or choose another output")
            self._remove_stale()
            folder = self.out.parent / f".{self.out.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
            folder.mkdir()
            self._folder = folder
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        folder, self._folder = self._folder, None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and self._concerns(error, folder):
            raise self._explain(error) from error
        return False

    def _concerns(self, error: OSError, folder: Path | None) -> bool:
        """True for a full disk and for errors on the staged files; another file's trouble is not about ``out``."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        return folder is None or error.filename is None or str(folder) in os.fsdecode(error.filename)

    def commit(self) -> None:
        """Put the files in place, ``out`` last, so that whoever sees ``out`` sees the files that belong to it.

        Where a file bound to it is replaced, the old ``out`` is removed first: an interruption may leave none, never
        one with the data of another.
        """
        with self._explained():
            extra = [s for s in self._beside if (self.folder / (self.out.name + s)).exists()]
            for suffix in ["", *extra]:
                _sync(self.folder / (self.out.name + suffix))
            if any(self._beside[s] and self._target(s).exists() for s in extra):
                self.out.unlink(missing_ok=True)
                _sync(self.out.parent)
            for suffix in extra:
                os.replace(self.folder / (self.out.name + suffix), self._target(suffix))
            _sync(self.out.parent)
            os.replace(self.main, self.out)
            _sync(self.out.parent)

    def _target(self, suffix: str) -> Path:
        return self.out.with_name(self.out.name + suffix)

    def _remove_stale(self) -> None:
        """Remove what an earlier process, now dead, left behind for the same ``out``."""
        pattern = re.compile(rf"\.{re.escape(self.out.name)}\.partial-(\d+)-[0-9a-f]+\Z")
        for path in self.out.parent.iterdir():
            m = pattern.match(path.name)
            if m is not None and not _alive(int(m[1])) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise self._explain(e) from e

    def _explain(self, error: OSError) -> InputError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return InputError(f"the disk is full while writing {self.out}; free space or choose another output")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return InputError(f"{self.out} cannot be written ({error.strerror}); choose another output")
        what = f"{error.filename}: " if error.filename is not None else ""
        return InputError(f"{self.out} cannot be written: {what}{error.strerror or error}")


def _sync(path: Path) -> None:
    """Have the file or folder reach the disk."""
    if os.name != "posix" and path.is_dir():
        return  # folders cannot be opened there
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
