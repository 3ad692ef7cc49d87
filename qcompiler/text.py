"""Print a graph as text and read it back: one grammar, ``show(parse(show(g))) == show(g)``.

::

    graph @main dialect=onnx {
      input %x : f32[batch, 128]
      const %w : f32[128, 256] = rand:7
      %y : f32[batch, 256] = onnx.MatMul(%x, %w) {attr = 1} loc("node name", "module.path", "file.py:3")
      return %y
    }

A constant is ``dense(...)`` when it is small and in memory, else a reference (``file:``, ``rand:``, ``data:``); only
``rand:`` references can be read again, the others print the same but hold no values. Attribute values: ``1``, ``1.0``,
``"text"``, ``true``, ``none``, ``hex"00ff"``, ``[a, b]``, ``<int4 g128 asym>`` (scheme), ``dtype"f32"``,
``type(f32[2])``, ``tensor(f32[2], dense(...))``, ``$0`` (hole), ``kind"text"`` (atom).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from qcompiler.dtypes import DType
from qcompiler.ir import Atom, Attr, Dim, Graph, Hole, Loc, Op, OpaqueType, TensorType, Type, Value
from qcompiler.payload import ArrayPayload, BytesPayload, Payload
from qcompiler.scheme import Scheme

DENSE_LIMIT = 16
_BARE_NAME = re.compile(r"[A-Za-z0-9_./$~+\-]+\Z")
_BARE_WORD = re.compile(r"[A-Za-z_][\w.]*\Z")
_BARE_DIM = re.compile(r"[A-Za-z_]\w*\Z")
RESERVED_ATOMS = frozenset({"hex", "dtype"})


def quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def show_name(name: str) -> str:
    return "%" + (name if _BARE_NAME.match(name) else quote(name))


def show_dim(dim: Dim) -> str:
    if dim is None:
        return "?"
    if isinstance(dim, int):
        return str(dim)
    return dim if _BARE_DIM.match(dim) else quote(dim)


def show_type(type: Type) -> str:
    """``f32[batch, 128]``; ``?`` for an unknown dtype, ``[*]`` for an unknown rank, ``opaque"..."`` for host types."""
    if isinstance(type, OpaqueType):
        return f"opaque{quote(type.text)}"
    element = "?" if type.dtype is None else type.dtype.name
    return f"{element}[{'*' if type.shape is None else ', '.join(map(show_dim, type.shape))}]"


def show_float(x: float) -> str:
    if math.isnan(x):
        return "nan"
    if math.isinf(x):
        return "inf" if x > 0 else "-inf"
    return repr(x)


def _number(x: Any, element: DType) -> str:
    if element.kind == "string":
        return quote(x if isinstance(x, str) else bytes(x).decode("latin-1"))
    if element.kind == "bool":
        return "true" if x else "false"
    return show_float(float(x)) if element.is_float else str(int(x))


def show_payload(payload: Payload, *, digest: bool = True) -> str:
    """``dense(...)`` for a small one in memory, else its reference, else a digest of its bytes (which reads them)."""
    if (ref := payload.ref()) is not None:
        return ref if re.fullmatch(r"rand:\d+", ref) else f"@{quote(ref)}"
    printable = payload.dtype.kind != "complex" and payload.size <= DENSE_LIMIT
    if printable and isinstance(payload, (ArrayPayload, BytesPayload)):
        flat = payload.array().reshape(-1)
        return f"dense({', '.join(_number(x, payload.dtype) for x in flat)})"
    if not digest:
        return f"@{quote('memory')}"
    sha = hashlib.sha256()
    if payload.dtype.kind == "string":
        sha.update(repr(payload.array().tolist()).encode())
    else:
        for piece in payload.chunks():
            sha.update(piece)
    return f"@{quote('data:' + sha.hexdigest()[:16])}"


def show_attr(value: Attr) -> str:
    """One attribute value in the grammar of this module; TypeError for a type that has no place in it."""
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            return show_float(value)
        case str():
            return quote(value)
        case bytes():
            return f'hex"{value.hex()}"'
        case tuple():
            return f"[{', '.join(map(show_attr, value))}]"
        case Scheme():
            return f"<{value}>"
        case DType():
            return f'dtype"{value}"'
        case TensorType() | OpaqueType():
            return f"type({show_type(value)})"
        case Hole():
            return f"${value.index}"
        case Atom():
            if value.kind in RESERVED_ATOMS:
                raise TypeError(f"{value.kind!r} cannot be an atom's kind")
            return f"{value.kind}{quote(value.text)}"
        case Payload():
            return f"tensor({show_type(TensorType(value.dtype, value.shape))}, {show_payload(value)})"
    raise TypeError(f"{type(value).__name__} {value!r} cannot be an attribute")


def show_word(word: str) -> str:
    return word if _BARE_WORD.match(word) else quote(word)


def show_attrs(attrs: Mapping[str, Attr]) -> str:
    return "{" + ", ".join(f"{show_word(k)} = {show_attr(v)}" for k, v in attrs.items()) + "}"


def _show_loc(loc: Loc) -> str:
    parts = [loc.name, loc.scope, loc.source]
    while parts and not parts[-1]:
        parts.pop()
    return f" loc({', '.join(map(quote, parts))})" if parts else ""


def _typed(value: Value) -> str:
    meta = f" meta {show_attrs(value.meta)}" if value.meta else ""
    return f"{show_name(value.name)} : {show_type(value.type)}{meta}"


def show_op(op: Op, *, locs: bool = True) -> str:
    """One op on one line, without what its regions hold."""
    outs = ", ".join(map(_typed, op.results))
    args = ", ".join("none" if v is None else show_name(v.name) for v in op.operands)
    attrs = f" {show_attrs(op.attrs)}" if op.attrs else ""
    meta = f" meta {show_attrs(op.meta)}" if op.meta else ""
    loc = _show_loc(op.loc) if locs else ""
    return f"{outs}{' = ' if outs else ''}{show_word(op.name)}({args}){attrs}{meta}{loc}"


def _lines(graph: Graph, indent: str, locs: bool, digests: bool) -> Iterator[str]:
    inner = indent + "  "
    for v in graph.inputs:
        default = "" if v.payload is None else f" = {show_payload(v.payload, digest=digests)}"
        yield f"{inner}input {_typed(v)}{default}"
    for v in graph.consts.values():
        assert v.payload is not None
        yield f"{inner}const {_typed(v)} = {show_payload(v.payload, digest=digests)}"
    for op in graph:
        line = inner + show_op(op, locs=locs)
        if not op.regions:
            yield line
            continue
        yield f"{line} regions {{"
        for key, region in op.regions.items():
            yield f"{inner}  {show_word(key)} = {_header(region)} {{"
            yield from _lines(region, inner + "  ", locs, digests)
            yield inner + "  }"
        yield inner + "}"
    yield f"{inner}return{' ' if graph.outputs else ''}{', '.join(show_name(v.name) for v in graph.outputs)}"


def _header(graph: Graph) -> str:
    meta = f" meta {show_attrs(graph.meta)}" if graph.meta else ""
    return f"graph @{show_word(graph.name)} dialect={show_word(graph.dialect)}{meta}"


def show(graph: Graph, *, locs: bool = True, digests: bool = True) -> str:
    """The whole graph as text. ``locs=False`` leaves out where ops came from; ``digests=False`` reads no constant."""
    return "\n".join([_header(graph) + " {", *_lines(graph, "", locs, digests), "}"]) + "\n"
