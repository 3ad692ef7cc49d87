"""AttributeProto against the IR's attribute values, keeping the ONNX attribute type.

INT, FLOAT and STRING are int, float and str (bytes where not UTF-8); their lists are tuples; TENSOR is a Payload;
TYPE_PROTO a TensorType or OpaqueType. A list attribute that is empty has no elements to tell its type, so it
is ``Atom("onnx.empty", "INTS")``; read such attributes with :func:`items`. A sparse tensor is an ``onnx.sparse`` atom.
Graphs are no attributes but regions.
"""

from __future__ import annotations

import re
from typing import Any

import onnx

from qcompiler.backends.onnx.tensors import Origin, payload_of, tensor_proto
from qcompiler.backends.onnx.typemap import from_text, to_text, type_from_onnx, type_to_onnx
from qcompiler.errors import InputError, StructureError
from qcompiler.ir import Atom, Attr, OpaqueType, TensorType
from qcompiler.payload import Payload

_A = onnx.AttributeProto
EMPTY, SPARSE, TYPE = "onnx.empty", "onnx.sparse", "onnx.type"
LIST_KEY = re.compile(r"(.+)\.(\d+)\Z")
"""The key of a region that is one of a list of graphs: ``name.0``, ``name.1`` ..."""
GRAPHS: frozenset[int] = frozenset({_A.GRAPH, _A.GRAPHS})
_LIST_FIELDS: dict[int, str] = {
    _A.FLOATS: "floats",
    _A.INTS: "ints",
    _A.STRINGS: "strings",
    _A.TENSORS: "tensors",
    _A.GRAPHS: "graphs",
    _A.SPARSE_TENSORS: "sparse_tensors",
    _A.TYPE_PROTOS: "type_protos",
}
_ONE_FIELDS: dict[int, str] = {
    _A.FLOAT: "f",
    _A.INT: "i",
    _A.STRING: "s",
    _A.TENSOR: "t",
    _A.GRAPH: "g",
    _A.SPARSE_TENSOR: "sparse_tensor",
    _A.TYPE_PROTO: "tp",
}


def items(value: Attr) -> tuple[Any, ...]:
    """A list attribute as a tuple, the empty one and an absent one (None) included."""
    if value is None or (isinstance(value, Atom) and value.kind == EMPTY):
        return ()
    return value if isinstance(value, tuple) else (value,)


def attribute_type(attribute: onnx.AttributeProto) -> int:
    """The type, which files of IR version 1 leave out."""
    if attribute.type != _A.UNDEFINED:
        return int(attribute.type)
    for fields in (_ONE_FIELDS, _LIST_FIELDS):
        for kind, field in fields.items():
            if attribute.HasField(field) if fields is _ONE_FIELDS else getattr(attribute, field):
                return int(kind)
    return int(_A.INTS)


def attr_of(attribute: onnx.AttributeProto, origin: Origin, where: str) -> Attr:
    """The value of an attribute that holds no graph; raises InputError for one that refers to a function's."""
    if attribute.ref_attr_name:
        raise InputError(f"{where}: attribute '{attribute.name}' refers to an attribute of a function that is absent")
    kind = attribute_type(attribute)
    if (one := _ONE_FIELDS.get(kind)) is not None:
        return _value_of(kind, getattr(attribute, one), origin, f"{where}.{attribute.name}")
    if (many := _LIST_FIELDS.get(kind)) is None:
        raise InputError(f"{where}: attribute '{attribute.name}' has the unknown type {kind}")
    found = getattr(attribute, many)
    if not found:
        return Atom(EMPTY, _A.AttributeType.Name(kind))
    each = next(k for k, f in _ONE_FIELDS.items() if _A.AttributeType.Name(k) + "S" == _A.AttributeType.Name(kind))
    return tuple(_value_of(each, v, origin, f"{where}.{attribute.name}") for v in found)


def _value_of(kind: int, value: Any, origin: Origin, where: str) -> Attr:
    if kind == _A.STRING:
        try:
            return value.decode()
        except UnicodeDecodeError:
            return bytes(value)
    if kind == _A.TENSOR:
        return payload_of(value, origin, value.name or where)
    if kind == _A.SPARSE_TENSOR:
        return Atom(SPARSE, to_text(value))
    if kind == _A.TYPE_PROTO:
        type = type_from_onnx(value)
        exact = type_to_onnx(type, where) == value
        return type if exact else Atom(TYPE, to_text(value))
    return value


def attribute_proto(name: str, value: Attr, where: str) -> onnx.AttributeProto:
    """Inverse of :func:`attr_of`; raises StructureError for a value that ONNX has no attribute type for."""
    proto = onnx.AttributeProto(name=name)
    if isinstance(value, Atom) and value.kind == EMPTY:
        proto.type = _A.AttributeType.Value(value.text)
    elif isinstance(value, tuple):
        kinds = {_kind_of(v, name, where) for v in value}
        if kinds == {_A.INT, _A.FLOAT}:
            kinds = {_A.FLOAT}
        if len(kinds) != 1:
            raise StructureError(
                f"{where}: attribute '{name}' = {value!r} is no list of one type; "
                f'write an empty one as Atom("{EMPTY}", "INTS")'
            )
        kind = kinds.pop()
        proto.type = _A.AttributeType.Value(_A.AttributeType.Name(kind) + "S")
        getattr(proto, _LIST_FIELDS[proto.type]).extend(_to_proto(kind, v, where) for v in value)
    else:
        kind = _kind_of(value, name, where)
        proto.type = _A.AttributeType.Value(_A.AttributeType.Name(kind))
        field, out = _ONE_FIELDS[kind], _to_proto(kind, value, where)
        if kind in (_A.FLOAT, _A.INT, _A.STRING):
            setattr(proto, field, out)
        else:
            getattr(proto, field).CopyFrom(out)
    return proto


def _kind_of(value: Attr, name: str, where: str) -> int:
    match value:
        case bool() | int():
            return int(_A.INT)
        case float():
            return int(_A.FLOAT)
        case str() | bytes():
            return int(_A.STRING)
        case Payload():
            return int(_A.TENSOR)
        case TensorType() | OpaqueType():
            return int(_A.TYPE_PROTO)
        case Atom() if value.kind in (TYPE, SPARSE):
            return int(_A.TYPE_PROTO if value.kind == TYPE else _A.SPARSE_TENSOR)
    raise StructureError(f"{where}: attribute '{name}' = {value!r} has no ONNX attribute type")


def _to_proto(kind: int, value: Attr, where: str) -> Any:
    if kind == _A.STRING:
        return value.encode() if isinstance(value, str) else value
    if kind == _A.TENSOR:
        return tensor_proto("", value)
    if kind == _A.SPARSE_TENSOR:
        return from_text(value.text, onnx.SparseTensorProto())
    if kind == _A.TYPE_PROTO:
        if isinstance(value, Atom):
            return from_text(value.text, onnx.TypeProto())
        return type_to_onnx(value, where)
    return float(value) if kind == _A.FLOAT else int(value)
