"""What calibration found, kept on disk: by the graph that ran, the data it ran on, the place and the observer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from qcompiler.calibrate.observers import Observer
from qcompiler.dtypes import Array
from qcompiler.ir import Graph
from qcompiler.payload import Payload
from qcompiler.text import show

VARIABLE = "QCOMPILER_CACHE"
"""Names the folder of the cache; ``off`` keeps nothing."""
VERSION = 1
"""Part of every key: raise it when an observer or the running of graphs gives other numbers."""
ENTRY_BYTES = 256 << 20
"""States beyond this size, all of one graph and data together, are not kept."""
FOLDER_BYTES = 2 << 30
"""The oldest entries are removed when the folder is larger."""
UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, TypeError, IndexError)
"""What reading a damaged entry raises: it is measured again, and replaced."""

States = Mapping[tuple[str, str], Mapping[str, Array]]
"""(value name, key of the observer) -> its state."""


def graph_digest(graph: Graph) -> str:
    """Digest of the structure of ``graph`` and the bytes of all its constants, read one at a time."""
    sha = hashlib.sha256(show(graph, locs=False, digests=False).encode())
    for inner in graph.graphs():
        for value in (*inner.inputs, *inner.consts.values()):
            if value.payload is not None:
                sha.update(f"\n{value.name} ".encode())
                for piece in _bytes(value.payload):
                    sha.update(piece)
                value.payload.release()
    return sha.hexdigest()


def _bytes(payload: Payload) -> Iterator[bytes | memoryview]:
    if payload.dtype.kind == "string":
        yield repr(payload.array().tolist()).encode()
    else:
        yield from payload.chunks()


class Cache:
    """Entries in ``folder``, one file for each graph and data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def from_environment(cls) -> Cache | None:
        """The user's cache: ``$QCOMPILER_CACHE``, else ``qcompiler`` in the folder for caches; None when it is off."""
        named = os.environ.get(VARIABLE, "")
        if named.lower() == "off":
            return None
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "qcompiler"
        try:
            return cls((Path(named) if named else base).expanduser() / "calibration")
        except RuntimeError:  # there is no home
            return None

    def open(self, graph: str, data: str) -> Entry:
        """The entry of a graph and data, by their digests; it may hold nothing yet."""
        key = hashlib.sha256(f"{VERSION}\n{graph}\n{data}".encode()).hexdigest()[:32]
        return Entry(self.folder / f"{key}.npz")

    def __repr__(self) -> str:
        return f"Cache({str(self.folder)!r})"


class Entry:
    """One file of states, read when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _index(self, file: Mapping[str, Array]) -> dict[tuple[str, str], list[tuple[str, str]]]:
        """(name, key) -> fields of the state and the members that hold them."""
        rows = json.loads(bytes(file["index"]))
        return {(name, key): [(str(f), str(m)) for f, m in fields] for name, key, fields in rows}

    def fill(self, name: str, observer: Observer) -> bool:
        """Restore ``observer`` of the value ``name``; False when the entry does not know it or is damaged."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                fields = self._index(file)[name, observer.key()]
                observer.restore({field: file[member] for field, member in fields})
            with contextlib.suppress(OSError):  # a cache that cannot be written to is still read
                os.utime(self.path)
        except UNREADABLE:
            return False
        return True

    def save(self, states: States) -> None:
        """Add ``states`` to what the entry holds; the file is replaced as a whole. A full or locked disk keeps none."""
        together = self._held() | {k: dict(s) for k, s in states.items()}
        arrays: dict[str, Array] = {}
        rows, size = [], 0
        for (name, key), state in sorted(together.items(), key=lambda item: _size(item[1])):
            size += _size(state)
            if size > ENTRY_BYTES:
                break
            fields = [(field, f"a{len(arrays) + i}") for i, field in enumerate(state)]
            arrays |= {member: state[field] for field, member in fields}
            rows.append((name, key, fields))
        index = np.frombuffer(json.dumps(rows).encode(), np.uint8)
        with contextlib.suppress(OSError):  # nothing is lost but time
            self._write({"index": index, **arrays})
            _prune(self.path.parent, keep=self.path)

    def _held(self) -> dict[tuple[str, str], dict[str, Array]]:
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return {k: {f: file[m] for f, m in fields} for k, fields in self._index(file).items()}
        except UNREADABLE:
            return {}

    def _write(self, arrays: Mapping[str, Array]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f".{self.path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
        try:
            with open(aside, "wb") as f:
                np.savez(f, allow_pickle=False, **arrays)
            os.replace(aside, self.path)
        finally:
            aside.unlink(missing_ok=True)


def _size(state: Mapping[str, Array]) -> int:
    return sum(a.nbytes for a in state.values())


def _prune(folder: Path, keep: Path) -> None:
    """Remove the entries longest unused until the folder is small enough, and what killed processes left behind."""
    entries = [(p, p.stat()) for p in folder.glob("*.npz") if p != keep]
    total = sum(s.st_size for _, s in entries) + keep.stat().st_size
    for path, stat in sorted(entries, key=lambda item: item[1].st_mtime):
        if total <= FOLDER_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= stat.st_size
    for path in folder.glob(".*.partial-*"):
        if time.time() - path.stat().st_mtime > 86400:
            path.unlink(missing_ok=True)
