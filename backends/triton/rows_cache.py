"""Kernels that a model calls by their operators, as rows: the quantized KV cache, and the experts of a mixture.

No graph is rewritten into them: a cache is part of how a decoder is run, and experts are sorted by its router. Each row
names its operator in ``op``; ``qcompiler.backends.triton.kv_cache`` has a cache of a layer that calls them.
"""

from __future__ import annotations

from typing import Any

from qcompiler.backends.triton.forms import FORMS, Form
from qcompiler.backends.triton.rows import AMPERE, FLOATS, FUNCTIONS, proved, row_name, takes
from qcompiler.target import KernelRow

_KV = "qcompiler.backends.triton.kv_cache:"
_CACHE: dict[str, Any] = {
    "codes": frozenset({"int8", "f8e4m3", "uint4"}),
    "granularities": frozenset({"token"}),
    "groups": frozenset[int](),
    "zeros": frozenset({"none", "int"}),
    "activations": FLOATS,
    "layout": "",
    "needs": AMPERE,
    "evidence": proved("test_kv_cache.py"),
    "bias": False,
    "dynamic": True,
}

CACHE: tuple[KernelRow, ...] = (
    KernelRow(
        row_name("kv.write"),
        "qcompiler::kv_write",
        **_CACHE,
        entry=f"{_KV}write_cuda",
        numerics="a scale a token and head: max|x| / 127 (int8) or / 448 (e4m3); (max - min) / 15 and a zero (uint4)",
        note="called by its operator; heads of 32 to 256 features, a multiple of 16",
    ),
    KernelRow(
        row_name("kv.attention"),
        "qcompiler::kv_attention",
        **_CACHE,
        entry=f"{_KV}attention_cuda",
        numerics="codes are exact in 16 bits; products, softmax and sums in f32, rounded once",
        note="called by its operator; one query a sequence, query heads a multiple of the cache's",
    ),
)


def _experts(form: Form) -> KernelRow:
    return KernelRow(
        row_name(f"grouped.{form.name}"),
        "qcompiler::wn_grouped",
        **takes(form),
        activations=FLOATS,
        entry="qcompiler.backends.triton.grouped:grouped_cuda",
        layout="qcompiler.backends.triton.layouts:pack_codes",
        numerics="as wn.gemm: codes exact in 16 bits, products summed in f32, rounded once",
        evidence=proved("test_grouped.py"),
        needs=AMPERE,
        epilogues=FUNCTIONS | {"bias"},
        note="called by its operator; rows sorted by expert, an axis of experts before each tensor of the weight",
    )


EXPERTS: tuple[KernelRow, ...] = tuple(map(_experts, FORMS.values()))
