"""How the command line reads sizes, phases and settings. Everything here raises InputError with one sentence."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qcompiler.errors import InputError

if TYPE_CHECKING:
    from qcompiler.target import Phase

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)", re.IGNORECASE)
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def parse_size(text: str) -> int:
    """``12GiB``, ``12G`` and ``12288M`` are powers of 1024, ``12GB`` is a power of 1000, a bare number is bytes."""
    m = _SIZE.fullmatch(text.strip())
    if m is None or m[3].lower() == "i" or (m[3].lower() == "ib" and not m[2]):
        raise InputError(f"--max-ram takes a size such as 12GiB, 800M or 4GB, not {text!r}")
    base = 1000 if m[2] and m[3].lower() == "b" else 1024
    size = int(float(m[1]) * base ** " kmgt".index(m[2].lower() or " "))
    if size < 1:
        raise InputError(f"--max-ram is {text!r}; it must be more than nothing")
    return size


def parse_phases(texts: Sequence[str]) -> tuple[Phase, ...] | None:
    """``decode=1``, ``prefill=512``: name and number of rows; None when there is none."""
    from qcompiler.target import Phase

    out: dict[str, Phase] = {}
    for text in texts:
        m = re.fullmatch(r"([A-Za-z]\w*)=(\d{1,9})", text)
        if m is None or int(m[2]) < 1:
            raise InputError(f"--phase takes name=M with M of at least 1, such as decode=1, not {text!r}")
        if m[1] in out:
            raise InputError(f"--phase {m[1]} is given twice; give each phase once, under its own name")
        out[m[1]] = Phase(m[1], int(m[2]))
    return tuple(out.values()) or None


def parse_settings(texts: Sequence[str]) -> dict[str, str]:
    """``pass.key=value`` each, as a mapping from ``pass.key`` to the text of the value."""
    out: dict[str, str] = {}
    for text in texts:
        m = re.fullmatch(r"([\w-]+\.[\w-]+)=(.*)", text, re.DOTALL)
        if m is None:
            raise InputError(f"--set takes pass.key=value, such as insert-qdq.weights='int8 channel sym', not {text!r}")
        if m[1] in out:
            raise InputError(f"--set {m[1]} is given twice; give it once")
        out[m[1]] = m[2].strip("'\"") if re.fullmatch(r"'[^']*'|\"[^\"]*\"", m[2]) else m[2]
    return out


def check_out(out: Path, source: str) -> None:
    """Refuse an output that could only fail, or would replace the source, before any work is done."""
    if not out.parent.is_dir():
        raise InputError(f"the folder {out.parent} does not exist; create it or choose another output")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"the folder {out.parent} cannot be written; choose another output")
    if out.exists() and Path(source).exists() and out.samefile(source):
        raise InputError(f"the output {out} is the source itself; choose another output")


def see_local_modules(texts: Iterable[str | None]) -> None:
    """Let ``module:function`` mean a module of the current folder, as ``python -m`` does."""
    here = os.getcwd()
    if here not in sys.path and any(t is not None and _FUNCTION.fullmatch(t) for t in texts):
        sys.path.insert(0, here)
