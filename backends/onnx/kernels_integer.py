"""ONNX Runtime's kernels that compute on codes of activations (W8A8), as rows.

``u8s8`` in a name: uint8 activations, int8 weights; ``u8u8`` and ``s8s8`` likewise. What decides between them, measured
on ONNX Runtime 1.31 (benchmarks/results/integer_linear.json, tests/backends/onnx/test_chips_integer.py):

  - With VNNI, u8s8 is the fast one; u8u8 takes about twice as long at M of 16 and more, s8s8 11 to 20 times.
  - Without VNNI, u8s8 products saturate in 16 bits, except those of ``ConvInteger``. There the same codes are stored
    128 higher with zero point 128 (u8u8): the same numbers, exact on every chip. s8s8 is exact everywhere too.
  - A float bias is added by ``MatMulIntegerToFloat``; with a ``QuantizeLinear`` behind it that takes as long as
    ``QGemm`` (median ratio 1.00), which rounds the bias to int32 besides. ``QGemm`` is there for those who ask for it
    by name. Without a bias ``QLinearMatMul`` takes 0.95 of that.
  - Layers that share an activation share one ``DynamicQuantizeLinear``: the work is done once. In time that is worth no
    more than the noise of the measurement, so a layer alone gets ``DynamicQuantizeMatMul``, one node for all.

What has no row, and why:
  - activations scaled per token: no kernel takes more than one scale for them.
  - int8 activations that are quantized at run time: ``DynamicQuantizeLinear`` makes uint8.
  - convolutions whose channels have different zero points: the kernel refuses them.
  - ``QAttention``: it wants the projection weights of query, key and value joined, and gives floats.
  - pools with dilations, or with ceil_mode where padding counts; softmax over another axis than the last, or
    over one that may be short: ``QLinearSoftmax`` wraps around there.
  - the CUDA provider: it has none of these kernels.
"""

from __future__ import annotations

from typing import Any

from qcompiler.requests import BATCHED, LEFT, SHARED, SIGNED_RIGHT
from qcompiler.target import KernelRow, Reason

_MODULE = "qcompiler.backends.onnx.lower_"
_LAYOUT = "qcompiler.backends.onnx.layouts:"
MEASURED = "tests/backends/onnx/test_kernels_integer.py ran it: numbers, temporary memory"
_X86, _VNNI = frozenset({"x86_64"}), frozenset({"x86_64", "vnni"})
_WHOLE = frozenset({"tensor", "channel"})
_NAMES = {"u": "uint8", "s": "int8"}

_EXACT = "products summed in int32, exact"
_FLOAT = f"{_EXACT}; scaled and biased in f32"
_CODES = f"{_EXACT}; requantized in f32, so a code may be off by one at a tie"
_ROUNDED_BIAS = f"{_CODES}; the bias is rounded to int32 in steps of x scale times w scale"

SLOW = "11 to 20 times as long as u8s8"
SLOW_CONV = "4 to 20 times as long as u8u8"
FLIPPED = "int8 weights are stored 128 higher, with zero point 128: the same numbers"


def _row(op: str, name: str, kind: str, **more: Any) -> KernelRow:
    """A row of kernel ``name`` for activation and weight types ``kind`` (``u8s8``)."""
    activation, weight = _NAMES[kind[0]], _NAMES[kind[-2]]
    fields: dict[str, Any] = {
        "codes": frozenset({"uint8", "int8"}) if kind == "u8u8" else frozenset({weight}),
        "granularities": _WHOLE,
        "groups": frozenset(),
        "zeros": frozenset({"none", "int"}),
        "activations": frozenset({"f32"}),
        "x_codes": frozenset({activation}),
        "layout": _LAYOUT + "columns",
        "evidence": MEASURED,
        "needs": _VNNI if kind == "u8s8" else _X86,
        "note": {"u8u8": FLIPPED, "s8s8": SLOW}.get(kind, ""),
    }
    return KernelRow(name if "/" in name else f"ort-cpu/{name}", op, **(fields | more))


KINDS = ("u8s8", "u8u8", "s8s8")


