"""What ONNX Runtime's low-bit nodes hold: which operand is the codes, their scheme, their sizes.

``low_bit`` reads an op as such a node; it never raises, whatever attributes and operands the file gives. Layouts as in
:mod:`qcompiler.backends.onnx.layouts`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qcompiler.dtypes import TABLE, DType
from qcompiler.errors import RecipeError
from qcompiler.ir import Graph, Op, Value
from qcompiler.scheme import Scheme, ZeroKind
from qcompiler.target import Request

MS = "com.microsoft."
DEFAULT = "onnx."


@dataclass(frozen=True)
class Places:
    """Operand indices of a low-bit op: the activation, codes and their parameters, bias. None where there is none."""

    kind: str
    x: int
    codes: int
    scales: int | None
    zeros: int | None = None
    bias: int | None = None
    x_scale: int | None = None
    x_zero: int | None = None


PLACES: dict[str, Places] = {
    MS + "MatMulNBits": Places("linear", 0, 1, 2, 3, 5),
    MS + "MatMulBnb4": Places("linear", 0, 1, 2),
    MS + "GatherBlockQuantized": Places("embedding", 1, 0, 2, 3),
    MS + "QMoE": Places("moe", 0, 2, 3),
    MS + "DynamicQuantizeMatMul": Places("linear", 0, 1, 2, 3, 4),
    MS + "MatMulIntegerToFloat": Places("linear", 0, 1, 3, 5, 6, 2, 4),
    MS + "QGemm": Places("linear", 0, 3, 4, 5, 6, 1, 2),
    DEFAULT + "QLinearMatMul": Places("linear", 0, 3, 4, 5, None, 1, 2),
    DEFAULT + "MatMulInteger": Places("linear", 0, 1, None, 3, None, None, 2),
    MS + "MatMulInteger16": Places("linear", 0, 1, None),
    DEFAULT + "QLinearConv": Places("conv", 0, 3, 4, 5, 8, 1, 2),
    MS + "QLinearConv": Places("conv", 0, 3, 4, 5, 8, 1, 2),
    DEFAULT + "ConvInteger": Places("conv", 0, 1, None, 3, None, None, 2),
    MS + "QAttention": Places("linear", 0, 1, 4, 7, 2, 3, 6),
    MS + "DynamicQuantizeLSTM": Places("recurrent", 0, 1, 8, 9),
    MS + "GroupQueryAttention": Places("cache", 0, 3, 12),
    MS + "MatMulBlockQuantizedFp8Weight": Places("linear", 0, 1, 2),
    MS + "MatMulBlockQuantizedFp4Weight": Places("linear", 0, 1, 2),
    MS + "MatMulFpQ4": Places("linear", 0, 1, None),
    MS + "GemmFloat8": Places("linear", 0, 1, 4),
    MS + "MatMulNBitsMlp": Places("linear", 0, 1, 2),
    MS + "MatMulNBitsQkv": Places("linear", 0, 1, 2),
}
"""Every op that keeps a weight, or a cache, in few bits. Ops whose name starts with QOrdered are products too."""

PRODUCTS = frozenset({DEFAULT + "QLinearMatMul", DEFAULT + "MatMulInteger", MS + "MatMulIntegerToFloat"})
"""Products that take codes computed at run time, or a constant, on either side."""

BLOCKED = frozenset({MS + "MatMulNBits", MS + "MatMulBnb4", MS + "GatherBlockQuantized", MS + "QMoE"})
"""Ops that say in attributes how the codes are packed."""


@dataclass(frozen=True)
class LowBit:
    """A low-bit node. ``n`` and ``k`` are 0 where unknown; ``block`` is None for channel and tensor granularity."""

    op: Op
    places: Places
    n: int
    k: int
    bits: int
    signed: bool
    block: int | None
    zero: ZeroKind
    activation: DType | None

    @property
    def kind(self) -> str:
        """``linear`` and so on; ``matmul`` for a product of two activations."""
        both = self.op.name in PRODUCTS and not self.weight_is_constant
        return "matmul" if both else self.places.kind

    @property
    def on_left(self) -> bool:
        """The left operand of a product is constant, and the right one is not."""
        return _on_left(self.op, self.places)

    @property
    def weight(self) -> tuple[Value | None, Value | None, Value | None]:
        """Codes, scales and zero points of the weight."""
        if self.on_left:
            return self.at(self.places.x), self.at(self.places.x_scale), self.at(self.places.x_zero)
        scales = self.scales if self.places.scales is not None else scales_behind(self.op)
        return self.codes, scales, self.zeros

    @property
    def weight_is_constant(self) -> bool:
        """It is stored with the model, or given to it; else it is an activation."""
        codes, left = self.weight[0], self.at(self.places.x)
        return codes is not None and (codes.is_const or (codes.is_input and not (left is not None and left.is_input)))

    @property
    def types(self) -> str:
        """``u8s8``: the types of activation and weight as kernel names tell them; empty where they are others."""
        words = []
        for places in ((self.places.x, self.places.x_zero), (self.places.codes, self.places.zeros)):
            # types end at ops that ONNX does not know: there the zero point tells them
            found = (v.tensor.dtype for v in map(self.at, places) if v is not None and v.tensor.dtype is not None)
            element = next(found, None)
            if self.op.name == MS + "DynamicQuantizeMatMul" and places[0] == self.places.x:
                words.append("u8")
            elif element is not None and element.name in ("int8", "uint8"):
                words.append("s8" if element.signed else "u8")
        return "".join(words) if len(words) == 2 else ""

    @property
    def short(self) -> str:
        """``MatMulNBits``."""
        return self.op.name.rpartition(".")[2]

    def attr(self, name: str, default: int) -> int:
        """An integer attribute; its default where absent or of another type."""
        value = self.op.attrs.get(name, default)
        return value if isinstance(value, int) else default

    def at(self, index: int | None) -> Value | None:
        return None if index is None else self.op.operand(index)

    @property
    def codes(self) -> Value | None:
        return self.at(self.places.codes)

    @property
    def scales(self) -> Value | None:
        return self.at(self.places.scales)

    @property
    def zeros(self) -> Value | None:
        return self.at(self.places.zeros)

    @property
    def accuracy(self) -> int:
        """The ``accuracy_level``; absent means 0."""
        return self.attr("accuracy_level", 0)

    @property
    def scheme_text(self) -> str:
        """``int4 g32 sym``, also for what no scheme may be (``int3 g8 sym``)."""
        if self.op.name == MS + "MatMulBnb4":
            return f"{'nf4' if self.attr('quant_type', 1) else 'fp4'} g{self.block} sym"
        if self.bits == 8 and not self.signed and not self.block and _all_code(self.weight[2], 128):
            return f"int8 {self.granularity} sym"  # the same codes, stored 128 higher
        word = {"none": "sym", "int": "asym", "float": "asymf"}[self.zero]
        name = f"{'int' if self.signed or self.block else 'uint'}{self.bits}"
        return f"{name} {'g' + str(self.block) if self.block else self.granularity} {word}"

    @property
    def granularity(self) -> str:
        if self.block:
            return "group"
        size = _count(self.weight[1])
        return "channel" if size is not None and size > 1 else "tensor"

    def request(self, m_op: str) -> Request | None:
        """The site as the kernel rows are asked for it; None when no scheme says what this node holds."""
        name = f"{'int' if self.zero == 'none' else 'uint'}{self.bits}"
        if name not in TABLE or self.activation is None or self.block is None:
            return None
        try:
            scheme = Scheme(TABLE[name], "group", self.zero == "none", (self.block,), None, False, self.zero)
        except RecipeError:
            return None
        return Request(m_op, scheme, self.n, self.k, self.activation, self.at(self.places.bias) is not None)

    def sizes(self) -> dict[str, int]:
        """Bytes of codes, scales and zeros; of two activations none."""
        if not self.weight_is_constant:
            return {"codes": 0, "scales": 0, "zeros": 0}
        codes, scales, zeros = self.weight
        return {"codes": _bytes(codes), "scales": _bytes(scales), "zeros": _bytes(zeros)}


def scales_behind(op: Op) -> Value | None:
    """The weight's scales of an op that gives int32 sums: a constant factor behind the Cast, or a factor of that."""
    value, steps = op.results[0], 0
    while steps < 4 and len(value.users) == 1:
        (user,), steps = value.users, steps + 1
        if user.name not in (DEFAULT + "Cast", DEFAULT + "Mul", DEFAULT + "BatchNormalization"):
            return None
        for factor in (v for v in user.operands if v is not None and v is not value):
            inner = [factor] if factor.owner is None or factor.owner.name != DEFAULT + "Mul" else factor.owner.operands
            found = next((v for v in inner if v is not None and v.is_const), None)
            if found is not None:
                return found
        value = user.results[0]
    return None


