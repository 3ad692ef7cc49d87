"""Which DequantizeLinear and QuantizeLinear nodes ONNX Runtime fuses away by itself, foretold without running it.

The rules are those that its CPU optimizer showed at the default level (1.31): each was measured on graphs of the
verifier's test corpus, and where a shape or a type leaves a doubt, the answer is "not fused". With a run allowed, the
runtime's own optimized graph decides, and nothing here is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from qcompiler.backends.onnx.load import opset_of
from qcompiler.dtypes import Array
from qcompiler.ir import Dim, Op, Value
from qcompiler.verify.op_kinds import MOVES

DQ = frozenset({"onnx.DequantizeLinear", "com.microsoft.DequantizeLinear"})
Q = frozenset({"onnx.QuantizeLinear", "com.microsoft.QuantizeLinear"})
DYNAMIC = "onnx.DynamicQuantizeLinear"
BYTES = frozenset({"int8", "uint8"})
MOVABLE = frozenset(f"onnx.{n}" for n in ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice"))
"""Ops past which the optimizer moves a DequantizeLinear or QuantizeLinear with one scale."""
TYPED_QUANTIZE = 21
"""From this opset on a QuantizeLinear states its type, and the optimizer changes an int8 one that it has moved to uint8
without changing that statement: the model does not load."""


@dataclass(frozen=True)
class Fusion:
    """A low-bit node that the runtime will make: its type, the ops that vanish in it, the weight's dequantize.

    ``block`` is the block size of a ``MatMulNBits``. ``wrong`` says why the node's numbers will be off; empty if they
    will not. ``result`` is the value that the node gives.
    """

    op: Op
    kernel: str
    covered: frozenset[Op]
    result: Value
    weight: Op | None = None
    block: int | None = None
    wrong: str = ""


class NotFused(Exception):
    """The runtime leaves this op in float; the text says why."""


@dataclass
class Forecast:
    """What will be fused, why the rest will not (op -> reason), and which ops vanish."""

    fusions: list[Fusion] = field(default_factory=list)
    reasons: dict[Op, str] = field(default_factory=dict)
    dropped: set[Op] = field(default_factory=set)
    """Relus and Clips that the optimizer takes away, since the quantize behind them does their work."""

    @property
    def absorbed(self) -> frozenset[Op]:
        return frozenset(op for f in self.fusions for op in f.covered)


def dequantize_of(value: Value | None) -> Op | None:
    """The DequantizeLinear that makes ``value``."""
    op = None if value is None else value.owner
    return op if op is not None and op.name in DQ else None


def element(value: Value | None) -> str:
    """The name of the element type; empty where unknown."""
    found = None if value is None else value.tensor.dtype
    return "" if found is None else found.name


def code_type(op: Op) -> str:
    """The type of the codes that a DequantizeLinear reads or a QuantizeLinear gives; its zero point's where unknown."""
    value = op.results[0] if op.name in Q else op.operand(0)
    return element(value) or element(op.operand(2))


def shape_of(value: Value | None) -> tuple[Dim, ...] | None:
    """The shape; that of the codes where the type of a dequantized value was not inferred."""
    if value is None or value.tensor.shape is not None:
        return None if value is None else value.tensor.shape
    op = value.owner
    return shape_of(op.operand(0)) if op is not None and op.name in DQ | Q else None


def rank(value: Value | None) -> int | None:
    shape = shape_of(value)
    return None if shape is None else len(shape)


def only_user(value: Value) -> Op | None:
    """The one op that reads ``value``, identities passed; None when there are several, none, or it leaves the graph."""
    uses = list(value.uses)
    if len(uses) != 1 or not isinstance(uses[0].user, Op):
        return None
    user = uses[0].user
    return only_user(user.results[0]) if user.name == "onnx.Identity" else user


def activation_of(value: Value | None) -> tuple[Op, bool] | None:
    """The DequantizeLinear of an activation, and whether data movement stands between; None where there is none."""
    moved = False
    while value is not None:
        if (dq := dequantize_of(value)) is not None:
            return dq, moved
        op = value.owner
        if op is None or op.name not in MOVABLE:
            return None
        value, moved = op.operand(0), True
    return None


def weight_of(value: Value | None) -> tuple[Op, tuple[Op, ...]] | None:
    """The DequantizeLinear of a weight, and the transposes behind it."""
    path: list[Op] = []
    while value is not None:
        if (dq := dequantize_of(value)) is not None:
            return dq, tuple(path)
        op = value.owner
        if op is None or op.name != "onnx.Transpose":
            return None
        path.append(op)
        value = op.operand(0)
    return None


def settled(value: Value | None) -> Value | None:
    """``value`` itself, or what it is an identity of: the optimizer drops those first."""
    while value is not None and value.owner is not None and value.owner.name == "onnx.Identity":
        value = value.owner.operand(0)
    return value


def is_constant(value: Value | None) -> bool:
    found = settled(value)
    return found is not None and found.is_const


def constant_array(value: Value | None) -> Array | None:
    """The values of a constant; None for anything else."""
    found = settled(value)
    return found.payload.array() if found is not None and found.is_const and found.payload is not None else None