def _static(kind: str, rank: int) -> list[KernelRow]:
    """``q.linear_static``: the codes of a result without bias straight, all others through floats."""
    same = frozenset({_NAMES[kind[0]]})
    entry = _MODULE + "integer:"
    return [
        _row(
            "q.linear_static",
            f"QLinearMatMul.{kind}",
            kind,
            entry=entry + "qlinear_matmul",
            y_codes=same,
            bias=False,
            traits=frozenset({BATCHED}),
            numerics=_CODES,
            opset=10,
            rank=rank,
        ),
        _row(
            "q.linear_static",
            f"MatMulIntegerToFloat.{kind}",
            kind,
            entry=entry + "matmul_integer_to_float",
            y_codes=frozenset({"float", "uint8", "int8"}),
            traits=frozenset({BATCHED}),
            numerics=_FLOAT,
            rank=rank + 1,
        ),
        _row(
            "q.linear_static",
            f"QGemm.{kind}",
            kind,
            entry=entry + "qgemm",
            y_codes=same,
            numerics=_ROUNDED_BIAS,
            rank=rank + 10,
        ),
    ]


def _dynamic(kind: str, rank: int) -> list[KernelRow]:
    """``q.linear_dyn``: alone, or after a ``DynamicQuantizeLinear`` that others read too."""
    common: dict[str, Any] = {"dynamic": True, "x_zeros": frozenset({"int"}), "numerics": _FLOAT}
    return [
        _row(
            "q.linear_dyn",
            f"DynamicQuantizeMatMul.{kind}",
            kind,
            entry=_MODULE + "integer:dynamic_quantize_matmul",
            traits=frozenset({BATCHED}),
            rank=rank,
            **common,
        ),
        _row(
            "q.linear_dyn",
            f"MatMulIntegerToFloat.{kind}.dynamic",
            kind,
            entry=_MODULE + "integer:dynamic_matmul_integer",
            traits=frozenset({BATCHED, SHARED}),
            opset=11,
            rank=rank + 1,
            **common,
        ),
    ]


def _conv(kind: str, rank: int) -> list[KernelRow]:
    return [
        _row(
            "q.conv",
            f"QLinearConv.{kind}",
            kind,
            entry=_MODULE + "conv:qlinear_conv",
            layout=_LAYOUT + "kernels",
            y_codes=frozenset({_NAMES[kind[0]]}),
            one_zero=True,
            numerics=_ROUNDED_BIAS,
            rank=rank,
        )
    ]


def _conv_dynamic(kind: str) -> KernelRow:
    """``ConvInteger`` multiplies weights by activations, in this order: no pair of products saturates for uint8
    activations, whatever the weights are. But x86 has no fast product of int8 with uint8, so int8 weights are stored
    as uint8."""
    return _row(
        "q.conv_dyn",
        f"ConvInteger.{kind}",
        kind,
        entry=_MODULE + "conv:conv_integer",
        layout=_LAYOUT + "kernels",
        needs=_X86,
        note=FLIPPED if kind == "u8u8" else SLOW_CONV,
        dynamic=True,
        x_zeros=frozenset({"int"}),
        one_zero=True,
        numerics=_FLOAT,
        opset=11,
        rank=0 if kind == "u8u8" else 1,
    )


def _conv_float(kind: str) -> KernelRow:
    """As :func:`_conv_dynamic`, for uint8 activations with constant parameters and a float result."""
    return _row(
        "q.conv",
        f"ConvInteger.{kind}.static",
        kind,
        entry=_MODULE + "conv:conv_integer_static",
        layout=_LAYOUT + "kernels",
        needs=_X86,
        note=FLIPPED if kind == "u8u8" else SLOW_CONV,
        y_codes=frozenset({"float"}),
        one_zero=True,
        numerics=_FLOAT,
        opset=11,
        rank=10 if kind == "u8u8" else 11,
    )


def _products(kind: str, rank: int) -> list[KernelRow]:
    """``q.matmul``. A constant on the left is turned into uint8 where the right is; see the layout."""
    entry, activation = _MODULE + "integer:", _NAMES[kind[0]]
    common: dict[str, Any] = {"granularities": frozenset({"tensor"}), "bias": False}
    rows = []
    for left in (False, True):
        if left and kind == "u8s8":
            continue  # a constant on the left becomes what the right is
        traits = {LEFT} if left else set()
        traits |= {SIGNED_RIGHT} if kind != "u8u8" else set()
        fields = common | {"traits": frozenset(traits)}
        if left and kind == "u8u8":
            fields |= {"x_codes": frozenset({"uint8", "int8"}), "codes": frozenset({"uint8"})}
        suffix = f"{kind}.{'left' if left else 'batched'}"
        rows += [
            _row(
                "q.matmul",
                f"QLinearMatMul.{suffix}",
                kind,
                entry=entry + "matmul_codes",
                y_codes=frozenset({activation}),
                numerics=_CODES,
                opset=10,
                rank=rank,
                **fields,
            ),
            _row(
                "q.matmul",
                f"MatMulIntegerToFloat.{suffix}",
                kind,
                entry=entry + "matmul_float",
                y_codes=frozenset({"float"}),
                numerics=_FLOAT,
                rank=rank,
                **fields,
            ),
        ]
    return rows