def _count(value: Value | None) -> int | None:
    shape = None if value is None else value.tensor.static_shape
    if shape is None:
        return None
    out = 1
    for d in shape:
        out *= d
    return out


def _bytes(value: Value | None) -> int:
    size = _count(value)
    element = None if value is None else value.tensor.dtype
    return 0 if size is None or element is None else element.nbytes(size)


def _zero_kind(value: Value | None) -> ZeroKind:
    if value is None:
        return "none"
    element = value.tensor.dtype
    return "float" if element is not None and element.is_float else "int"


def low_bit(op: Op) -> LowBit | None:
    """``op`` as a low-bit node, or None when it is none."""
    places = PLACES.get(op.name)
    if places is None and op.name.startswith(MS + "QOrdered"):
        places = Places("linear", 0, 2, None)
    if places is None:
        return None
    left = _on_left(op, places)
    codes = op.operand(places.x if left else places.codes)
    element = None if codes is None else codes.tensor.dtype
    if places.kind == "cache" and (element is None or element.bits > 8):
        return None
    scales = None if places.scales is None else op.operand(places.scales)
    zero_place = places.x_zero if left else places.zeros
    zero = _zero_kind(None if zero_place is None else op.operand(zero_place))
    n, k = _shape(op, places, codes)
    bits, block = _packing(op, element)
    activation = None if op.operand(places.x) is None else _float_of(op, places, scales)
    signed = element is not None and element.signed
    if op.name not in BLOCKED and zero == "int" and signed and _all_zero(op.operand(zero_place or 0)):
        zero = "none"
    return LowBit(op, places, n, k, bits, signed, block, zero, activation)


