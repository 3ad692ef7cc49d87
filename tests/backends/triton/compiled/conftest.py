"""Kernels compiled ahead of time: collected only by a process of their own, ``make triton-compiled``."""

from __future__ import annotations

import os

import torch  # noqa: F401  # first: its import registers the operators of every family

collect_ignore_glob: list[str] = []

if os.environ.get("QCOMPILER_TRITON") != "compiled":
    collect_ignore_glob.append("test_*.py")
elif os.environ.get("TRITON_INTERPRET", "0") != "0":
    raise RuntimeError("QCOMPILER_TRITON=compiled asks that TRITON_INTERPRET is not set")
