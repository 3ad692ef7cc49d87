"""The protobuf wire format, as far as reading and writing models without holding their weights needs it.

Reading: :func:`strip` walks a model file and leaves out the bytes of its big tensors, noting where they are. Writing:
a :class:`Rope` is a message whose payloads are read only when it is written. Source of the format and of the field
numbers: protobuf.dev/programming-guides/encoding and onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from qcompiler.errors import InputError
from qcompiler.payload import Payload

Buffer: TypeAlias = bytes | bytearray | memoryview

STRIP_LIMIT = 1024
"""Tensors of fewer bytes stay in the model: shape inference reads them."""

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5


def varint(n: int) -> bytes:
    """``n`` (64-bit, negative in two's complement) as a varint."""
    n &= (1 << 64) - 1
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


def header(number: int, length: int) -> bytes:
    """The bytes before a field of ``length`` bytes."""
    return varint(number << 3 | LENGTH) + varint(length)


def integer(number: int, value: int) -> bytes:
    """An integer field."""
    return varint(number << 3 | VARINT) + varint(value)


def field(number: int, data: Buffer) -> bytes:
    """A length-delimited field: a string, bytes or a message."""
    return header(number, len(data)) + data


class Rope:
    """A message in pieces: bytes, and payloads that stand for their packed bytes. ``size`` is its length in bytes."""

    __slots__ = ("parts", "size")

    def __init__(self, *data: Buffer) -> None:
        self.parts: list[Buffer | Payload] = []
        self.size = 0
        for piece in data:
            self.add(piece)

    def add(self, data: Buffer) -> None:
        self.parts.append(data)
        self.size += len(data)

    def payload(self, payload: Payload) -> None:
        self.parts.append(payload)
        self.size += payload.nbytes

    def message(self, number: int, inner: Rope) -> None:
        """Append ``inner`` as field ``number``."""
        self.add(header(number, inner.size))
        self.parts += inner.parts
        self.size += inner.size


class _Truncated(Exception):
    pass


def _varint_at(view: memoryview, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= end or shift > 63:
            raise _Truncated
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(view: memoryview, at: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(field number, wire type, start of the field, start of its value, its end) for each field of a message."""
    while at < end:
        start = at
        key, at = _varint_at(view, at, end)
        number, wire = key >> 3, key & 7
        body = at
        if wire == VARINT:
            _, at = _varint_at(view, at, end)
        elif wire == LENGTH:
            length, body = _varint_at(view, at, end)
            at = body + length
        elif wire in (FIXED32, FIXED64):
            at += 4 if wire == FIXED32 else 8
        else:
            raise _Truncated
        if at > end or number == 0:
            raise _Truncated
        yield number, wire, start, body, at


# Message kind -> {field number: kind of the message inside}. What is not named here is copied as it is.
_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}
_DATA_TYPE, _FLOATS, _RAW, _DOUBLES, _EXTERNAL, _LOCATION = 2, 4, 9, 10, 13, 14
_F32, _F64 = 1, 11


def strip(view: memoryview, token: str, label: str) -> bytes:
    """The model in ``view`` without the bytes of tensors of at least STRIP_LIMIT bytes.

    A tensor that lost its bytes is marked as external, with an entry ``token`` = ``offset:length`` (in ``view``)
    among its external data. Raises InputError, naming ``label``, when the bytes are no well-formed message.
    """
    try:
        return bytes(_strip(view, 0, len(view), "model", token))
    except (_Truncated, RecursionError):
        raise InputError(
            f"{label} is not a readable ONNX model: it is cut short or damaged; copy or export it again"
        ) from None


def _strip(view: memoryview, at: int, end: int, kind: str, token: str) -> bytearray:
    if kind == "tensor":
        return _strip_tensor(view, at, end, token)
    inside = _INSIDE[kind]
    out = bytearray()
    copied = at
    for number, wire, start, body, stop in _fields(view, at, end):
        inner = inside.get(number)
        if inner is None or wire != LENGTH or stop - body < STRIP_LIMIT:
            continue
        out += view[copied:start]
        out += field(number, _strip(view, body, stop, inner, token))
        copied = stop
    out += view[copied:end]
    return out


def _strip_tensor(view: memoryview, at: int, end: int, token: str) -> bytearray:
    """A TensorProto without its raw bytes, or without its packed floats, which are laid out the same."""
    fields = list(_fields(view, at, end))
    data_type = 0
    for number, wire, _, body, _ in fields:
        if number == _DATA_TYPE and wire == VARINT:
            data_type = _varint_at(view, body, end)[0]
        elif number == _LOCATION and (wire != VARINT or _varint_at(view, body, end)[0]):
            return bytearray(view[at:end])  # its bytes are elsewhere already, whatever else it holds
    same_layout = {_F32: _FLOATS, _F64: _DOUBLES}.get(data_type)
    found = [f for f in fields if f[0] in (_RAW, same_layout) and f[1] == LENGTH]
    partial = any(f[0] in (_RAW, same_layout) and f[1] != LENGTH for f in fields)
    if len(found) != 1 or partial or found[0][4] - found[0][3] < STRIP_LIMIT:
        return bytearray(view[at:end])
    _, _, start, body, stop = found[0]
    entry = field(1, token.encode()) + field(2, f"{body}:{stop - body}".encode())
    return bytearray(b"".join([view[at:start], view[stop:end], field(_EXTERNAL, entry), integer(_LOCATION, 1)]))
