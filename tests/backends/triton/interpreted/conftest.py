"""Kernels in Triton's interpreter: collected only by a process of their own, ``make triton-interpreted``."""

from __future__ import annotations

import os

import torch  # noqa: F401  # first: its import registers the operators of every family

collect_ignore_glob: list[str] = []

if os.environ.get("QCOMPILER_TRITON") != "interpreted":
    collect_ignore_glob.append("test_*.py")
else:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "QCOMPILER_TRITON=interpreted asks for TRITON_INTERPRET=1, which triton reads when it is imported"
        )
    from tests.backends.triton.interpreted import shim

    shim.apply()
