"""In which order constants are written, and writing them a piece at a time: memory depends on the largest one (L6)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import IO

from qcompiler.errors import StructureError
from qcompiler.ir import Value
from qcompiler.payload import Computation, ComputedPayload, Payload


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
