"""Hand-made graphs of every kind that the verifier rejects: what is repaired, and what is refused with which words.

The graphs are those of the verifier's corpora (tests/verify), which were made after what ONNX Runtime leaves unfused.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from tests.repair.harness import FREED, repair, saved
from tests.verify import corpus_graphs, corpus_nbits, corpus_ops, corpus_qdq, corpus_types, corpus_w8a8
from tests.verify.build import Case

CORPORA = (corpus_nbits, corpus_qdq, corpus_w8a8, corpus_graphs, corpus_types, corpus_ops)

KINDS: dict[str, tuple[str, ...]] = {
    "8-bit MatMulNBits without int8 compute": ("nbits8-g64-acc0", "nbits8-default-acc", "nbits8-acc0-in-if"),
    "2-bit MatMulNBits without int8 compute": ("nbits2-g32-acc0",),
    "2-bit blocks of a size without a kernel": ("nbits2-g256-acc4", "nbits2-g16-acc4"),
    "float zero points that are whole numbers": ("nbits4-zp-float", "nbits8-zp-float"),
    "g_idx": ("nbits4-g_idx", "nbits2-g_idx", "nbits8-g_idx"),
    "blocks of 512": ("nbits4-g512",),
    "codes of rank 2": ("nbits4-rank2",),
    "DQ of int2 in blocks of 16": ("wo-int2-b16",),
    "per-tensor scale of shape [1]": ("wo-int8-tensor1",),
    "dequantize through Transpose": ("wo-int4-transpose", "wo-int8-transpose-block"),
    "dequantize through Reshape": ("rank-3-blocks",),
    "Gemm transB": ("wo-int4-gemmT", "wo-int8-gemmT"),
    "shared dequantize": ("two-reader",),
    "tied dequantizes": ("two-tied",),
    "shared scale": ("two-scale", "two-scalars-equal"),
    "Relu or Clip behind a weight-only product": ("then-Relu-matmul", "then-Clip-gemm"),
    "weight-only product with a quantized result": ("then-quantize", "then-quantize-int8"),
    "residual Add behind a weight-only product": ("residual",),
    "DQ -> Gather": ("table-int4-block", "table-int8-channel", "table-int8-tensor"),
    "dequantize as Cast and Mul": ("spelled-fold",),
    "dequantize as Cast, Sub and Mul": ("spelled-zero",),
    "4-bit codes unpacked by masks and shifts": ("spelled-unpack",),
    "W8A8 with a float bias and no output Q": ("w8a8-gemm-float-bias", "w8a8-add-float-bias"),
    "W8A8 Gemm without zero points": ("gemm-without-zero",),
    "W8A8 with an int32 bias of another scale": ("bias-of-another-scale", "bias-of-another-scale-q"),
    "Relu between product and Q of int8": ("w8a8-relu-q-s8", "w8a8-gemm-relu-q-s8"),
    "int8 activations with several readers": ("w8a8-s8-two-readers",),
    "int8 activations behind data movement": ("moved-transpose-s8",),
    "16-bit activations": ("w8a8-u16", "ew-Add-u16"),
    "f16 W8A8": ("w8a8-f16", "w8a8-f16-q"),
    "W4A8 per channel": ("w4a8-channel", "w4a8-channel-q"),
    "W4A8 in blocks": ("w4a8-block",),
    "W8A8 in blocks, which the runtime gets wrong (W4)": ("w8a8-block", "w8a8-block-q", "dyn-qdq-block"),
    "dynamic W8A8 with a bias": ("dyn-qdq-bias", "dynamic-bias-known-shape"),
    "Conv without output Q": ("conv-no-output-q", "conv-no-output-q-bias"),
    "Conv with an int32 bias of another scale": ("conv-int32-bias",),
    "Conv and Relu on int8": ("conv-relu-s8",),
    "f16 Conv": ("conv-f16",),
    "data movement between two scales": ("ew-Transpose-other-scale", "ew-MaxPool-other-scale"),
    "lone Relu between codes": ("ew-Relu",),
    "ops without an integer kernel, named": ("ew-Sub", "ew-Tanh", "ew-Gelu", "ew-Softmax-no-output-q"),
    "int8 x uint8 integer ops": ("int-QLinearMatMul-s8u8", "int-QGemm-s8u8"),
}
"""Kind -> cases of it."""

MEASURED = frozenset({"conv-int32-bias", "nbits8-default-acc", "two-reader", "w8a8-gemm-float-bias"})
"""Cases whose first verdict is taken from the runtime's own optimized graph; the others' is foretold without a run."""

WIDER: dict[str, float] = {
    "then-Clip-gemm": 0.1,  # Exp of up to 6 multiplies an error of 0.016 by 6
    "then-quantize": 0.06,  # the codes cut off the result at a fifth of its range, the error stays
    "then-quantize-int8": 0.06,
    "w8a8-block": FREED,
    "w4a8-block": FREED,
    "w8a8-block-q": FREED,
    "ew-Add-u16": 1e-4,  # half a step of 1/65535 of each range
}
"""Case -> share of the largest output, where more than the kernel's own rounding is left out or amplified."""

