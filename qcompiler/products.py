"""Products with a quantized weight, or of two activations: which of their operands are activations, and what they ask.

They are read from the pair form: ``op(x, q.dequantize(q.quantize(w, s, z), s, z))``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qcompiler.bias_correction import uncorrect
from qcompiler.conv_views import as_conv
from qcompiler.dtypes import F32, DType
from qcompiler.ir import Graph, Op, Use, Value
from qcompiler.movement import opset
from qcompiler.pairs import is_constant
from qcompiler.payload import ComputedPayload
from qcompiler.requests import BATCHED, LEFT, SIGNED_RIGHT, request_for
from qcompiler.rewrite import Declined
from qcompiler.scheme import Scheme
from qcompiler.target import Reason, Request, Target
from qcompiler.views import CONV_OPS, LINEAR_OPS, as_linear, through_transposes
from qcompiler.weights import WeightQuantization

Kind = Literal["linear", "conv", "matmul"]


@dataclass(frozen=True)
class Product:
    """``slots`` are the operands of ``op`` that are activations, ``weights`` those that are dequantized constants.

    ``scheme`` is the weight's, None for a product of two activations; ``reason`` why it is no linear and no
    convolution that a kernel could serve.
    """

    op: Op
    kind: Kind
    slots: tuple[int, ...]
    weights: tuple[int, ...]
    site: str
    scheme: Scheme | None = None
    n: int = 0
    k: int = 0
    bias: bool = False
    reason: Reason | None = None

    @property
    def inputs(self) -> list[Value]:
        """The activations."""
        return [v for v in (self.op.operand(i) for i in self.slots) if v is not None]

    @property
    def element(self) -> DType:
        """The type of the activations; f32 where it is not known."""
        found = [v.tensor.dtype for v in self.inputs if v.tensor.dtype is not None]
        return next((t for t in found if t is not F32), found[0] if found else F32)

    def request(self, x: Scheme) -> Request:
        """What it asks of a kernel once its activations are quantized by ``x``; a linear for a float result."""
        how = "dyn" if x.dynamic else "static"
        if self.kind == "conv":
            name = "q.conv_dyn" if x.dynamic else "q.conv"
            codes = self.op.operand(1)
            operands = [self.op.operand(0), codes] if x.dynamic else [self.op.operand(0), None, None, codes]
            attrs = {"scheme": self.scheme, "x_scheme": x} | ({} if x.dynamic else {"y_scheme": x})
            return replace(request_for(name, operands, attrs), bias=self.bias, activation=self.element)
        traits: set[str] = set()
        if self.kind == "matmul":
            right = self.scheme if 1 in self.weights and self.scheme is not None else x
            left = self.scheme if 0 in self.weights and self.scheme is not None else x
            traits |= ({LEFT} if 0 in self.weights else set()) | (
                {SIGNED_RIGHT} if right.dtype.signed and 1 not in self.weights else set()
            )
            return Request(
                "q.matmul",
                right,
                max(self.n, 1),
                max(self.k, 1),
                self.element,
                x=left,
                traits=frozenset(traits),
                opset=_opset(self.op),
            )
        assert self.scheme is not None
        if self.inputs[0].tensor.rank != 2:
            traits.add(BATCHED)
        scheme = self.scheme.with_axis(1)
        return Request(
            f"q.linear_{how}",
            scheme,
            self.n,
            self.k,
            self.element,
            self.bias,
            x,
            traits=frozenset(traits),
            opset=_opset(self.op),
        )


def _opset(op: Op) -> int:
    found = opset(op)
    return 0 if found >= 1 << 16 else found


def weight_slots(op: Op) -> tuple[int, ...]:
    """The operands that are dequantized constants, possibly behind transposes of a matrix."""
    out = []
    for i, value in enumerate(op.operands):
        owner = None if value is None else through_transposes(value)[0].owner
        if owner is not None and owner.name == "q.dequantize" and is_constant(owner.operand(0)):
            out.append(i)
    return tuple(out)


def weight_dequantize(op: Op, slot: int) -> Op:
    """The dequantize behind operand ``slot``, which is one of :func:`weight_slots`."""
    value = op.operand(slot)
    owner = None if value is None else through_transposes(value)[0].owner
    assert owner is not None
    return owner


def find_products(graph: Graph, *, matmuls: bool = False) -> Iterator[Product]:
    """Every product of ``graph`` and its regions whose weight is quantized; with ``matmuls`` those of two activations.

    The latter are found at the top level only.
    """
    for op in graph.walk():
        if op.name not in LINEAR_OPS and op.name not in CONV_OPS:
            continue
        weights = weight_slots(op)
        if not weights:
            if matmuls and op.graph is graph and _is_float_matmul(op):
                yield Product(op, "matmul", (0, 1), (), op.label)
            continue
        yield _conv(op, weights) if op.name in CONV_OPS else _linear(op, weights)


def _is_float_matmul(op: Op) -> bool:
    """``x @ y`` of two values that are computed."""
    values = [op.operand(0), op.operand(1)]
    return op.name == "onnx.MatMul" and all(v is not None and not is_constant(v) for v in values)


def _site(op: Op) -> str:
    return str(op.meta.get("site", op.label))


def _conv(op: Op, weights: tuple[int, ...]) -> Product:
    scheme: Scheme = weight_dequantize(op, weights[0]).attrs["scheme"]
    try:
        view = as_conv(op)
    except Declined as e:
        return Product(op, "conv", (0,), weights, _site(op), scheme, reason=e.reason)
    return Product(op, "conv", (0,), weights, _site(op), scheme, view.n, view.k, view.bias is not None)


def _linear(op: Op, weights: tuple[int, ...]) -> Product:
    scheme: Scheme = weight_dequantize(op, weights[0]).attrs["scheme"]
    site = _site(op)
    slots = tuple(i for i in (0, 1) if i not in weights)
    try:
        view = as_linear(op)
        if view.weight.owner is weight_dequantize(op, weights[0]):
            at = next(i for i, v in enumerate(op.operands) if v is view.x)
            return Product(op, "linear", (at,), weights, site, scheme, view.n, view.k, view.bias is not None)
    except Declined as e:
        if op.name != "onnx.MatMul" or len(slots) != 1:
            return Product(op, "linear", slots, weights, site, scheme, reason=e.reason)
    shape = (1, 1, *(weight_dequantize(op, weights[0]).result.tensor.static_shape or ()))
    return Product(op, "matmul", slots, weights, site, scheme, shape[-1], shape[-2])


def weight_uses(op: Op, slot: int) -> Iterator[tuple[Use, Op]]:
    """The use through which ``op`` alone reads the dequantize behind operand ``slot``, and that dequantize.

    The use is the operand itself, or that of the first transpose before it.
    """
    dq = weight_dequantize(op, slot)
    use, value = Use(op, slot), op.operand(slot)
    while value is not None and value is not dq.result and value.owner is not None:
        use, value = Use(value.owner, 0), value.owner.operand(0)
    if value is dq.result:
        yield use, dq


def restore_weights(product: Product) -> bool:
    """Let ``product`` read its float weights again; False where they are gone (a model that came quantized)."""
    found = [pair for slot in product.weights for pair in weight_uses(product.op, slot)]
    originals = []
    for _, dq in found:
        original = _original(dq)
        if original is None:
            return False
        originals.append(original)
    for (use, dq), original in zip(found, originals, strict=True):
        dq.result.replace_uses(original, [use])
        uncorrect(product.op, original)
    return True


def _original(dq: Op) -> Value | None:
    """The float weight that ``dq`` stands for; a constant again where only its codes are in the graph."""
    codes, scheme = dq.operand(0), dq.attrs["scheme"]
    if codes is None or codes.owner is not None:
        return None if codes is None or codes.owner is None else codes.owner.operand(0)
    made = codes.payload.computation if isinstance(codes.payload, ComputedPayload) else None
    if not isinstance(made, WeightQuantization) or made.scheme != scheme or made.flip:
        return None
    return codes.graph.add_const(codes.graph.fresh(dq.result.name.removesuffix("_dq")), made.weight)


def unserved(wishes: Sequence[Scheme], target: Target) -> Reason | None:
    """Why no kernel of ``target`` computes on activations by any of ``wishes``, naming those that it has; None where
    one does, whatever else it asks for."""
    rows = [r for r in target.rows if r.x_codes and r.op != "q.apply" and r.needs <= target.features]
    for row in rows:
        for s in wishes:
            if s.dtype.name in row.x_codes and s.granularity in row.x_granularities and s.dynamic == row.dynamic:
                return None
    known = sorted(
        {f"{c} {g}{' dynamic' if r.dynamic else ''}" for r in rows for c in r.x_codes for g in r.x_granularities}
    )
    text = " | ".join(s.text for s in wishes)
    if not known:
        return Reason("QC201", f"{target} has no kernel that computes on codes of activations", "leave them in float")
    told = ", ".join(known)
    return Reason("QC201", f"kernels of {target} take activations as {told}, not <{text}>", f"choose one of {told}")