_APPLY = {
    "Add": "computed in f32; a code may be off by one at a tie",
    "Mul": "computed in f32; a code may be off by one at a tie",
    "Concat": "each operand by a table of 256 codes; a code may be off by one at a tie",
    "AveragePool": "averaged in f32; a code may be off by one at a tie",
    "GlobalAveragePool": "summed in int32, scaled in f32; a code may be off by one at a tie",
    "Sigmoid": "a table of 256 codes, computed in f32",
    "LeakyRelu": "a table of 256 codes, computed in f32; a code may be off by one at a tie",
    "Softmax": "a table of 256 exponentials, summed; a code may be off by one",
}


def _apply(fn: str, activation: str) -> KernelRow:
    name = _NAMES[activation]
    return _row(
        "q.apply",
        f"QLinear{fn}.{activation}8",
        f"{activation}8{activation}8",
        codes=frozenset({name}),
        granularities=frozenset({"tensor"}),
        entry=_MODULE + "pointwise:apply",
        layout="",
        y_codes=frozenset({name}),
        fns=frozenset({fn}),
        needs=_X86,
        note="",
        numerics=_APPLY[fn],
        bias=False,
    )


def _edge(op: str, name: str, entry: str, **more: Any) -> KernelRow:
    """Where floats become codes and codes floats, and the rescale between floats."""
    fields: dict[str, Any] = {
        "codes": frozenset({"uint8", "int8"}),
        "granularities": frozenset({"tensor"}),
        "x_codes": frozenset(),
        "entry": _MODULE + "pointwise:" + entry,
        "layout": "",
        "needs": _X86,
        "note": "",
        "bias": False,
    }
    return _row(op, name, "u8u8", **(fields | more))


_EDGES = [
    _edge("q.quantize", "QuantizeLinear", "quantize", dynamic=True, numerics="as ONNX: round to even, saturate"),
    _edge("q.dequantize", "DequantizeLinear", "dequantize", dynamic=True, numerics="(code - zero) * scale in f32"),
    _edge(
        "q.choose_qparams",
        "DynamicQuantizeLinear",
        "choose_qparams",
        dynamic=True,
        codes=frozenset({"uint8"}),
        zeros=frozenset({"int"}),
        numerics="as ONNX, in f32",
        opset=11,
    ),
    _edge(
        "q.scale",
        "Mul",
        "scale",
        codes=frozenset({"int8"}),
        activations=frozenset({"f32", "f64"}),
        numerics="one rounding a product",
    ),
]

INTEGER_ROWS: tuple[KernelRow, ...] = (
    *(r for rank, kind in enumerate(KINDS) for r in _static(kind, 2 * rank)),
    *(r for rank, kind in enumerate(KINDS[:2]) for r in _dynamic(kind, 2 * rank)),
    *(r for rank, kind in enumerate(KINDS) for r in _conv(kind, rank)),
    *(_conv_dynamic(kind) for kind in KINDS[:2]),
    *(_conv_float(kind) for kind in KINDS[:2]),
    *(r for rank, kind in enumerate(KINDS) for r in _products(kind, rank)),
    *(_apply(fn, activation) for fn in _APPLY for activation in "us"),
    *_EDGES,
)
"""Rows of ort-cpu. ``rank``: VNNI first, then what is exact everywhere, then what is slow."""

_NO_CUDA = Reason(
    "QC201",
    "ONNX Runtime's CUDA provider has no kernel that computes on int8 activations: W8A8 stays unfused there, or moves "
    "to the CPU",
    "quantize weights only (recipes w4a16 and w8a16), or compile W8A8 for ort-cpu",
)
CUDA_ABSENT: tuple[tuple[str, Reason], ...] = tuple(
    (op, _NO_CUDA)
    for op in ("q.linear_static", "q.linear_dyn", "q.conv", "q.conv_dyn", "q.matmul", "q.apply", "q.choose_qparams")
)
"""Why ort-cuda has no row for these ops."""

CUDA_SCALE = _edge(
    "q.scale",
    "ort-cuda/Mul",
    "scale",
    codes=frozenset({"int8"}),
    activations=frozenset({"f32", "f16", "bf16"}),
    needs=frozenset({"cuda"}),
    evidence="static, an operator of the CUDA provider, not run here",
    numerics="one rounding a product",
)
