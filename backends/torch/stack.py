"""Where the user wrote it: one short ``file.py:line`` out of a stack trace in text."""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def source_line(trace: str) -> str:
    """``file.py:line`` of the innermost frame of ``trace`` outside torch, else inside torch.nn; empty without one."""
    frames = [(_parts(path), line) for path, line in _FRAME.findall(trace or "")]
    outside = [f for f in frames if "torch" not in f[0][:-1]]
    chosen = outside or [f for f in frames if "modules" in f[0][:-1]]
    return f"{chosen[-1][0][-1]}:{chosen[-1][1]}" if chosen else ""


def _parts(path: str) -> tuple[str, ...]:
    return (PureWindowsPath(path) if "\\" in path else PurePosixPath(path)).parts
