"""Which constant's bytes go where in a model and its data file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import IO

from qcompiler.backends.onnx import wire
from qcompiler.backends.streaming import Releaser, copy_payload
from qcompiler.payload import BytesPayload, ComputedPayload, FilePayload, Payload

INLINE_BELOW = 1024
"""Smaller tensors stay in the model file, where shape inference finds them."""
EXTERNAL_OVER = 1 << 30
"""Models with more constant bytes get a data file unless told otherwise."""
INLINE_LIMIT = (1 << 31) - 1
"""Protobuf reads no message of 2 GiB."""
_ALIGNMENT = ((4 << 20, 1 << 16), (1 << 16, 1 << 12), (0, 64))
"""(tensors of at least this size, start at multiples of this): pages, and for the biggest those of Windows."""


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