REFUSED: dict[str, str] = {
    "nbits4-codes-overridable": "a graph input with a default, which a caller may replace",
    "nbits4-scales-input": "a graph input",
    "nbits8-zp-input": "a graph input",
    "nbits3": "no kernel ever read 3-bit blocks",
    "nbits4-g8": "a group size is a power of two in 16..1024",
    "wo-int4-b8": "a group size is a power of two in 16..1024",
    "wo-int16": "int16 codes have no kernel",
    "wo-int4-left": "run along the output features",
    "wo-int4-scale-overridable": "a graph input with a default",
    "w8a8-s16": "int16 codes have no kernel",
    "conv-u16": "an integer convolution needs codes",
    "weight-is-output": "is an output of the graph, so it must exist",
    "spelled-scale": "repair finds nothing quantized",
    "cache-transposed": "codes that the model is given",
    "float8-weight": "f8e4m3 codes have no kernel",
    "bnb4-nf4-g64": "values of NF4 or FP4, which are no multiples of one step",
    "table-g8": "a group size is a power of two in 16..1024",
    "table-gather-axis-1": "only rows of a matrix",
    "int-QLinearMatMul-block": "not one a channel",
    "int-MatMulIntegerToFloat-block": "not one a channel",
    "moe-2-g16": "2-bit codes in blocks of 16 are expanded",
    "int-QAttention-s8": "int8 activations have no kernel",
}
"""Case -> words of the reason why it cannot be repaired."""


@cache
def every_case() -> Mapping[str, Case]:
    return {case.name: case for corpus in CORPORA for case in corpus.cases()}


def yardstick(case: Case) -> object:
    """NumPy's answer where the runtime's own kernels compute something else, or do not run: contrib ops."""
    return case.expect if case.name.startswith(("nbits", "int-")) else None


def test_there_are_twenty_kinds_and_more() -> None:
    assert len(KINDS) >= 20
    assert {name for cases in KINDS.values() for name in cases} <= set(every_case())


@pytest.mark.parametrize("name", [n for cases in KINDS.values() for n in cases])
def test_what_is_rejected_is_repaired(name: str, tmp_path: Path) -> None:
    case = every_case()[name]
    expect = yardstick(case)
    out = repair(saved(case.model, tmp_path), case.feeds, expect=expect, run=name in MEASURED)  # type: ignore[arg-type]
    assert out.before, f"{name} was accepted as it stands"
    assert not out.refusal
    assert out.report is not None and out.report.accepted
    for site in out.report.sites:
        assert site.status == "fused" or (site.op == "float" and site.reason)
        assert site.status != "fused" or site.evidence == "measured"
    assert out.off <= max(out.allowed, WIDER.get(name, 0.0) + 1.01 * out.step), (out.off, out.allowed, out.kernels)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_repaired_is_named(name: str, tmp_path: Path) -> None:
    case = every_case()[name]
    out = repair(saved(case.model, tmp_path), case.feeds)
    assert REFUSED[name] in out.refusal
    assert not (tmp_path / "repaired.onnx").exists()


ACCEPTED = (
    "nbits4-f16",
    "wo-int4-b32",
    "w8a8-u8s8-channel-q",
    "dyn-batched-bias",
    "conv2d",
    "ew-Concat",
    "table-u8-4-zero",
)


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted_stays_so(name: str, tmp_path: Path) -> None:
    case = every_case()[name]
    out = repair(saved(case.model, tmp_path), case.feeds, expect=yardstick(case))  # type: ignore[arg-type]
    assert not out.before
    assert not out.refusal
    assert out.off <= out.allowed
