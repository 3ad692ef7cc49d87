"""Which constant's bytes go where and in which order, and writing them a piece at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO

from qcompiler.backends.onnx import wire
from qcompiler.errors import StructureError
from qcompiler.ir import Value
from qcompiler.payload import BytesPayload, Computation, ComputedPayload, FilePayload, Payload

INLINE_BELOW = 1024
"""Smaller tensors stay in the model file, where shape inference finds them."""
EXTERNAL_OVER = 1 << 30
"""Models with more constant bytes get a data file unless told otherwise."""
INLINE_LIMIT = (1 << 31) - 1
"""Protobuf reads no message of 2 GiB."""
_ALIGNMENT = ((4 << 20, 1 << 16), (1 << 16, 1 << 12), (0, 64))
"""(tensors of at least this size, start at multiples of this): pages, and for the biggest those of Windows."""


def computations(payload: Payload) -> Iterator[Computation]:
    """The computations that reading ``payload`` runs, each once."""
    seen: set[int] = set()
    waiting = [payload]
    while waiting:
        p = waiting.pop()
        if isinstance(p, ComputedPayload) and id(p.computation) not in seen:
            seen.add(id(p.computation))
            yield p.computation
            waiting += p.computation.inputs


def reading_order(values: Iterable[Value]) -> list[Value]:
    """``values`` in their order, but constants that come from the same computations one after the other, biggest first.

    A computation keeps its small results only: reading codes, scales and zeros in this order runs it once.
    """
    groups: dict[frozenset[int] | int, list[Value]] = {}
    for value in values:
        assert value.payload is not None
        shared = frozenset(id(c) for c in computations(value.payload) if len(c.results) > 1)
        groups.setdefault(shared or id(value), []).append(value)
    out: list[Value] = []
    for group in groups.values():
        out += sorted(group, key=lambda v: -v.payload.nbytes if v.payload is not None else 0)
    return out


class Releaser:
    """Forgets the kept results of a computation when the last payload that needs it is written.

    ``told`` hears after each payload how many bytes are written, and of how many.
    """

    def __init__(self, payloads: Iterable[Payload], told: Callable[[int, int], None] | None = None) -> None:
        self._left: Counter[int] = Counter()
        self._told, self._done, self._total = told, 0, 0
        for payload in payloads:
            self._left.update(id(c) for c in computations(payload))
            self._total += payload.nbytes

    def written(self, payload: Payload) -> None:
        """``payload`` is in the file."""
        self._done += payload.nbytes
        if self._told is not None:
            self._told(self._done, self._total)
        for computation in computations(payload):
            self._left[id(computation)] -= 1
            if self._left[id(computation)] <= 0:
                computation.release()


def copy_payload(payload: Payload, file: IO[bytes], releaser: Releaser) -> None:
    """Write the bytes of ``payload``; raises StructureError when there are more or fewer than its shape says."""
    written = 0
    for piece in payload.chunks():
        written += memoryview(piece).nbytes
        file.write(piece)
    if written != payload.nbytes:
        raise StructureError(
            f"a constant {payload.dtype}{list(payload.shape)} has {written} bytes where its type says {payload.nbytes}"
        )
    releaser.written(payload)


def copy_rope(rope: wire.Rope, file: IO[bytes], releaser: Releaser) -> None:
    for part in rope.parts:
        if isinstance(part, Payload):
            copy_payload(part, file, releaser)
        else:
            file.write(part)


@dataclass
class DataFile:
    """The layout of the one file of external data: equal payloads share a place."""

    location: str
    size: int = 0
    places: list[tuple[int, Payload]] = field(default_factory=list)
    _known: dict[object, int] = field(default_factory=dict)

    def place(self, payload: Payload) -> int:
        """The offset of ``payload`` in the file."""
        key = _identity(payload)
        if key in self._known:
            return self._known[key]
        step = next(step for least, step in _ALIGNMENT if payload.nbytes >= least)
        offset = -(-self.size // step) * step
        self._known[key] = offset
        self.places.append((offset, payload))
        self.size = offset + payload.nbytes
        return offset

    def write(self, file: IO[bytes], releaser: Releaser) -> None:
        at = 0
        for offset, payload in self.places:
            file.write(bytes(offset - at))
            copy_payload(payload, file, releaser)
            at = offset + payload.nbytes


def _identity(payload: Payload) -> object:
    if isinstance(payload, FilePayload):
        return (payload.path, payload.offset, payload.nbytes)
    if isinstance(payload, BytesPayload):
        return id(payload.data), payload.nbytes
    if isinstance(payload, ComputedPayload):
        return id(payload.computation), payload.index
    return id(payload)