def scale_is_f32(dq: Op) -> bool:
    return element(dq.operand(1)) in ("f32", "")


def readers(dq: Op) -> int:
    """How many places read codes of ``dq`` after it: its own uses, and those of other dequantizes of the same codes."""
    codes = dq.operand(0)
    others = [] if codes is None or is_constant(codes) else [u for u in codes.users if u.name in DQ]
    return sum(len(o.results[0].uses) for o in others or [dq])


def need_bytes(dq: Op, what: str) -> None:
    """Raise unless the codes are 8 bits with f32 scales."""
    kind = code_type(dq)
    if kind not in BYTES:
        raise NotFused(f"{what} has {kind or 'unknown'} codes, and the integer kernels take int8 and uint8")
    if not scale_is_f32(dq):
        raise NotFused(f"{what} has {element(dq.operand(1))} scales, and the integer kernels take f32 ones")


def need_activation(dq: Op, moved: bool) -> None:
    """Raise unless an activation's DequantizeLinear can be fused into what reads it."""
    need_bytes(dq, f"the activation of '{dq.label}'")
    if code_type(dq) == "int8":
        if moved and opset_of(dq.graph) >= TYPED_QUANTIZE:
            raise NotFused(f"the int8 activation of '{dq.label}' passes data movement; only uint8 survives that")
        if readers(dq) > 1:
            raise NotFused(f"the int8 activation of '{dq.label}' is read {readers(dq)} times; only uint8 may be")


def need_result(tail: Tail) -> None:
    """Raise unless an int8 result is read once: the optimizer turns that into uint8, and leaves what is read twice."""
    if tail.quantize is None or code_type(tail.quantize) != "int8":
        return
    times = sum(len(u.results[0].uses) if u.name in DQ else 1 for u in tail.quantize.results[0].users)
    if times > 1:
        raise NotFused(f"its int8 result is read {times} times; only uint8 may be")


def block_scales(dq: Op) -> bool:
    """Scales in blocks along an axis."""
    return bool(dq.attrs.get("block_size", 0)) or (rank(dq.operand(1)) or 0) > 1


@dataclass(frozen=True)
class Tail:
    """What follows an op: an activation that is absorbed, then the quantize of the result."""

    covered: tuple[Op, ...]
    quantize: Op | None
    result: Value


def tail_of(op: Op) -> Tail:
    """Follow the result to its QuantizeLinear; raises NotFused where a Relu, Clip or second reader is in the way."""
    result, covered = op.results[0], (op,)
    following = only_user(result)
    if following is not None and following.name in ("onnx.Relu", "onnx.Clip"):
        after = following.results[0]
        single = only_user(after)
        if single is not None:
            if single.name not in Q or not redundant(following, single):
                kind = following.name.rpartition(".")[2]
                raise NotFused(f"{kind} '{following.label}' behind it is fused into the float op first")
            return Tail((op, following, single), single, single.results[0])
    quantizes = [u for u in result.users if u.name in Q]
    if not quantizes:
        return Tail(covered, None, result)
    if following is None or following is not quantizes[0]:
        raise NotFused(f"its result is quantized by '{quantizes[0].label}' and read elsewhere too")
    return Tail((op, following), following, following.results[0])


def redundant(clip: Op, quantize: Op) -> bool:
    """A Relu or Clip that cuts off nothing which the quantize behind it does not cut off too."""
    scale, zero = constant_array(quantize.operand(1)), constant_array(quantize.operand(2))
    codes = {"uint8": (0, 255), "int8": (-128, 127)}.get(code_type(quantize) or "uint8")
    if scale is None or codes is None or scale.size != 1 or (zero is None and quantize.operand(2) is not None):
        return False
    middle = 0.0 if zero is None else float(zero.reshape(-1)[0])
    low, high = ((c - middle) * float(scale.reshape(-1)[0]) for c in codes)
    slack = 1e-6 * (high - low)
    if clip.name == "onnx.Relu":
        return low >= -slack
    bounds = [constant_array(v) for v in (clip.operand(1), clip.operand(2))]
    if any(b is None for b, v in zip(bounds, (clip.operand(1), clip.operand(2)), strict=True) if v is not None):
        return False
    under, over = bounds
    return (under is None or low >= float(under) - slack) and (over is None or high <= float(over) + slack)


def same_parameters(a: Op, b: Op) -> bool:
    """A DequantizeLinear and a QuantizeLinear with one scale and zero point, equal in value."""
    return all(_equal(a.operand(i), b.operand(i)) for i in (1, 2))


def _equal(a: Value | None, b: Value | None) -> bool:
    if settled(a) is settled(b):
        return True
    left, right = constant_array(a), constant_array(b)
    if left is None or right is None or left.size != 1 or right.size != 1:
        return False
    return bool(left.reshape(-1)[0] == right.reshape(-1)[0])


def behind_movement(value: Value) -> Iterator[Op]:
    """The ops that read ``value`` directly or after data movement."""
    for user in value.users:
        yield user
        if user.name in MOVES and user.results:
            yield from behind_movement(user.results[0])
