"""Open an ONNX model without its weights: read, inline its functions, infer its types."""

from __future__ import annotations

import mmap
import secrets
from pathlib import Path

import onnx
import onnx.inliner
import onnx.shape_inference
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from qcompiler.backends.onnx import wire
from qcompiler.backends.onnx.attributes import GRAPHS, attribute_type
from qcompiler.backends.onnx.tensors import Origin
from qcompiler.backends.onnx.wiring import subgraphs
from qcompiler.errors import InputError

NESTED_LIMIT = 1 << 22
"""Nodes times nested graphs up to which the types inside nested graphs are inferred."""


def read_model(source: str | Path | onnx.ModelProto) -> tuple[onnx.ModelProto, Origin]:
    """The model, its functions inlined; bytes of big tensors stay in the file. Raises InputError."""
    if isinstance(source, onnx.ModelProto):
        model, origin = source, Origin(None)
    else:
        path = Path(source).absolute()
        origin = Origin(path, f"qcompiler.inline.{secrets.token_hex(8)}")
        model = _parse(path, origin)
    if not model.HasField("graph"):
        raise InputError(f"{origin.label} is not a readable ONNX model: it has no graph")
    return (_inlined(model, origin) if model.functions else model), origin


def _parse(path: Path, origin: Origin) -> onnx.ModelProto:
    try:
        with open(path, "rb") as f:
            if f.seek(0, 2) == 0:
                raise InputError(f"{path} is not a readable ONNX model: it is empty")
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                data = wire.strip(view, origin.token, str(path))
    except OSError as e:
        raise InputError(f"cannot read the model {path}: {e.strerror or e}") from None
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise InputError(f"{path} is not a readable ONNX model: it is damaged, or another kind of file") from None
    return model


def outlined(path: Path) -> onnx.ModelProto:
    """The model in ``path`` as if its big initializers were external data: byte ranges of the file ``path`` itself.

    A runtime that opens it beside ``path`` maps the weights instead of copying them. Raises InputError as
    :func:`read_model` does.
    """
    origin = Origin(path.absolute(), f"qcompiler.inline.{secrets.token_hex(8)}")
    model = _parse(path, origin)
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        for tensor in graph.initializer:
            _point_into(tensor, path, origin.token)
        for node in graph.node:
            graphs += subgraphs(node)
            for attribute in node.attribute:
                for tensor in (attribute.t, *attribute.tensors):
                    _read_back(tensor, path, origin.token)
    return model


def _range(tensor: onnx.TensorProto, token: str) -> tuple[int, int] | None:
    found = next((e.value for e in tensor.external_data if e.key == token), None)
    if found is None:
        return None
    offset, length = found.split(":")
    return int(offset), int(length)


def _point_into(tensor: onnx.TensorProto, path: Path, token: str) -> None:
    if (place := _range(tensor, token)) is not None:
        del tensor.external_data[:]
        for key, value in (("location", path.name), ("offset", place[0]), ("length", place[1])):
            tensor.external_data.add(key=key, value=str(value))


def _read_back(tensor: onnx.TensorProto, path: Path, token: str) -> None:
    if (place := _range(tensor, token)) is not None:  # runtimes take external data in initializers only
        with open(path, "rb") as f:
            f.seek(place[0])
            tensor.raw_data = f.read(place[1])
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT


def _without_nested(model: onnx.ModelProto) -> onnx.ModelProto:
    out = onnx.ModelProto()
    out.CopyFrom(model)
    for node in out.graph.node:
        if subgraphs(node):
            kept = [a for a in node.attribute if attribute_type(a) not in GRAPHS]
            del node.attribute[:]
            node.attribute.extend(kept)
    return out


def _inlined(model: onnx.ModelProto, origin: Origin) -> onnx.ModelProto:
    names = ", ".join(sorted({f"{f.domain}.{f.name}" for f in model.functions})[:3])
    try:
        out = onnx.inliner.inline_local_functions(model)
    except Exception as e:
        raise InputError(f"{origin.label}: its functions ({names}) cannot be inlined: {e}") from None
    if out.functions:
        names = ", ".join(sorted({f"{f.domain}.{f.name}" for f in out.functions})[:3])
        raise InputError(
            f"{origin.label}: its functions ({names}) cannot be inlined, since they ask for another opset than the "
            "model; convert the model to one opset first"
        )
    return out


def infer_types(model: onnx.ModelProto) -> onnx.GraphProto:
    """The graph of ``model`` with the types that ONNX can infer; the graph itself where inference fails.

    Inference copies everything known for each nested graph, so very many of those are left out.
    """
    try:
        nested = sum(len(subgraphs(n)) for n in model.graph.node)
        if nested * len(model.graph.node) > NESTED_LIMIT:
            model = _without_nested(model)
        return onnx.shape_inference.infer_shapes(model, strict_mode=False, data_prop=False).graph
    except Exception:  # a model that inference cannot follow is still a model
        return model.graph
