"""The laws of the ``q.*`` ops whose activations are codes, or become codes inside. See :mod:`qcompiler.spec`."""

from __future__ import annotations

from collections.abc import Callable

from qcompiler.ir import Op, Value
from qcompiler.op_spec import fail, has_codes, need, parameters, product, scale_shape, scheme_of, shaped
from qcompiler.scheme import Scheme

POINTWISE = frozenset({"Add", "Mul", "Sigmoid", "LeakyRelu", "Softmax"})
FUNCTIONS = POINTWISE | {"Concat", "AveragePool", "GlobalAveragePool"}
"""What ``fn`` of a ``q.apply`` may be: the ONNX op that it computes on the dequantized operands."""


def _static(op: Op, key: str) -> Scheme:
    """The per-tensor scheme of an activation whose parameters are operands."""
    scheme = scheme_of(op, key)
    if scheme.granularity != "tensor":
        fail(op, f"{key} is <{scheme}>; codes of activations are scaled per tensor")
    return scheme


def _activation(op: Op, first: int, scheme: Scheme) -> Value:
    """Codes, scale and zero point of an activation in operands ``first`` to ``first + 2``; the codes."""
    codes = need(op, first, "codes")
    has_codes(op, codes, scheme)
    parameters(op, first + 1, (), scheme)
    return codes


def _result(op: Op, first: int, *, optional: bool) -> None:
    """Operands ``first`` and ``first + 1``: scale and zero point of the result, where it has ``y_scheme``."""
    if optional and "y_scheme" not in op.attrs:
        if op.operand(first) is not None or op.operand(first + 1) is not None:
            fail(op, "a float result has no scale and no zero point")
        if op.result.tensor.dtype is not None and not (
            op.result.tensor.dtype.is_float and op.result.tensor.dtype.bits > 8
        ):
            fail(op, f"the result is {op.result.tensor.dtype}; codes need a y_scheme")
        return
    scheme = _static(op, "y_scheme")
    parameters(op, first, (), scheme)
    has_codes(op, op.result, scheme)


def _dynamic(op: Op) -> Value:
    """The float activation in operand 0 of an op that quantizes it by ``x_scheme`` inside."""
    x, scheme = need(op, 0, "an activation"), scheme_of(op, "x_scheme")
    if not scheme.dynamic:
        fail(op, f"x_scheme is <{scheme}>; {op.name} quantizes its activation at run time, so it is dynamic")
    if x.tensor.dtype is not None and not x.tensor.dtype.is_float:
        fail(op, f"the activation is {x.tensor.dtype}, not a float")
    return x


def _choose_qparams(op: Op) -> None:
    x, scheme = need(op, 0, "a tensor"), scheme_of(op)
    if not scheme.dynamic:
        fail(op, f"<{scheme}> is not dynamic: its parameters are constants, not computed")
    if len(op.results) != (1 if scheme.symmetric else 2):
        fail(op, f"<{scheme}> has {'a scale' if scheme.symmetric else 'a scale and a zero point'} as results")
    shape = x.tensor.static_shape
    if scheme.granularity == "tensor" or shape is not None:
        for value in op.results:
            shaped(op, value, scale_shape(shape or (), scheme), "a result")
    if not scheme.symmetric:
        has_codes(op, op.results[1], scheme)


def _linear_static(op: Op) -> None:
    product(op, _activation(op, 0, _static(op, "x_scheme")), 3)
    _result(op, 7, optional=True)


def _linear_dyn(op: Op) -> None:
    product(op, _dynamic(op), 1)


def _conv(op: Op, x: Value, first: int) -> None:
    """Weights ``[O, I / group, ...]`` and bias of a convolution from operand ``first``."""
    scheme, codes = scheme_of(op), need(op, first, "codes")
    has_codes(op, codes, scheme)
    if scheme.granularity not in ("tensor", "channel") or (scheme.granularity == "channel" and scheme.axis != 0):
        fail(op, f"<{scheme}>: weights of a convolution are scaled per tensor or per channel along axis 0")
    shape = codes.tensor.static_shape
    parameters(op, first + 1, None if shape is None else scale_shape(shape, scheme), scheme)
    if shape is None:
        return
    group, given = op.attrs.get("group", 1), x.tensor.shape
    if shape[0] % group:
        fail(op, f"{shape[0]} output channels do not divide into {group} groups")
    if given is not None and len(given) > 1 and isinstance(given[1], int) and given[1] != shape[1] * group:
        fail(op, f"the activation has {given[1]} channels, the codes ask for {shape[1]} x {group} groups")
    if (bias := op.operand(first + 3)) is not None:
        shaped(op, bias, (shape[0],), "the bias")


def _conv_static(op: Op) -> None:
    _conv(op, _activation(op, 0, _static(op, "x_scheme")), 3)
    _result(op, 7, optional=True)


def _conv_dyn(op: Op) -> None:
    if scheme_of(op, "x_scheme").granularity != "tensor":
        fail(op, f"x_scheme is <{scheme_of(op, 'x_scheme')}>; a convolution has one scale for all of its activation")
    _conv(op, _dynamic(op), 1)


def _matmul(op: Op) -> None:
    a = _activation(op, 0, _static(op, "a_scheme")).tensor.shape
    b = _activation(op, 3, _static(op, "b_scheme")).tensor.shape
    if a and b and len(b) > 1 and isinstance(a[-1], int) and isinstance(b[-2], int) and a[-1] != b[-2]:
        fail(op, f"the left operand ends in {a[-1]}, the right one has {b[-2]} rows")
    _result(op, 6, optional=True)


def _apply(op: Op) -> None:
    fn = op.attrs.get("fn")
    if fn not in FUNCTIONS:
        fail(op, f"fn is {fn!r}; it is one of {', '.join(sorted(FUNCTIONS))}")
    scheme, count = _static(op, "x_scheme"), apply_arity(op)
    if count < 1 or (fn in ("Add", "Mul") and count != 2) or (fn not in ("Add", "Mul", "Concat") and count != 1):
        fail(op, f"{fn} has {count} operands of codes, scale and zero point")
    for i in range(count):
        _activation(op, 3 * i, scheme)
    _result(op, 3 * count, optional=False)


def apply_arity(op: Op) -> int:
    """How many quantized operands (codes, scale, zero point) a ``q.apply`` has before the parameters of its result."""
    return (len(op.operands) - 1) // 3


def _scale(op: Op) -> None:
    x, s = need(op, 0, "an activation"), need(op, 1, "factors")
    if s.tensor.rank not in (None, 1):
        fail(op, f"the factors have rank {s.tensor.rank}, q.scale takes [K]")
    last = x.tensor.shape[-1] if x.tensor.shape else None
    if isinstance(last, int):
        shaped(op, s, (last,), "the factors")


SPECS: dict[str, Callable[[Op], None]] = {
    "q.choose_qparams": _choose_qparams,
    "q.linear_static": _linear_static,
    "q.linear_dyn": _linear_dyn,
    "q.conv": _conv_static,
    "q.conv_dyn": _conv_dyn,
    "q.matmul": _matmul,
    "q.apply": _apply,
    "q.scale": _scale,
}