def _on_left(op: Op, places: Places) -> bool:
    left, right = op.operand(places.x), op.operand(places.codes)
    return op.name in PRODUCTS and left is not None and left.is_const and not (right is not None and right.is_const)


def _packing(op: Op, element: DType | None) -> tuple[int, int | None]:
    """Bits of a code and the block size; None without blocks."""
    attrs: dict[str, Any] = op.attrs
    width = 8 if element is None else element.bits
    block = attrs.get("block_size")
    block = block if isinstance(block, int) and block > 0 else None
    if op.name == MS + "MatMulNBits":
        bits = attrs.get("bits", 4)
        return (bits if isinstance(bits, int) else 4), block
    if op.name == MS + "MatMulBnb4":
        return 4, block
    if op.name == MS + "GatherBlockQuantized":
        bits = attrs.get("bits", 4) if element is not None and element.name == "uint8" else width
        return (bits if isinstance(bits, int) else 4), block or 128
    if op.name == MS + "GroupQueryAttention":
        width = attrs.get("kv_cache_bit_width", 0) or (4 if element is not None and element.name == "uint8" else width)
        return (width if isinstance(width, int) else 8), None
    if op.name == MS + "QMoE":
        bits = attrs.get("expert_weight_bits", 4)
        return (bits if isinstance(bits, int) else 4), block
    return width, None


def _float_of(op: Op, places: Places, scales: Value | None) -> DType | None:
    """The float type that the node computes in: its activation's, its scales', or its result's."""
    for value in (op.operand(places.x), scales, *op.results[:1]):
        element = None if value is None else value.tensor.dtype
        if element is not None and element.is_float:
            return element
    return TABLE["f32"] if op.name not in BLOCKED else None


def _shape(op: Op, places: Places, codes: Value | None) -> tuple[int, int]:
    """Output features and reduction length, rows and columns of a table."""
    attrs = op.attrs
    if isinstance(attrs.get("N"), int) and isinstance(attrs.get("K"), int):
        return attrs["N"], attrs["K"]
    shape = None if codes is None else codes.tensor.static_shape
    if not shape or places.kind == "cache":
        return 0, 0
    if op.name == MS + "GatherBlockQuantized":
        element = codes.tensor.dtype if codes is not None else None
        bits = attrs.get("bits", 4)
        wide = element is not None and element.name == "uint8" and isinstance(bits, int) and 0 < bits <= 8
        columns = 1
        for d in shape[1:]:
            columns *= d
        return shape[0], columns * 8 // bits if wide else columns
    if op.name == MS + "QMoE" and len(shape) == 3:
        return shape[1], shape[2] * 8 // max(1, _packing(op, None)[0])
    if places.kind == "conv":
        k = 1
        for d in shape[1:]:
            k *= d
        return shape[0], k
    if _on_left(op, places):
        return (1, *shape)[-2], shape[-1]
    if len(shape) < 2:
        return shape[-1], 1
    flip = op.name == MS + "QGemm" and attrs.get("transB", 0) == 1
    return (shape[-2], shape[-1]) if flip else (shape[-1], shape[-2])


def _all_zero(value: Value | None) -> bool:
    return _all_code(value, 0)


def _all_code(value: Value | None, code: int) -> bool:
    payload = None if value is None else value.payload
    return payload is not None and payload.size <= 1 << 20 and bool((payload.array() == code).all())


def low_bit_nodes(graph: Graph) -> Iterator[LowBit]:
    """Every low-bit node of ``graph`` and its regions."""
    for op in graph.walk():
        if (node := low_bit(op)) is not None:
            yield node
