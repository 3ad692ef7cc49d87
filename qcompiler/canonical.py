"""From a dequantize as it stands to the canonical operands of ``q.linear`` and ``q.embedding``: codes ``[N, K]``."""

from __future__ import annotations

from collections.abc import Callable

from qcompiler.dtypes import Array
from qcompiler.ir import Op, Value
from qcompiler.payload import ComputedPayload, Payload, computed
from qcompiler.rewrite import Rewriter
from qcompiler.scheme import Scheme
from qcompiler.weights import transposed


def canonical_operands(dq: Op, rw: Rewriter, *, n_axis: int) -> tuple[Scheme, Value, Value, Value | None]:
    """Scheme (axis 1), codes ``[N, K]``, scales and zeros ``[N, G]`` of a dequantized matrix whose N is ``n_axis``.

    In blocks the scales are ``[ceil(N / rows), ceil(K / columns)]``.

    Constants are made once per dequantized tensor, so that tied layers share them. Declines with a reason where codes
    or parameters are no constants, or where the groups run along N.
    """
    codes, scale, zero = dq.operand(0), dq.operand(1), dq.operand(2)
    scheme: Scheme = dq.attrs["scheme"]
    for value in (codes, scale, zero):
        if value is not None and (not value.is_const or value.payload is None):
            raise rw.declined(
                f"'{dq.label}': {value!r} is no constant, and a fused kernel packs its weight before it runs",
                code="QC205",
                fix="make the codes, scales and zero points initializers",
            )
    assert codes is not None and scale is not None
    _check_axis(dq, rw, scheme, n_axis)
    n = codes.payload.shape[n_axis]  # type: ignore[union-attr]
    flip = n_axis == 1
    parameters = [
        None if v is None else _once(rw, v, f"ng{int(flip)}", lambda p: _parameter(p, scheme, n, flip))
        for v in (scale, zero)
    ]
    assert parameters[0] is not None
    if flip:
        codes = _once(rw, codes, "nk", _flipped)
    return scheme.with_axis(1), codes, parameters[0], parameters[1]


def _check_axis(dq: Op, rw: Rewriter, scheme: Scheme, n_axis: int) -> None:
    axis = None if scheme.axis is None else scheme.axis % 2
    along = axis == n_axis
    wrong = {"group": along, "block": along, "channel": not along, "tensor": False}.get(scheme.granularity)
    if wrong is None or scheme.dynamic:
        raise rw.declined(f"'{dq.label}': <{scheme}> is no static weight scheme", code="QC201")
    if wrong:
        raise rw.declined(
            f"'{dq.label}': the groups of <{scheme}> run along the output features, no kernel has that",
            code="QC205",
            fix="quantize along the reduction axis",
        )


def _once(rw: Rewriter, value: Value, suffix: str, make: Callable[[Payload], Payload | None]) -> Value:
    """The constant that ``make`` derives from ``value``, made once; ``value`` itself when ``make`` says None."""
    name = f"{value.name}_{suffix}"
    known = value.graph.local(name)
    if known is not None and known.is_const:
        return known
    assert value.payload is not None
    payload = make(value.payload)
    return value if payload is None else rw.const(name, payload, value.graph)


def _flipped(payload: Payload) -> Payload:
    """The transpose of a matrix payload, without a detour where the computation behind it can run the other way."""
    if isinstance(payload, ComputedPayload) and (other := transposed(payload)) is not None:
        return other

    def run(p: Payload) -> Array:
        return p.array().T

    return computed("transpose", run, [payload], payload.dtype, payload.shape[::-1])


def _parameter(payload: Payload, scheme: Scheme, n: int, flip: bool) -> Payload | None:
    """Scales or zeros as :func:`qcompiler.spec.column_shape` says; None when they are so already."""
    if scheme.granularity in ("group", "block"):
        return _flipped(payload) if flip else None
    shape = (1, 1) if scheme.granularity == "tensor" else (n, 1)

    def run(p: Payload) -> Array:
        return p.array().reshape(shape)

    return computed("column", run, [payload], payload.dtype, shape)
