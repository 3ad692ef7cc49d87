"""TensorProto against payloads: where a tensor's bytes are, and how its header is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper

from qcompiler.backends.onnx import wire
from qcompiler.backends.onnx.typemap import dtype_from_onnx, dtype_to_onnx
from qcompiler.errors import InputError
from qcompiler.payload import ArrayPayload, BytesPayload, FilePayload, Payload


@dataclass(frozen=True)
class Origin:
    """Where a model came from: its file, if any, and the mark of tensors whose bytes :func:`wire.strip` left there."""

    path: Path | None
    token: str = ""

    @property
    def label(self) -> str:
        return self.path.name if self.path is not None else "the model"


def payload_of(tensor: onnx.TensorProto, origin: Origin, name: str = "") -> Payload:
    """The payload of ``tensor``; nothing but its header is read where its bytes are in a file.

    Raises InputError, naming the tensor, for an element type unknown here, external data that is absent, too short
    or outside the model's folder, and a size that does not match the shape.
    """
    name = name or tensor.name
    where = f"{origin.label}: tensor '{name}'"
    element = dtype_from_onnx(tensor.data_type, where)
    shape = tuple(int(d) for d in tensor.dims)
    if any(d < 0 for d in shape):
        raise InputError(f"{where} has the impossible shape {list(shape)}")
    if tensor.HasField("segment"):
        raise InputError(f"{where} is stored in segments, which ONNX runtimes do not read; export it again")
    try:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            return _external(tensor, origin, name)
        if element.kind == "string":
            values = np.empty(len(tensor.string_data), object)
            values[:] = [_text(s) for s in tensor.string_data]
            return ArrayPayload(values.reshape(shape), element)
        if tensor.HasField("raw_data"):
            return BytesPayload(tensor.raw_data, element, shape)
        array = onnx.numpy_helper.to_array(tensor)
        if element.packed and element.is_integer:
            array = array.astype(element.storage)
        return ArrayPayload(array.reshape(shape), element)
    except InputError as e:
        text = str(e)
        raise InputError(text if text.startswith(where) else f"{where}: {text}") from None
    except ValueError as e:
        raise InputError(f"{where} does not hold the values of its shape {list(shape)}: {e}") from None


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _external(tensor: onnx.TensorProto, origin: Origin, name: str) -> Payload:
    where = f"{origin.label}: tensor '{name}'"
    entries = {e.key: e.value for e in tensor.external_data}
    element = dtype_from_onnx(tensor.data_type, where)
    shape = tuple(int(d) for d in tensor.dims)
    if element.kind == "string":
        raise InputError(f"{where} holds strings outside of the model, which ONNX does not allow; save it again")
    if origin.token and origin.token in entries:
        assert origin.path is not None
        offset, length = map(int, entries[origin.token].split(":"))
        path = origin.path
    else:
        if origin.path is None:
            raise InputError(f"{where} is stored in a file of its own; load the model from its path, not from memory")
        path = _external_path(entries.get("location", ""), origin.path, where)
        try:
            offset = int(entries.get("offset", "0"))
            length = int(entries["length"]) if "length" in entries else element.nbytes(math.prod(shape))
        except ValueError:
            raise InputError(f"{where} has an offset or length that is no number; export the model again") from None
        size = path.stat().st_size
        if offset < 0 or length < 0 or offset + length > size:
            raise InputError(
                f"{where} needs bytes {offset} to {offset + length} of {path}, which has {size}; "
                "copy the data file again"
            )
    payload_bytes = element.nbytes(math.prod(shape))
    if length != payload_bytes:
        raise InputError(
            f"{where} of type {element}{list(shape)} needs {payload_bytes} bytes, the model gives {length}"
        )
    return FilePayload(path, offset, element, shape)


def _external_path(location: str, model: Path, where: str) -> Path:
    """The data file, which must stand in the model's folder (or, for a linked model, beside the file linked to)."""
    path = model.parent / location
    if not location or Path(location).is_absolute():
        raise InputError(f"{where} is stored in {location!r}, which is no relative path; save the model again")
    folders = {model.parent.resolve(), model.resolve().parent}
    if not any(path.resolve().is_relative_to(f) for f in folders):
        raise InputError(
            f"{where} is stored in {location!r}, which leads out of the model's folder {model.parent}; "
            "put the data file beside the model and save it again"
        )
    if not path.is_file():
        raise InputError(f"{where} is stored in {path}, which is absent; put the data file beside the model")
    return path


def header_of(name: str, payload: Payload) -> bytes:
    """Serialised TensorProto of ``payload`` without its data."""
    proto = onnx.TensorProto(name=name, data_type=dtype_to_onnx(payload.dtype, f"tensor '{name}'"))
    proto.dims.extend(payload.shape)
    data: bytes = proto.SerializeToString()
    return data


def inline(name: str, payload: Payload) -> wire.Rope:
    """A TensorProto that holds its bytes; they are read when the rope is written (strings at once: they are small)."""
    rope = wire.Rope(header_of(name, payload))
    if payload.dtype.kind == "string":
        for item in payload.array().reshape(-1).tolist():
            rope.add(wire.field(6, item.encode() if isinstance(item, str) else bytes(item)))
        return rope
    rope.add(wire.header(9, payload.nbytes))
    rope.payload(payload)
    return rope


def external(name: str, payload: Payload, location: str, offset: int) -> wire.Rope:
    """A TensorProto whose bytes stand at ``offset`` of the file ``location``."""
    rope = wire.Rope(header_of(name, payload))
    for key, value in (("location", location), ("offset", offset), ("length", payload.nbytes)):
        rope.add(wire.field(13, wire.field(1, key.encode()) + wire.field(2, str(value).encode())))
    rope.add(wire.integer(14, onnx.TensorProto.EXTERNAL))
    return rope


def tensor_proto(name: str, payload: Payload) -> onnx.TensorProto:
    """``payload`` as a TensorProto in memory."""
    rope = inline(name, payload)
    data = b"".join(b"".join(part.chunks()) if isinstance(part, Payload) else bytes(part) for part in rope.parts)
    proto = onnx.TensorProto()
    proto.ParseFromString(data)
    return proto
