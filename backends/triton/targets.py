"""The target ``torch-cuda``: all rows of the Triton kernels, and what an architecture has. No torch, no triton."""

from __future__ import annotations

from qcompiler.backends.triton.rows import ABSENT, LEAST_SM, NAME, TABLES, WEIGHT_ONLY, sm_features
from qcompiler.backends.triton.rows_cache import CACHE, EXPERTS
from qcompiler.backends.triton.rows_codes import EDGES, PRODUCTS
from qcompiler.target import Target

ROWS = (*WEIGHT_ONLY, *TABLES, *PRODUCTS, *EDGES, *CACHE, *EXPERTS)


def cuda_target(arch: str) -> Target:
    """``sm_90`` and such; without a word what every supported GPU has, which is that of compute capability 8.0."""
    sm = int(arch.removeprefix("sm_")) if arch else LEAST_SM
    return Target(NAME, arch, sm_features(sm), ROWS, "aten", ABSENT)
