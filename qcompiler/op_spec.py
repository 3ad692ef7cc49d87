"""The laws of the ``q.*`` ops that hold codes of weights: what their operands must be. See :mod:`qcompiler.spec`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from qcompiler.errors import StructureError
from qcompiler.ir import Op, Value
from qcompiler.scheme import Scheme
from qcompiler.text import show_op


def scale_shape(shape: tuple[int, ...], scheme: Scheme) -> tuple[int, ...]:
    """The shape of scales and zeros for a tensor of ``shape``; raises StructureError where the axis does not exist."""
    if scheme.granularity == "tensor":
        return ()
    if scheme.granularity == "token" and shape:
        return (*shape[:-1], 1)
    if scheme.granularity == "block" and scheme.dynamic and shape:
        return (*shape[:-1], -(-shape[-1] // scheme.group[1]))
    if scheme.axis is None or not -len(shape) <= scheme.axis < len(shape):
        raise StructureError(f"scheme <{scheme}> has no axis in a tensor of rank {len(shape)}")
    axis = scheme.axis % len(shape)
    if scheme.granularity == "channel":
        return (shape[axis],)
    if scheme.granularity == "group":
        return (*shape[:axis], scheme.groups(shape[axis]), *shape[axis + 1 :])
    if scheme.granularity == "block" and len(shape) == 2:
        sizes = scheme.group if axis == 1 else scheme.group[::-1]
        return -(-shape[0] // sizes[0]), -(-shape[1] // sizes[1])
    raise StructureError(f"scheme <{scheme}>: a tensor of rank {len(shape)} has no {scheme.granularity} scales")


def column_shape(n: int, k: int, scheme: Scheme) -> tuple[int, int]:
    """The shape of scales and zeros beside codes ``[N, K]``: one row a feature, or a block; ``[1, 1]`` per tensor."""
    if scheme.granularity == "tensor":
        return 1, 1
    if scheme.granularity == "block":
        return -(-n // scheme.group[0]), -(-k // scheme.group[1])
    return n, scheme.groups(k)


def fail(op: Op, why: str) -> NoReturn:
    """Raise StructureError with the op's text and its source line."""
    source = f" (from {op.loc.source})" if op.loc.source else ""
    raise StructureError(f"{why}; in: {show_op(op, locs=False)}{source}")


def scheme_of(op: Op, key: str = "scheme") -> Scheme:
    """The scheme in attribute ``key``."""
    scheme = op.attrs.get(key)
    if not isinstance(scheme, Scheme):
        fail(op, f"{op.name} needs a scheme as its attribute {key}")
    return scheme


def need(op: Op, index: int, what: str) -> Value:
    """Operand ``index``, which is not optional."""
    value = op.operand(index)
    if value is None:
        fail(op, f"{op.name} needs {what} as operand {index}")
    return value


def shaped(op: Op, value: Value, shape: tuple[int, ...], what: str) -> None:
    """``value`` has ``shape``, where its shape is known."""
    have = value.tensor.static_shape
    if have is not None and have != shape:
        fail(op, f"{what} has shape {list(have)}, the scheme asks for {list(shape)}")


def parameters(op: Op, first: int, shape: tuple[int, ...] | None, scheme: Scheme) -> None:
    """Operands ``first`` (scale) and ``first + 1`` (zero) agree with the scheme."""
    scale, zero = need(op, first, "a scale"), op.operand(first + 1)
    if scale.tensor.dtype is not None and not scale.tensor.dtype.is_float:
        fail(op, f"the scale is {scale.tensor.dtype}, not a float")
    if (zero is None) != scheme.symmetric:
        fail(op, "an asymmetric scheme has a zero point and a symmetric one has none")
    if shape is not None:
        shaped(op, scale, shape, "the scale")
        if zero is not None:
            shaped(op, zero, shape, "the zero point")


def has_codes(op: Op, value: Value, scheme: Scheme) -> None:
    """``value`` has the code type of ``scheme``."""
    have = value.tensor.dtype
    if have is not None and have != scheme.dtype:
        fail(op, f"codes are {have}, the scheme says {scheme.dtype}")


def _quantize(op: Op) -> None:
    scheme, x = scheme_of(op), need(op, 0, "a tensor")
    shape = x.tensor.static_shape
    parameters(op, 1, None if shape is None else scale_shape(shape, scheme), scheme)
    has_codes(op, op.result, scheme)


def _dequantize(op: Op) -> None:
    scheme, codes = scheme_of(op), need(op, 0, "codes")
    shape = codes.tensor.static_shape
    parameters(op, 1, None if shape is None else scale_shape(shape, scheme), scheme)
    has_codes(op, codes, scheme)


def matrix(op: Op, scheme: Scheme, first: int = 1) -> tuple[int, int] | None:
    """N and K of the codes ``[N, K]`` in operand ``first``, which scale and zero point follow; None where unknown."""
    codes = need(op, first, "codes")
    has_codes(op, codes, scheme)
    if codes.tensor.rank not in (None, 2):
        fail(op, f"codes have rank {codes.tensor.rank}, {op.name} takes [N, K]")
    if scheme.axis != 1:
        fail(op, f"{op.name} groups along K, axis 1 of its codes, not axis {scheme.axis}")
    shape = codes.tensor.static_shape
    if shape is not None:
        parameters(op, first + 1, column_shape(shape[0], shape[1], scheme), scheme)
        return shape[0], shape[1]
    return None


def product(op: Op, x: Value, first: int) -> None:
    """Weights and bias of a linear from operand ``first``; ``x`` ends in K."""
    nk = matrix(op, scheme_of(op), first)
    bias = op.operand(first + 3)
    if nk is None:
        return
    if x.tensor.shape and isinstance(x.tensor.shape[-1], int) and x.tensor.shape[-1] != nk[1]:
        fail(op, f"the activation ends in {x.tensor.shape[-1]}, the codes have K={nk[1]}")
    if bias is not None:
        shaped(op, bias, (nk[0],), "the bias")


def _linear(op: Op) -> None:
    product(op, need(op, 0, "an activation"), 1)


def _embedding(op: Op) -> None:
    matrix(op, scheme_of(op))
    indices = need(op, 0, "indices")
    if indices.tensor.dtype is not None and not indices.tensor.dtype.is_integer:
        fail(op, f"indices are {indices.tensor.dtype}, not integers")


SPECS: dict[str, Callable[[Op], None]] = {
    "q.quantize": _quantize,
    "q.dequantize": _dequantize,
    "q.linear": _linear,
    "q.embedding": _embedding,
}
