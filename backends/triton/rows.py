"""The Triton kernels as rows: which weights, activations, M and architectures each serves. Data: no torch, no triton.

A weight-only product has one operator and two kernels. Up to :data:`DECODE_ROWS` rows of the activation reach
``wn.gemv.*``, which splits K over blocks; more reach ``wn.gemm.*``. Both read one layout, so the choice is made by M at
run time. Rows of kernels that compute on codes stand in :mod:`qcompiler.backends.triton.rows_codes`, those of KV caches
and experts in :mod:`qcompiler.backends.triton.rows_cache`.

What has no row, and why:
  - compute capability under 8.0: its tensor cores take neither bf16 nor asynchronous copies, and Triton leaves them
    idle.
  - convolutions, and products of two activations in codes: they stay in float.
  - groups of 16 but for ``nvfp4``: a tensor-core step along K is 16 long, and a scale each would cost more than the
    product.
"""

from __future__ import annotations

from typing import Any

from qcompiler.backends.chips import SM
from qcompiler.backends.triton.forms import FORMS, Form
from qcompiler.target import KernelRow, Reason

NAME = "torch-cuda"
DECODE_ROWS = 16
"""Rows of an activation up to which the kernel for decoding runs: the M of one tensor-core step."""
LEAST_SM = 80

ENTRY = "qcompiler.backends.triton.lower:"
FLOATS = frozenset({"f32", "f16", "bf16"})
AMPERE = frozenset({"cuda", "sm_80"})
FUNCTIONS = frozenset({"relu", "silu", "gelu", "gelu_tanh"})
EPILOGUES = FUNCTIONS | {"bias", "mul", "residual"}
BEHIND = "qcompiler.backends.triton.epilogues:absorb"
WIDE_GROUPS = frozenset({32, 64, 128, 256, 512, 1024})
_LAYOUT = "qcompiler.backends.triton.layouts:pack_codes"


def proved(tests: str) -> str:
    """What stands behind a row: its numbers, and what was compiled."""
    return (
        f"tests/backends/triton/interpreted/{tests} ran it against float64; compiled and disassembled for sm_80, "
        "sm_89, sm_90 and sm_100 (qcompiler kernels --prove)"
    )


def sm_features(sm: int) -> frozenset[str]:
    """What a GPU of compute capability ``sm`` (90 for 9.0) offers: that of every lower one too."""
    return frozenset({"cuda", *(f"sm_{s}" for s in SM if s <= sm)})


def row_name(key: str) -> str:
    """The row of the kernel ``key``: ``torch-cuda/wn.gemv.int4``."""
    return f"{NAME}/{key}"


_OWN_SCALES = {"mxfp4": ("f8e8m0", 32), "nvfp4": ("f8e4m3", 16)}
"""Forms of f4e2m1 codes that keep scales in 8 bits: their type and group."""


def takes(form: Form) -> dict[str, Any]:
    """The fields of a row that say which weights come in ``form``."""
    own = _OWN_SCALES.get(form.name)
    if own is not None:
        names = {"codes": "f4e2m1", "granularities": "group", "groups": own[1], "zeros": "none", "scales": own[0]}
        return {key: frozenset({value}) for key, value in names.items()}
    wide = form.kind == "float" and form.bits == 8
    return {
        "codes": frozenset({form.name}),
        "granularities": frozenset({"tensor", "channel", "group"} | ({"block"} if wide else set())),
        "groups": WIDE_GROUPS,
        "zeros": frozenset({"none", "int", "float"} if form.kind == "integer" else {"none"}),
        "scales": frozenset({"float"} | ({"f8e8m0"} if wide else set())),
        "blocks": frozenset({(128, 128)} if wide else set()),
    }


_EXACT = "codes are exact in the activation's f16 or bf16 (f32 ones are rounded to bf16); products are summed in f32"
_GEMV = f"{_EXACT}, where the scale is applied, under groups of 128 before, rounded with the weight to 16 bits"
_GEMM = f"{_EXACT}; weight times scale is rounded to 16 bits"
_OWN = {
    "nf4": "; its 16 values are rounded to that type",
    "mxfp4": "; weight times scale is exact in bf16 for scales of 2^-126 and more, in f16 for 2^-22 to 2^12",
    "nvfp4": "; weight times scale is exact",
}
_ONCE = "the result is rounded once, behind bias, function, factor and summand"


def _weight_only(form: Form) -> tuple[KernelRow, KernelRow]:
    """The two rows of a form: up to :data:`DECODE_ROWS` rows, and above."""
    common: dict[str, Any] = {
        "op": "q.linear",
        **takes(form),
        "activations": FLOATS,
        "entry": f"{ENTRY}linear",
        "layout": _LAYOUT,
        "needs": AMPERE,
        "epilogues": EPILOGUES,
        "behind": BEHIND,
        "evidence": proved(f"test_weight_only{'' if form.kind == 'integer' else '_float'}.py"),
    }
    own = _OWN.get(form.name, "")
    gemv, gemm = (row_name(f"wn.{kind}.{form.name}") for kind in ("gemv", "gemm"))
    return (
        KernelRow(gemv, **common, numerics=f"{_GEMV}{own}; {_ONCE}", m_max=DECODE_ROWS, hands_over=gemm),
        KernelRow(gemm, **common, numerics=f"{_GEMM}{own}; {_ONCE}", m_min=DECODE_ROWS + 1, rank=1),
    )


def _gather(*names: str) -> KernelRow:
    forms = [takes(FORMS[name]) for name in names]
    keys = dict.fromkeys(key for form in forms for key in form)
    every: dict[str, Any] = {key: frozenset[Any]().union(*(f.get(key, ()) for f in forms)) for key in keys}
    return KernelRow(
        row_name("gather"),
        "q.embedding",
        **every,
        activations=FLOATS,
        entry=f"{ENTRY}embedding",
        layout=_LAYOUT,
        numerics="(code - zero) * scale of the rows asked for, in f32, rounded once; values of nf4 in f16",
        evidence=proved("test_embedding.py"),
        needs=AMPERE,
        bias=False,
        note="the layout of weight-only products, so a tied layer and its table are one tensor",
    )


WEIGHT_ONLY: tuple[KernelRow, ...] = tuple(row for form in FORMS.values() for row in _weight_only(form))
TABLES: tuple[KernelRow, ...] = (
    _gather(*(name for name in FORMS if name != "nvfp4")),
    _gather("nvfp4"),
)


def _none(what: str) -> Reason:
    return Reason("QC201", f"torch-cuda has no kernel for {what}", "leave it in float")


ABSENT: tuple[tuple[str, Reason], ...] = (
    ("q.conv", _none("convolutions on codes")),
    ("q.conv_dyn", _none("convolutions on codes")),
    ("q.matmul", _none("products of two activations in codes")),
    ("q.apply", _none("functions computed on codes")),
)
"""Why torch-cuda has no row for these ops."""
