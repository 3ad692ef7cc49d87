"""The Python standard library's own sources as a text corpus, split by module into training and held-out."""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path

__all__ = ["HELDOUT_MODULES", "heldout_rule", "heldout_texts", "module_sources", "training_texts"]

HELDOUT_MODULES = (
    "asyncio.base_subprocess",
    "asyncio.staggered",
    "email.generator",
    "http.client",
    "multiprocessing.pool",
    "multiprocessing.sharedctypes",
    "socketserver",
    "ssl",
    "symtable",
    "xmlrpc.client",
)
"""The held-out modules, never trained on: those :func:`heldout_rule` picks in Python 3.11.

Each exists in 3.12 and 3.13 too. The list is fixed so that the split is the same under every version, although
a later one has modules that the rule would add; the text of a module differs a little between versions.
"""

_SKIPPED_PARTS = frozenset(
    {
        "__phello__",
        "__pycache__",
        "dist-packages",
        "encodings",  # generated character tables
        "idle_test",
        "lib-dynload",
        "pydoc_data",  # the manual as one generated string
        "site-packages",
        "test",
        "tests",
    }
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize")
_SMALLEST_HELDOUT = 4096


def heldout_rule(name: str, size: int) -> bool:
    """Say whether the rule behind :data:`HELDOUT_MODULES` picks module ``name`` of ``size`` source bytes.

    The rule is ``crc32(name) % 16 == 13`` for modules of at least 4096 bytes outside tkinter, idlelib,
    turtledemo, lib2to3, distutils and ensurepip, which some installations leave out. Of the sixteen
    remainders, 13 is one where every module is in 3.11, 3.12 and 3.13 and none has a near copy elsewhere.
    """
    optional = {"tkinter", "idlelib", "turtledemo", "lib2to3", "distutils", "ensurepip"}
    if size < _SMALLEST_HELDOUT or name.partition(".")[0] in optional:
        return False
    return zlib.crc32(name.encode()) % 16 == 13


def module_sources(root: str | Path | None = None) -> dict[str, Path]:
    """Map module names to source files under ``root``, by default the running Python's standard library.

    Tests, installed packages, generated tables and build records are left out; the order is by name.
    """
    top = Path(root if root is not None else sysconfig.get_paths()["stdlib"])
    found: dict[str, Path] = {}
    for path in top.rglob("*.py"):
        parts = path.relative_to(top).with_suffix("").parts
        if _SKIPPED_PARTS.intersection(parts) or any(part.startswith(_SKIPPED_PREFIXES) for part in parts):
            continue
        names = parts[:-1] if parts[-1] == "__init__" else parts
        if names:
            found[".".join(names)] = path
    return dict(sorted(found.items()))


def _read(path: Path) -> str:
    """Return a source file's text with plain line breaks; a stray byte that is not UTF-8 is replaced."""
    return path.read_text(encoding="utf-8", errors="replace")


def heldout_texts(root: str | Path | None = None) -> dict[str, str]:
    """Return the source text of each held-out module found under ``root``, by module name."""
    sources = module_sources(root)
    return {name: _read(sources[name]) for name in HELDOUT_MODULES if name in sources}


def training_texts(root: str | Path | None = None) -> dict[str, str]:
    """Return the source text of each module that is not held out, by module name; empty files are left out."""
    texts = {name: _read(path) for name, path in module_sources(root).items() if name not in HELDOUT_MODULES}
    return {name: text for name, text in texts.items() if text.strip()}
