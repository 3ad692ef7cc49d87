"""The RMS norm that makes a value, as one op or in the parts that models write: a quantizer behind it computes it."""

from __future__ import annotations

from dataclasses import dataclass

from qcompiler.backends.torch.held import argument
from qcompiler.ir import Op, Value

_CASTS = ("aten.to.dtype", "aten._to_copy.default", "aten.type_as.default")


@dataclass(frozen=True)
class RmsNorm:
    """``x / sqrt(mean(x^2) + eps) * weight`` along the last axis, ``weight`` a constant ``[K]``."""

    x: Value
    weight: Value
    eps: float


def rms_norm_behind(value: Value) -> RmsNorm | None:
    """The norm that makes ``value`` of something of its type and shape; None where there is none."""
    maker = value.owner
    if maker is None:
        return None
    found = _whole(maker) if maker.name == "aten.rms_norm.default" else _parts(maker)
    if found is None or found.x.type != value.type:
        return None
    if any(user.meta.get("effect") == "write" for user in found.x.users):
        return None  # what the quantizer would read, later, may be something else
    last = (value.tensor.shape or (None,))[-1]
    fits = found.weight.is_const and found.weight.tensor.static_shape == (last,)
    return found if fits and found.weight.tensor.dtype == value.tensor.dtype else None


def _whole(op: Op) -> RmsNorm | None:
    x, sizes, weight, eps = (argument(op, i) for i in range(4))
    if not isinstance(x, Value) or not isinstance(weight, Value) or not isinstance(eps, float) or len(sizes) != 1:
        return None
    return RmsNorm(x, weight, eps)


def _parts(op: Op) -> RmsNorm | None:
    """``weight * cast(wide * rsqrt(mean(wide^2) + eps))`` with ``wide = cast(x)``; either cast may be absent."""
    if op.name != "aten.mul.Tensor":
        return None
    for weight, product in ((op.operand(0), op.operand(1)), (op.operand(1), op.operand(0))):
        scaled = _made(_uncast(product), "aten.mul.Tensor")
        if weight is None or not weight.is_const or scaled is None:
            continue
        for wide, root in ((scaled.operand(0), scaled.operand(1)), (scaled.operand(1), scaled.operand(0))):
            eps = _eps(root, wide)
            x = _uncast(wide)
            if eps is not None and x is not None:
                return RmsNorm(x, weight, eps)
    return None


def _eps(root: Value | None, wide: Value | None) -> float | None:
    """``eps`` where ``root`` is ``rsqrt(mean(wide^2) + eps)`` over the last axis."""
    inverse = _made(root, "aten.rsqrt.default")
    total = None if inverse is None else _made(inverse.operand(0), "aten.add.Tensor")
    mean = None if total is None else _made(total.operand(0), "aten.mean.dim")
    square = None if mean is None else mean.operand(0)
    if total is None or mean is None or square is None or square.owner is None or wide is None:
        return None
    eps, axes, kept = argument(total, 1), argument(mean, 1), argument(mean, 2)
    rank = wide.tensor.rank
    last = axes in ((-1,), (None if rank is None else rank - 1,))
    if not isinstance(eps, float) or not last or kept is not True or dict(total.attrs.get("kwargs", ())):
        return None
    maker = square.owner
    power = maker.name == "aten.pow.Tensor_Scalar" and argument(maker, 1) == 2
    itself = maker.name == "aten.mul.Tensor" and maker.operand(1) is wide
    return eps if maker.operand(0) is wide and (power or itself) else None


def _made(value: Value | None, name: str) -> Op | None:
    owner = None if value is None else value.owner
    return owner if owner is not None and owner.name == name else None


def _uncast(value: Value | None) -> Value | None:
    """What ``value`` was before it was cast, or itself."""
    owner = None if value is None else value.owner
    return owner.operand(0) if owner is not None and owner.name in _CASTS else value
