"""The families of kernels, and every claim that they make."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from fnmatch import fnmatchcase

from qcompiler.backends.triton.claims import Claim

FAMILIES = ("weight_only", "quantizing", "scaled", "embedding", "kv_cache", "grouped")
"""Modules of this folder; each has ``claims(sm)``, and registers its operators when it is imported."""


def claims(sm: int, rows: str = "*", families: tuple[str, ...] = FAMILIES) -> Iterator[Claim]:
    """What the kernels claim for compute capability ``sm``; ``rows`` is a glob over names of rows."""
    for name in families:
        module = importlib.import_module(f"qcompiler.backends.triton.{name}")
        for claim in module.claims(sm):
            if fnmatchcase(claim.row, rows):
                yield claim
