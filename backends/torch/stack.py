"""Where the user wrote it: one short ``file.py:line`` out of a stack trace in text."""

from __future__ import annotations

import re
from pathlib import Path

import torch

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
