"""Where a node comes from: its module, and where the user wrote it, one short ``file.py:line`` out of a stack trace."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import fx

from qcompiler.backends.torch.emit import CUSTOM
from qcompiler.ir import Loc

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_SLASH = re.compile(r"[/\\]")
_TORCH = str(Path(torch.__file__).parent)
_INSTALLED = re.compile(r"[/\\](?:site|dist)-packages[/\\]torch[/\\]")  # a trace may come from another machine


def source_line(trace: str) -> str:
    """``file.py:line`` of the innermost frame of ``trace`` outside torch, else inside torch.nn; empty without one."""
    frames = _FRAME.findall(trace or "")
    outside = [f for f in frames if not f[0].startswith(_TORCH) and not _INSTALLED.search(f[0])]
    chosen = outside or [f for f in frames if re.search(r"[/\\]nn[/\\]", f[0])]
    if not chosen:
        return ""
    path, line = chosen[-1]
    return f"{_SLASH.split(path)[-1]}:{line}"


def loc_of(node: fx.Node, taken: set[str]) -> Loc:
    """The name of ``node``, the qualified name of the module that was called, and the line that called it.

    What the metadata says of a program that was written here goes first; the names it gave are added to ``taken``.
    """
    stack = node.meta.get("nn_module_stack") or {}
    scope = next((str(path) for path, _ in reversed(list(stack.values()))), "")
    if scope.startswith("_empty_nn_module_stack"):
        scope = ""
    # The second call of one module is told apart as `path@1`.
    source = source_line(node.meta.get("stack_trace") or "")
    name = node.name
    written = (node.meta.get("custom") or {}).get(CUSTOM)
    # An export adds nodes of its own behind a node, with the same metadata: the first is the one that was named.
    if isinstance(written, (list, tuple)) and len(written) == 2 and all(isinstance(w, str) for w in written):
        if written[0] not in taken:
            name, source = written
            taken.add(name)
    return Loc(name, re.sub(r"@\d+", "", scope), source)
