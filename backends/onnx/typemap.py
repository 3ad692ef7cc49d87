"""ONNX element types and TypeProto against the IR's types, exactly both ways."""

from __future__ import annotations

from typing import Any, TypeVar

import onnx
from google.protobuf import text_format  # type: ignore[import-untyped]

from qcompiler import dtypes
from qcompiler.dtypes import DType
from qcompiler.errors import InputError, StructureError
from qcompiler.ir import UNKNOWN, Dim, OpaqueType, TensorType, Type

_P = onnx.TensorProto
_M = TypeVar("_M")
DEFAULT_DOMAINS = ("", "ai.onnx")
"""The two names of the domain of ONNX's own operators."""
_NAMES = {
    "FLOAT": "f32",
    "UINT8": "uint8",
    "INT8": "int8",
    "UINT16": "uint16",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "STRING": "string",
    "BOOL": "bool",
    "FLOAT16": "f16",
    "DOUBLE": "f64",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "COMPLEX64": "c64",
    "COMPLEX128": "c128",
    "BFLOAT16": "bf16",
    "FLOAT8E4M3FN": "f8e4m3",
    "FLOAT8E4M3FNUZ": "f8e4m3fnuz",
    "FLOAT8E5M2": "f8e5m2",
    "FLOAT8E5M2FNUZ": "f8e5m2fnuz",
    "UINT4": "uint4",
    "INT4": "int4",
    "FLOAT4E2M1": "f4e2m1",
    "FLOAT8E8M0": "f8e8m0",
    "UINT2": "uint2",
    "INT2": "int2",
}
# An older onnx package lacks the newest types.
_FROM_ONNX: dict[int, DType] = {
    int(_P.DataType.Value(k)): dtypes.dtype(v) for k, v in _NAMES.items() if k in dict(_P.DataType.items())
}
_TO_ONNX: dict[str, int] = {element.name: code for code, element in _FROM_ONNX.items()}
# The IR version of ONNX that introduced an element type; types not named here are older than any file.
SINCE_IR = {
    **dict.fromkeys(("f8e4m3", "f8e4m3fnuz", "f8e5m2", "f8e5m2fnuz"), 9),
    **dict.fromkeys(("int4", "uint4"), 10),
    "f4e2m1": 11,
    "f8e8m0": 12,
    **dict.fromkeys(("int2", "uint2"), 13),
}


def text(value: str | bytes) -> str:
    """A string field, which protobuf hands out as bytes when it is no UTF-8; raises UnicodeDecodeError then."""
    return value if isinstance(value, str) else value.decode()


def to_text(message: Any) -> str:
    """A protobuf message as one line of its text format."""
    return str(text_format.MessageToString(message, as_one_line=True))


def from_text(text: str, message: _M) -> _M:
    """Inverse of :func:`to_text`, into an empty ``message``; raises StructureError."""
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as e:
        raise StructureError(f"{text!r} is no {type(message).__name__}: {e}") from None
    return message


def dtype_from_onnx(code: int, where: str) -> DType:
    """The element type of TensorProto.DataType ``code``; raises InputError that says ``where``."""
    found = _FROM_ONNX.get(code)
    if found is None:
        known = {v: k for k, v in _P.DataType.items()}
        raise InputError(f"{where} has the element type {known.get(code, code)}, which qcompiler does not know")
    return found


def dtype_to_onnx(element: DType, where: str) -> int:
    """The TensorProto.DataType of ``element``; raises StructureError for one that ONNX lacks (nf4)."""
    found = _TO_ONNX.get(element.name)
    if found is None:
        raise StructureError(f"{where} has the type {element}, which ONNX cannot express; lower it first")
    return found


def _dim_from_onnx(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return text(dim.dim_param) or None


def type_from_onnx(proto: onnx.TypeProto) -> Type:
    """The IR type; sequences, maps, optionals, sparse tensors and element types unknown here become OpaqueType."""
    kind = proto.WhichOneof("value")
    if kind is None:
        return UNKNOWN
    tensor = proto.tensor_type
    if kind != "tensor_type" or (tensor.elem_type and tensor.elem_type not in _FROM_ONNX):
        return OpaqueType(to_text(proto))
    shape = tuple(_dim_from_onnx(d) for d in tensor.shape.dim) if tensor.HasField("shape") else None
    return TensorType(_FROM_ONNX.get(tensor.elem_type), shape)


def type_to_onnx(type: Type, where: str) -> onnx.TypeProto:
    """Inverse of :func:`type_from_onnx`; an unknown type is an empty TypeProto."""
    proto = onnx.TypeProto()
    if isinstance(type, OpaqueType):
        return from_text(type.text, proto)
    if type.dtype is None and type.shape is None:
        return proto
    tensor = proto.tensor_type
    tensor.elem_type = 0 if type.dtype is None else dtype_to_onnx(type.dtype, where)
    if type.shape is not None:
        tensor.shape.SetInParent()
        for size in type.shape:
            dim = tensor.shape.dim.add()
            if isinstance(size, int):
                dim.dim_value = size
            elif size is not None:
                dim.dim_param = size
    return proto


def sane(type: Type) -> Type:
    """``type`` with negative sizes, which some exporters write for unknown ones, as None."""
    if isinstance(type, TensorType) and type.shape is not None:
        return TensorType(type.dtype, tuple(None if isinstance(d, int) and d < 0 else d for d in type.shape))
    return type


def agrees(declared: Type, actual: Type) -> bool:
    """True when ``actual`` refines ``declared``: nothing that both state differs."""
    if not isinstance(declared, TensorType) or not isinstance(actual, TensorType):
        return declared in (actual, UNKNOWN)
    if declared.dtype is not None and declared.dtype != actual.dtype:
        return False
    if declared.shape is None:
        return True
    if actual.shape is None or len(actual.shape) != len(declared.shape):
        return False
    return all(not isinstance(d, int) or d < 0 or d == a for d, a in zip(declared.shape, actual.shape, strict=True))


def merged(declared: Type, inferred: Type) -> Type:
    """``declared`` with what it leaves open filled from ``inferred``, where the two agree."""
    if not isinstance(declared, TensorType) or not isinstance(inferred, TensorType):
        return inferred if declared == UNKNOWN else declared
    element = declared.dtype or inferred.dtype
    if declared.dtype not in (None, inferred.dtype):
        return declared
    if declared.shape is None or inferred.shape is None or len(declared.shape) != len(inferred.shape):
        return TensorType(element, declared.shape if declared.shape is not None else inferred.shape)
    shape = tuple(i if d is None else d for d, i in zip(declared.shape, inferred.shape, strict=True))
    return TensorType(element, shape)
