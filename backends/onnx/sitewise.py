"""Where a site's result can be seen in the compiled graph, and which tensor of the float graph it stands for.

A site of the artifact is a low-bit product or convolution, or a float one that kept its weight. Its tensor in the
reference is the one of the same name; else it is found through the node of the same name: a node of the artifact that
has absorbed what follows it (a bias, a Relu) computes the last value before the first op that the artifact still has.
Codes are read as ``(code - zero point) * scale`` with the constants of their own node.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from qcompiler.backends.onnx.judge import NO_SITES
from qcompiler.backends.onnx.nodes import DEFAULT, MS, low_bit
from qcompiler.dtypes import Array
from qcompiler.ir import Graph, Op, Value
from qcompiler.verify.op_kinds import MOVES, is_product

RESULT_SCALE = {
    DEFAULT + "QLinearMatMul": 6,
    DEFAULT + "QLinearConv": 6,
    MS + "QLinearConv": 6,
    MS + "QGemm": 7,
}
"""Operand that holds the scale of the result's codes; the zero point follows it."""
SCALES = frozenset({DEFAULT + "Mul", DEFAULT + "BatchNormalization"})
FOLLOWED = SCALES | {DEFAULT + name for name in ("Cast", "Add", "DequantizeLinear", "Reshape", "Relu", "Clip")}
"""Ops that finish what an integer product began."""


@dataclass
class SiteTap:
    """One site: its ``got`` in the artifact, ``want`` in the reference; or the ``reason`` for which it has none."""

    name: str
    op: str
    got: Value = field(repr=False)
    want: Value = field(repr=False)
    reason: str = ""
    scale: Array | None = field(default=None, repr=False)
    zero: Array | None = field(default=None, repr=False)

    @property
    def tensor(self) -> str:
        """The tensor of the reference."""
        return "" if self.reason else self.want.name

    def as_float(self, array: Array) -> Array:
        """Codes dequantized in float64; a float as it is."""
        if self.scale is None:
            return array
        zero = 0.0 if self.zero is None else self.zero.astype(np.float64)
        return (array.astype(np.float64) - zero) * self.scale.astype(np.float64)


def site_taps(reference: Graph, artifact: Graph) -> list[SiteTap]:
    """Every site of ``artifact`` at its top, in order."""
    nodes = _nodes(reference)
    kept = {op.label for op in artifact.walk()}
    out = []
    for op in artifact.walk():
        if _is_site(op) and op.results:
            tap = SiteTap(op.label, op.name.rpartition(".")[2], op.results[0], op.results[0])
            _place(tap, op, reference, nodes, kept)
            out.append(tap)
    return out


def _nodes(reference: Graph) -> dict[str, Op]:
    """The ops at the top of the reference by name; products also by what belongs to them alone: their module and
    their weight, with and without ``.weight`` behind it, since sites are called like these."""
    products = [op for op in reference.walk() if is_product(op) and op.graph is reference]
    names = [(name, op) for op in products for name in dict.fromkeys((op.loc.scope, *_weight_names(op)))]
    count = Counter(name for name, _ in names)
    found = {name: op for name, op in names if count[name] == 1}
    return found | {op.label: op for op in reference.walk() if op.graph is reference}


def _weight_names(op: Op) -> list[str]:
    """The names of the constants that ``op`` multiplies by, seen through what only moves or dequantizes them."""
    out = []
    for value in op.operands[:2]:
        while (
            value is not None and value.owner is not None and (value.owner.name in MOVES or _dequantizes(value.owner))
        ):
            value = value.owner.operand(0)
        if value is not None and value.is_const:
            out += [value.name, value.name.removesuffix(".weight")]
    return out


def _dequantizes(op: Op) -> bool:
    return op.name.endswith("DequantizeLinear")


def _is_site(op: Op) -> bool:
    node = low_bit(op)
    if node is not None:
        return node.kind not in NO_SITES and node.kind != "embedding"
    return is_product(op) and any(_is_weight(v) for v in op.operands[1:])


def _is_weight(value: Value | None) -> bool:
    """A constant, or one behind a dequantize."""
    if value is None or value.is_const:
        return value is not None and len(value.tensor.shape or ()) >= 2
    maker = value.owner
    return maker is not None and _dequantizes(maker) and _is_weight(maker.operand(0))


def _place(tap: SiteTap, op: Op, reference: Graph, nodes: dict[str, Op], kept: set[str]) -> None:
    if op.graph.root is not op.graph:
        tap.reason = "it stands inside a region, whose values cannot be seen"
        return
    for value in _forward(op.results[0]):
        known = reference.local(value.name)
        if known is not None and known.owner is not None and _is_float(known) and not _is_whole(value):
            tap.got, tap.want = value, known
            return
    source = nodes.get(op.label)
    if source is None or not source.results:
        tap.reason = f"the reference has neither a tensor '{op.results[0].name}' nor a node '{op.label}'"
        return
    tap.want = _absorbed(source.results[0], kept)
    tap.got = next((v for v in _forward(op.results[0]) if op.name in RESULT_SCALE or not _is_whole(v)), op.results[0])
    if _is_whole(tap.got) and not _scaled(tap, op):
        tap.reason = (
            f"its result '{tap.got.name}' is {tap.got.tensor.dtype or 'of unknown type'}, with no constant scale"
        )


def _scaled(tap: SiteTap, op: Op) -> bool:
    """Read the constants that give the codes of ``op`` their meaning."""
    place = RESULT_SCALE.get(op.name)
    if place is None:
        return False
    scale, zero = op.operand(place), op.operand(place + 1)
    if scale is None or scale.payload is None or (zero is not None and zero.payload is None):
        return False
    tap.got, tap.scale = op.results[0], scale.payload.array()
    tap.zero = None if zero is None or zero.payload is None else zero.payload.array()
    return True


def _forward(value: Value) -> list[Value]:
    """``value`` and what the ops that finish it make of it, as long as each has one reader. Sums and factors finish
    it where they are constant, or where ``value`` is a sum of products of codes that is being scaled."""
    out, whole = [value], _is_whole(value)
    while len(out[-1].uses) == 1 and out[-1].users and (op := out[-1].users[0]).name in FOLLOWED and len(out) < 6:
        others = [v for v in op.operands if v is not None and v is not out[-1]]
        if not all(v.is_const for v in others) and not (whole and op.name in SCALES):
            break
        out.append(op.results[0])
    return out


def _absorbed(value: Value, kept: set[str]) -> Value:
    """The last value along single readers that the artifact has no op for; constants alone may join on the way."""
    while len(value.uses) == 1 and value.users and not value.is_output:
        op = value.users[0]
        others = [v for v in op.operands if v is not None and v is not value]
        if op.label in kept or is_product(op) or len(op.results) != 1 or op.regions:
            break
        if not all(v.is_const for v in others):
            break
        value = op.results[0]
    return value


def _is_whole(value: Value) -> bool:
    """A value of codes or sums of them; types that nobody inferred are those of contrib ops with float results, or
    with codes whose scale :data:`RESULT_SCALE` finds."""
    element = value.tensor.dtype
    if element is None and value.owner is not None:
        return value.owner.name in RESULT_SCALE and value.owner.operand(RESULT_SCALE[value.owner.name]) is not None
    return element is not None and not element.is_float


def _is_float(value: Value) -> bool:
    element = value.tensor.dtype
    return element is not None and element.is_float
