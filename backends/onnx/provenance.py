"""Where an ONNX node came from: its module path and source line, as exporters leave them in names and metadata.

Three spellings are read: our own ``qcompiler.scope`` and ``qcompiler.source``; the metadata of torch's exporter
(``pkg.torch.onnx.name_scopes``: module paths from the root inwards, then the name of the traced node;
``namespace``: the same with classes; ``pkg.torch.onnx.stack_trace``); and node names like
``/layers.0/q_proj/MatMul`` of torch's older exporter.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

import onnx

from qcompiler.backends.onnx.typemap import text
from qcompiler.ir import Attr, Loc

SCOPE, SOURCE = "qcompiler.scope", "qcompiler.source"
_FRAME = re.compile(r'File "([^"\n]+)", line (\d+)')
_TORCH_FRAME = re.compile(r"[/\\]torch[/\\](nn|_|fx|utils|autograd|functional|export)")
_SEPARATOR = re.compile(r"[/\\]")
_LEGACY = re.compile(r"/(.+)/([A-Za-z]\w*?)(_\d+)?\Z")


def location(name: str, op_type: str, metadata: Mapping[str, str]) -> Loc:
    """The location of a node; parts that nothing tells are empty."""
    scope = metadata.get(SCOPE)
    if scope is None:
        scope = _scope(metadata)
    if scope is None:
        scope = _scope_of_name(name, op_type)
    source = metadata.get(SOURCE)
    if source is None:
        source = _source(metadata.get("pkg.torch.onnx.stack_trace", ""))
    return Loc(name, scope, source)


def _scope(metadata: Mapping[str, str]) -> str | None:
    found = metadata.get("pkg.torch.onnx.name_scopes")
    if found is not None:
        try:
            scopes = ast.literal_eval(found)
        except (ValueError, SyntaxError):
            scopes = None
        if isinstance(scopes, list) and all(isinstance(s, str) for s in scopes):
            return scopes[-2] if len(scopes) > 1 else ""
    found = metadata.get("namespace")
    if found is not None and ": " in found:
        parts = [p.rpartition(": ")[0] for p in found.split("/")]
        return parts[-2] if len(parts) > 1 else ""
    return None


def _scope_of_name(name: str, op_type: str) -> str:
    m = _LEGACY.match(name)
    return m[1].replace("/", ".") if m is not None and m[2] == op_type else ""


def _source(trace: str) -> str:
    """``file.py:line`` of the innermost frame that is not torch's own."""
    frames = _FRAME.findall(trace)
    own = [f for f in frames if not _TORCH_FRAME.search(f[0])] or frames
    if not own:
        return ""
    path, line = own[-1]
    return f"{_SEPARATOR.split(path)[-1]}:{line}"


def extra_metadata(loc: Loc, op_type: str, metadata: Mapping[str, str]) -> dict[str, str]:
    """What must be added to ``metadata`` so that :func:`location` finds ``loc`` again."""
    found = location(loc.name, op_type, metadata)
    extra = {SCOPE: loc.scope} if loc.scope != found.scope else {}
    if loc.source != found.source:
        extra[SOURCE] = loc.source
    return extra


def pairs(entries: Any) -> tuple[tuple[str, str], ...]:
    """A metadata_props field as pairs."""
    return tuple((text(e.key), text(e.value)) for e in entries)


def put_pairs(entries: Any, found: Attr) -> None:
    """Inverse of :func:`pairs`."""
    for key, value in found or ():
        entries.add(key=key, value=value)


def as_dict(found: Attr) -> Mapping[str, str]:
    """Pairs as a mapping; the last of a repeated key counts."""
    return dict(found or ())


def notes_of(proto: Any) -> dict[str, Attr]:
    """The doc string and metadata of any message that has them."""
    meta: dict[str, Attr] = {}
    if proto.doc_string:
        meta["doc_string"] = text(proto.doc_string)
    if proto.metadata_props:
        meta["metadata_props"] = pairs(proto.metadata_props)
    return meta


def put_notes(proto: Any, meta: Mapping[str, Attr]) -> None:
    """Inverse of :func:`notes_of`."""
    if "doc_string" in meta:
        proto.doc_string = meta["doc_string"]
    put_pairs(proto.metadata_props, meta.get("metadata_props"))


def node_notes(node: onnx.NodeProto) -> dict[str, Attr]:
    """What a node has besides its operator, wires and attributes."""
    meta = notes_of(node)
    if "." in node.op_type:
        meta["op_type"] = text(node.op_type)  # where it begins in the name of the op
    if node.overload:
        meta["overload"] = text(node.overload)
    if found := getattr(node, "device_configurations", ()):
        meta["device_configurations"] = tuple(c.SerializeToString() for c in found)
    return meta
