"""What a low-bit node must satisfy beyond its kernel rows, as one table: constness, zero points, layout, session keys.

Rows say which kernel serves a weight; these conditions say when the runtime does not take that kernel although the node
looks right, computes wrong numbers, or does not load. Each was measured on ONNX Runtime 1.31 (CPU), or traced (CUDA).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qcompiler.backends.onnx.nodes import DEFAULT, MS, LowBit
from qcompiler.ir import Value
from qcompiler.target import Phase, Target
from qcompiler.verify.evidence import Verdict


@dataclass(frozen=True)
class Setting:
    """Where a node is judged: the target, the phases, the session keys that the artifact asks for."""

    target: Target
    phases: tuple[Phase, ...]
    session: Mapping[str, str] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.target.name == "ort-cuda"

    @property
    def saturates(self) -> bool:
        """AVX2 without VNNI: products of uint8 and int8 are summed in pairs in 16 bits, which overflows."""
        return "avx2" in self.target.features and "vnni" not in self.target.features

    @property
    def m_max(self) -> int:
        return max((p.m for p in self.phases), default=1)


Test = Callable[[LowBit, Setting], str | None]
"""The reason, with its numbers, when the condition is broken."""


@dataclass(frozen=True)
class Condition:
    """``verdict`` of a node of one of ``ops`` (full names; empty: all) for which ``test`` gives a reason."""

    code: str
    verdict: Verdict
    ops: frozenset[str]
    test: Test
    fix: str
    targets: frozenset[str] = frozenset({"ort-cpu", "ort-cuda"})


def _names(prefix: str, words: str) -> frozenset[str]:
    return frozenset(prefix + w for w in words.split())


NBITS = frozenset({MS + "MatMulNBits"})
BNB4 = frozenset({MS + "MatMulBnb4"})
TABLE = frozenset({MS + "GatherBlockQuantized"})
MOE = frozenset({MS + "QMoE"})
CACHE = frozenset({MS + "GroupQueryAttention"})
INTEGER = _names(DEFAULT, "QLinearMatMul MatMulInteger QLinearConv ConvInteger") | _names(
    MS, "DynamicQuantizeMatMul MatMulIntegerToFloat QGemm QLinearConv QAttention"
)
ONE_SIGN = _names(DEFAULT, "QLinearMatMul QLinearConv") | _names(MS, "MatMulIntegerToFloat QGemm QLinearConv")
CUDA_ONLY = _names(
    MS, "MatMulBlockQuantizedFp8Weight MatMulBlockQuantizedFp4Weight GemmFloat8 QOrderedMatMul QOrderedAttention"
) | _names(MS, "QOrderedLongformerAttention MatMulNBitsMlp MatMulNBitsQkv")
CPU, CUDA = frozenset({"ort-cpu"}), frozenset({"ort-cuda"})

CONST_FIX = "store it as an initializer that is no graph input"


def _name(value: Value | None) -> str:
    return "absent" if value is None else f"'{value.name}'"


def changeable(value: Value | None) -> str | None:
    """Why ``value`` may change at run time; None for a constant or an absent one."""
    if value is None or value.is_const:
        return None
    if value.is_input:
        return "a graph input with a default" if value.payload is not None else "a graph input"
    return f"computed by {value.owner.name} '{value.owner.label}'" if value.owner is not None else "not constant"


def _codes_change(n: LowBit, s: Setting) -> str | None:
    why = changeable(n.codes)
    return None if why is None else f"the codes {_name(n.codes)} are {why}, so they are not packed for the kernel"


def _parameters_change(n: LowBit, s: Setting) -> str | None:
    """With int8 activations the kernel bakes scales and zero points into the packed codes: they must be there then."""
    if n.accuracy != 4 or changeable(n.codes) is not None or n.zero == "float" or n.op.operand(4) is not None:
        return None
    for what, value in (("scales", n.scales), ("zero points", n.zeros)):
        if (why := changeable(value)) is not None:
            return f"the {what} {_name(value)} are {why}; the kernel packs its weight without them"
    return None


def _prepacking_off(n: LowBit, s: Setting) -> str | None:
    off = s.session.get("session.disable_prepacking") == "1"
    return "session.disable_prepacking is 1, so no weight is packed for its kernel" if off else None


def _g_idx(bits: Sequence[int], what: str) -> Test:
    def test(n: LowBit, s: Setting) -> str | None:
        index = n.op.operand(4)
        return None if index is None or n.bits not in bits else f"g_idx {_name(index)} is given: {what}"

    return test


def _float_zeros(bits: Sequence[int], what: str) -> Test:
    def test(n: LowBit, s: Setting) -> str | None:
        return None if n.zero != "float" or n.bits not in bits else f"float zero points {_name(n.zeros)}: {what}"

    return test


def _rank(n: LowBit, s: Setting) -> str | None:
    shape = None if n.codes is None else n.codes.tensor.static_shape
    if shape is None or n.block is None or not n.n:
        return None
    blocks, blob = -(-n.k // n.block), n.block * n.bits // 8
    want = (n.n, blocks, blob)
    return (
        None if shape == want else f"the codes {_name(n.codes)} are {list(shape)}, the attributes ask for {list(want)}"
    )


def _prepacked(n: LowBit, s: Setting) -> str | None:
    how = n.attr("weight_prepacked", 0)
    return f"weight_prepacked={how} is a CUDA layout, and the CPU kernel reads it as plain blocks" if how else None


def _incomplete(n: LowBit, s: Setting) -> str | None:
    absent = [a for a in ("K", "N", "block_size") if not isinstance(n.op.attrs.get(a), int)]
    return f"the attributes {', '.join(absent)} are absent" if absent else None


def _always(reason: str) -> Test:
    return lambda n, s: reason


def _bnb4_cuda(n: LowBit, s: Setting) -> str | None:
    if s.m_max > 1:
        return f"its kernel for M=1 alone reads the codes; a phase has M={s.m_max}"
    return None if n.block is not None and n.block % 32 == 0 else f"blocks of {n.block} are no multiple of 32"


def _table_layout(n: LowBit, s: Setting) -> str | None:
    element = None if n.codes is None else n.codes.tensor.dtype
    axis = n.attr("gather_axis", 0)
    if element is not None and element.name == "uint8" and axis != 0:
        return f"gather_axis is {axis}, and a uint8 table is gathered along axis 0"
    return None


def _table_block(n: LowBit, s: Setting) -> str | None:
    block = n.block or 0
    return None if block >= 16 and block & (block - 1) == 0 else f"blocks of {block}: a power of two from 16 is needed"


def _moe_rows(n: LowBit, s: Setting) -> str | None:
    if n.block is None:
        return "without block_size (one scale a row) the weight of each active expert is expanded"
    return f"2-bit codes in blocks of {n.block} are expanded for each active expert" if n.bits == 2 else None


def _cache_cuda(n: LowBit, s: Setting) -> str | None:
    """Only the decode kernel reads a cache of 8 bits as it is stored."""
    if n.bits == 4:
        return "an int4 cache is expanded before attention"
    return f"a phase has M={s.m_max} rows, and only decode (M=1) reads the cache as stored" if s.m_max > 1 else None


def _block_scales(n: LowBit, s: Setting) -> str | None:
    """A scale for each output channel or one in all; anything else is read as if it were that."""
    shape = None if n.scales is None else n.scales.tensor.static_shape
    if shape is None or len(shape) < 2 or n.op.name == MS + "DynamicQuantizeLSTM":
        return None
    size = 1
    for d in shape:
        size *= d
    if size == 1:
        return None
    return f"the scales {_name(n.scales)} are {list(shape)}; the kernel takes one or {n.n or 'one a channel'}"


def _saturation(n: LowBit, s: Setting) -> str | None:
    """Which side is signed decides: int8 x int8 takes another way, ``ConvInteger`` multiplies weights by activations.

    Measured under an emulator (tests/backends/onnx/test_chips_integer.py).
    """
    if not s.saturates or s.session.get("session.x64quantprecision") == "1":
        return None
    if n.op.name == DEFAULT + "ConvInteger":
        both = "int8 activations against uint8 weights overflow 16 bits without VNNI"
        return both if n.types == "s8u8" else None
    element = None if n.codes is None else n.codes.tensor.dtype
    if element is None or element.name != "int8" or n.types == "s8s8":
        return None
    payload = None if n.codes is None or not n.codes.is_const else n.codes.payload
    if payload is None:
        return "int8 weights that are not constant may overflow 16 bits on AVX2 without VNNI"
    largest = int(np.abs(payload.array().astype(np.int16)).max(initial=0))
    return None if largest <= 64 else f"|codes| reach {largest}, and pairs of products overflow 16 bits without VNNI"


def _signs(n: LowBit, s: Setting) -> str | None:
    x, w = n.op.operand(n.places.x), n.codes
    kinds = [v.tensor.dtype.name if v is not None and v.tensor.dtype is not None else "" for v in (x, w)]
    if kinds == ["int8", "uint8"]:
        return "int8 activations with uint8 weights have no kernel"
    if n.op.name == MS + "QAttention" and kinds[0] == "int8":
        return "int8 activations have no kernel"
    return None


def _float_scales(n: LowBit, s: Setting) -> str | None:
    element = None if n.scales is None else n.scales.tensor.dtype
    return f"its scales are {element}; the kernel takes f32" if element is not None and element.name != "f32" else None


CONDITIONS: tuple[Condition, ...] = (
    Condition("QC205", "error", NBITS, _incomplete, "write K, N and block_size"),
    Condition("QC205", "wrong", NBITS, _prepacked, "store the codes in plain blocks and drop weight_prepacked", CPU),
    Condition("QC205", "error", NBITS, _rank, "store the codes as uint8 [N, ceil(K / block), block * bits / 8]"),
    Condition(
        "QC303",
        "wrong",
        NBITS,
        _g_idx((2,), "the 2-bit kernel computes wrong numbers with it"),
        "reorder the columns of the weight and drop g_idx",
        CPU,
    ),
    Condition(
        "QC205", "error", NBITS, _g_idx((8,), "8 bits have no kernel with it"), "reorder the columns, drop g_idx", CPU
    ),
    Condition(
        "QC104",
        "dequant",
        NBITS,
        _g_idx(range(2, 9), "the whole weight is expanded"),
        "reorder the columns, drop g_idx",
    ),
    Condition("QC204", "error", NBITS, _float_zeros((8,), "8 bits have no kernel with them"), "store uint8 zeros", CPU),
    Condition(
        "QC104", "dequant", NBITS, _float_zeros(range(2, 9), "the weight is expanded"), "store packed uint8 zero points"
    ),
    Condition("QC104", "dequant", NBITS, _codes_change, CONST_FIX),
    Condition("QC303", "wrong", NBITS, _parameters_change, CONST_FIX + ", or set accuracy_level 0 (4 bits)", CPU),
    Condition("QC104", "dequant", NBITS, _prepacking_off, "leave prepacking on", CPU),
    Condition(
        "QC104", "dequant", BNB4, _always("its CPU kernel expands the weight on each call"), "use MatMulNBits", CPU
    ),
    Condition("QC104", "dequant", BNB4, _bnb4_cuda, "use MatMulNBits", CUDA),
    Condition("QC205", "error", TABLE, _table_layout, "store the table as [V, K] and set gather_axis 0"),
    Condition("QC202", "error", TABLE, _table_block, "quantize with groups of 16, 32, 64, 128 or 256"),
    Condition("QC104", "dequant", MOE, _moe_rows, "quantize the experts to 4 or 8 bits in blocks of 32 to 128", CPU),
    Condition("QC104", "dequant", CACHE, _cache_cuda, "keep the cache in the activation's type", CUDA),
    Condition(
        "QC303", "wrong", INTEGER, _block_scales, "quantize with one scale an output channel, or use MatMulNBits"
    ),
    Condition(
        "QC303", "wrong", INTEGER, _saturation, "quantize the weight to 7 bits, or set session.x64quantprecision=1", CPU
    ),
    Condition("QC201", "error", ONE_SIGN | _names(MS, "QAttention"), _signs, "quantize activations to uint8", CPU),
    Condition("QC201", "error", ONE_SIGN, _float_scales, "store f32 scales", CPU),
    Condition("QC201", "error", CUDA_ONLY, _always("the CPU provider has no kernel for it"), "use MatMulNBits", CPU),
    Condition(
        "QC104",
        "dequant",
        _names(MS, "MatMulFpQ4"),
        _always("its kernel was never seen to leave the weight packed"),
        "use MatMulNBits",
    ),
    Condition(
        "QC106",
        "dequant",
        INTEGER,
        _always("the CUDA provider has no kernel for it, and the runtime moves it to the CPU"),
        "use weight-only MatMulNBits on CUDA",
        CUDA,
    ),
)


def broken(node: LowBit, setting: Setting) -> list[tuple[Condition, str]]:
    """The conditions that ``node`` breaks, with reasons: the first one of each verdict, one alone if it cannot load."""
    out: list[tuple[Condition, str]] = []
    for condition in CONDITIONS:
        if node.op.name not in condition.ops or setting.target.name not in condition.targets:
            continue
        reason = condition.test(node, setting)
        if reason is not None and not any(c.verdict == condition.verdict for c, _ in out):
            out.append((condition, reason))
    return [b for b in out if b[0].verdict == "error"] or out
