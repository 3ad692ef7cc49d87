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

from qcompiler.ir import Loc

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
    text = metadata.get("pkg.torch.onnx.name_scopes")
    if text is not None:
        try:
            scopes = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            scopes = None
        if isinstance(scopes, list) and all(isinstance(s, str) for s in scopes):
            return scopes[-2] if len(scopes) > 1 else ""
    text = metadata.get("namespace")
    if text is not None and ": " in text:
        parts = [p.rpartition(": ")[0] for p in text.split("/")]
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
