"""Kernels that compute on codes of activations (W8A8, FP8, W4A8), as rows; and those that make the codes.

Activations have one scale a token, chosen at run time (``dynamic``), or one constant scale; they have no zero points,
since int32 sums would need a sum of each weight row beside them. One kernel serves every M: weights are read once for
each tile of 16 to 256 rows.

FP8 products need the 8-bit float units of compute capability 8.9. On older GPUs FP8 weights have weight-only kernels.
"""

from __future__ import annotations

from typing import Any

from qcompiler.backends.triton.rows import AMPERE, BEHIND, EPILOGUES, FLOATS, proved, row_name
from qcompiler.requests import BATCHED, SHARED
from qcompiler.target import KernelRow

ENTRY = "qcompiler.backends.triton.lower_codes:"
_ATEN = "qcompiler.backends.torch.lower_integer:"
ADA = frozenset({"cuda", "sm_89"})
_F8 = frozenset({"f8e4m3", "f8e5m2"})
_PLAIN = {"granularities": frozenset({"tensor", "channel"}), "groups": frozenset[int](), "zeros": frozenset({"none"})}
_BLOCKS = {"granularities": frozenset({"block"}), "blocks": frozenset({(128, 128)})}
_WIDE = {
    "granularities": frozenset({"channel", "group"}),
    "groups": frozenset({128, 256, 512, 1024}),
    "zeros": frozenset({"none", "int"}),
}
_EXACT = "int8 products summed in int32, exact; scaled, biased and rounded once from f32"
_F32 = "8-bit float products summed in f32; scaled, biased and rounded once"


def _product(name: str, op: str, codes: frozenset[str], x: frozenset[str], **more: Any) -> KernelRow:
    """A row of a product of codes; ``x`` are the code types of the activation."""
    dynamic = op == "q.linear_dyn"
    fields: dict[str, Any] = {
        "granularities": frozenset(),
        "groups": frozenset(),
        "zeros": frozenset({"none"}),
        "activations": FLOATS,
        "entry": f"{ENTRY}{'linear_dyn' if dynamic else 'linear_static'}",
        "layout": "",
        "evidence": proved("test_scaled.py"),
        "x_codes": x,
        "x_zeros": frozenset({"none"}),
        "x_granularities": frozenset({"token" if dynamic else "tensor"}),
        "y_codes": frozenset() if dynamic else frozenset({"float"}),
        "dynamic": dynamic,
        "traits": frozenset({BATCHED, SHARED} if dynamic else {BATCHED}),
        "epilogues": EPILOGUES,
        "behind": BEHIND,
    }
    return KernelRow(row_name(name), op, codes=codes, **(fields | more))


def _both(name: str, codes: frozenset[str], x: frozenset[str], **more: Any) -> tuple[KernelRow, KernelRow]:
    """The rows of a kernel for activations quantized at run time, and by a constant scale."""
    return _product(name, "q.linear_dyn", codes, x, **more), _product(name, "q.linear_static", codes, x, **more)


_LAID = {"layout": "qcompiler.backends.triton.layouts:pack_codes"}
_INT8, _INT4 = frozenset({"int8"}), frozenset({"int4", "uint4"})

PRODUCTS: tuple[KernelRow, ...] = (
    *_both("a8.gemm.int8", _INT8, _INT8, **_PLAIN, needs=AMPERE, numerics=_EXACT),
    *_both("a8.gemm.f8", _F8, _F8, **_PLAIN, needs=ADA, numerics=_F32),
    _product(
        "a8.gemm.f8",
        "q.linear_dyn",
        _F8,
        _F8,
        **_BLOCKS,
        needs=ADA,
        numerics=f"{_F32}; scaled after each 128 columns",
        x_granularities=frozenset({"block"}),
        x_blocks=frozenset({(1, 128)}),
    ),
    *_both("a8.gemm.w4", _INT4, _INT8, **_WIDE, **_LAID, needs=AMPERE, numerics=f"{_EXACT} after each group"),
    *_both(
        "a8.gemm.w4", _INT4, frozenset({"f8e4m3"}), **_WIDE, **_LAID, needs=ADA, numerics=f"{_F32} after each group"
    ),
)


def _edge(op: str, name: str, entry: str, codes: frozenset[str], numerics: str, **more: Any) -> KernelRow:
    """Where floats become codes and codes floats, and the rescale between floats."""
    fields: dict[str, Any] = {"evidence": proved("test_quantizing.py"), "needs": AMPERE}
    return KernelRow(
        row_name(name),
        op,
        codes=codes,
        granularities=frozenset({"tensor"}),
        groups=frozenset(),
        zeros=frozenset({"none"}),
        activations=FLOATS,
        entry=entry,
        layout="",
        bias=False,
        numerics=numerics,
        **(fields | more),
    )


_DIVIDED = "divided in f32, rounded to even, saturated"
_RAN = {"evidence": "tests/backends/torch/test_kernels_integer.py ran these aten calls", "needs": frozenset({"cuda"})}
EDGES: tuple[KernelRow, ...] = (
    _edge("q.quantize", "quantize", f"{ENTRY}quantize", _INT8, _DIVIDED),
    _edge("q.quantize", "quantize", f"{ENTRY}quantize", _F8, _DIVIDED, needs=ADA),
    _edge("q.dequantize", "dequantize", f"{_ATEN}dequantize", _INT8 | _F8, "code * scale in f32", **_RAN),
    _edge("q.scale", "mul", f"{_ATEN}scale", _INT8, "one rounding a product", **_RAN),
)
