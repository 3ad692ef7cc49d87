"""How far two computations of one value may differ: bounds with a derivation, no picked tolerances.

A float result is a chain of sums. Rounding a sum of ``k`` products in arithmetic of unit roundoff ``u`` errs by about
``u * sqrt(k)`` of its size, since the errors of the single steps are independent (Higham and Mary, "A New Approach to
Probabilistic Rounding Error Analysis", 2019); along a chain of ops they add in the same way. Two computations of one
value may therefore differ by ``HEADROOM * u * sqrt(steps)`` of its largest element, where ``steps`` is the number of
roundings on the longest way to it. ``HEADROOM`` stands for what the estimate leaves out: that errors grow where an op
divides or exponentiates, and that both sides err.

A code may be off by half a step, and by what moved the number before it was rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qcompiler import float_codes
from qcompiler.clipping import Floats
from qcompiler.dtypes import Array, DType
from qcompiler.ir import Op, TensorType, Value
from qcompiler.scheme import Scheme

HEADROOM = 16.0
"""Measured: no exact pass on the float models of the tests needs more than a sixth of it."""
UNIT = {"f64": 2.0**-53, "f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
UNKNOWN = 1024
"""The length that a sum of unknown length is taken to have."""

_SUMS = ("Reduce", "Softmax", "LogSoftmax", "Norm", "Pool", "Attention", "LSTM", "GRU", "RNN", "Einsum", "CumSum")
_WEIGHTS = {"q.linear": 1, "q.linear_dyn": 1, "q.linear_static": 3, "q.conv_dyn": 1, "q.conv": 3}
"""Where the codes of the weight stand, output features first."""


def _dims(value: Value | None) -> tuple[int, ...]:
    """The sizes, unknown ones as :data:`UNKNOWN`."""
    if value is None or value.tensor.shape is None:
        return (UNKNOWN, UNKNOWN)
    return tuple(d if isinstance(d, int) else UNKNOWN for d in value.tensor.shape)


def summed(op: Op) -> int:
    """How many terms an element of the result of ``op`` is a sum of; 1 for what adds none."""
    name = op.name.rpartition(".")[2] if not op.name.startswith("q.") else op.name
    if op.name in _WEIGHTS:
        return max(1, math.prod(_dims(op.operand(_WEIGHTS[op.name]))[1:]))
    if name == "MatMulNBits":
        return int(op.attrs.get("K", UNKNOWN))
    if "matmul" in name.lower() or "Gemm" in name:
        left = _dims(op.operand(0))
        return max(left[-2:] if op.attrs.get("transA") else left[-1:], default=1)
    if name == "ConvTranspose":
        shape = _dims(op.operand(1))
        return max(1, math.prod(shape) // max(1, shape[min(1, len(shape) - 1)]))
    if "Conv" in name:
        return max(1, math.prod(_dims(op.operand(3 if name.startswith("QLinear") else 1))[1:]))
    if any(word in name for word in _SUMS):
        return max(1, max(_dims(op.operand(0)), default=1))
    return 1


class Rounding:
    """What rounding may do to each value that ``ops``, in topological order, compute."""

    def __init__(self, ops: Iterable[Op]) -> None:
        self.steps: dict[Value, int] = {}
        self.unit = UNIT["f32"]
        for op in ops:
            inside = sum(summed(o) for g in op.regions.values() for o in g.walk())
            before = max((self.steps.get(v, 0) for v in op.operands if v is not None), default=0)
            for result in op.results:
                self.steps[result] = before + summed(op) + inside
                kind = result.tensor.dtype if isinstance(result.type, TensorType) else None
                if kind is not None and kind.name in ("f16", "bf16"):
                    self.unit = max(self.unit, UNIT[kind.name])

    def relative(self, value: Value) -> float:
        """The largest difference that is no fault, as a share of the largest element."""
        return HEADROOM * self.unit * math.sqrt(self.steps.get(value, 0) + 1)


@dataclass(frozen=True)
class Gap:
    """The worst difference found: ``error`` where ``allowed`` was allowed, in the same unit; ``ratio`` above 1 is too
    much. ``text`` says it in words."""

    error: float
    allowed: float
    text: str

    @property
    def ratio(self) -> float:
        if self.error <= self.allowed:
            return 0.0 if self.error == 0 else self.error / self.allowed
        return self.error / self.allowed if self.allowed > 0 else math.inf

    @property
    def fits(self) -> bool:
        return self.error <= self.allowed


NONE = Gap(0.0, 0.0, "equal")


def differing(before: Array, after: Array, relative: float, more: Array | float = 0.0) -> Gap:
    """The worst difference of two arrays that should hold the same values.

    Floats may differ by ``relative`` of the largest finite magnitude plus ``more``; anything else is equal or wrong.
    """
    if before.shape != after.shape:
        return Gap(math.inf, 0.0, f"its shape is {list(after.shape)}, not {list(before.shape)}")
    if not before.size:
        return NONE
    if before.dtype.kind in "biuSUO" or after.dtype.kind in "biuSUO":
        wrong = int(np.count_nonzero(before != after))
        return Gap(float(wrong), 0.0, f"{wrong} of {before.size} elements differ") if wrong else NONE
    x, y = before.astype(np.float64), after.astype(np.float64)
    finite = np.isfinite(x)
    odd = (~finite | ~np.isfinite(y)) & ~((x == y) | (np.isnan(x) & np.isnan(y)))
    if odd.any():
        return Gap(math.inf, 0.0, f"{int(odd.sum())} of {x.size} elements are NaN or infinite on one side alone")
    error = np.abs(np.where(finite, x, 0.0) - np.where(finite, y, 0.0))
    top = max((float(np.abs(v[finite]).max()) if finite.any() else 0.0) for v in (x, y))
    allowed = np.broadcast_to(np.asarray(relative * top + more, np.float64), x.shape)
    share = np.divide(error, allowed, out=np.where(error > 0, np.inf, 0.0), where=allowed > 0)
    at = np.unravel_index(int(np.argmax(share)), x.shape)
    worst, bound = float(error[at]), float(allowed[at])
    text = f"off by {worst:.3g} where {bound:.3g} is allowed, of values up to {top:.3g}"
    return Gap(worst / top if top else worst, bound / top if top else bound, text)


def codes_differing(before: Array, after: Array, exact: Floats | None, slack: float, scheme: Scheme | None) -> Gap:
    """The worst difference of two tensors of codes, in steps.

    ``exact`` is the number before rounding, in steps with the zero point added: ``after`` may be off by half a step and
    ``slack`` from it. Without it, codes may be off by one where that number may lie within ``slack`` of a tie: of
    numbers that spread evenly over the steps, a share of ``2 * slack``.
    """
    if before.shape != after.shape:
        return Gap(math.inf, 0.0, f"its shape is {list(after.shape)}, not {list(before.shape)}")
    if scheme is not None and not scheme.dtype.is_integer:
        return _float_codes_differing(before, after, exact, slack, scheme.dtype)
    off = np.abs(before.astype(np.int64) - after.astype(np.int64))
    count = int(np.count_nonzero(off))
    if not count:
        return NONE
    found = f"{count} of {off.size} codes differ, by up to {int(off.max())}"
    if exact is None or scheme is None:
        share = math.ceil(2 * slack * off.size) + 1
        error, allowed = (float(off.max()), 1.0) if off.max() > 1 else (count / off.size, share / off.size)
        return Gap(error, allowed, f"{found}; {share} may, by 1")
    ends = np.clip(exact, scheme.dtype.qmin, scheme.dtype.qmax)
    error = float(np.abs(after.astype(np.float64) - ends).max())
    text = f"{found}; the worst is {error:.4g} steps from the exact value where {0.5 + slack:.4g} are allowed"
    return Gap(error, 0.5 + slack, text)


def _float_codes_differing(before: Array, after: Array, exact: Floats | None, slack: float, element: DType) -> Gap:
    """As :func:`codes_differing` for float codes, or what they stand for in steps: gaps between them are their steps.

    Without ``exact``, an element may be off by one gap and ``slack`` on either side.
    """
    coded = before.dtype == element.storage
    a, b = (float_codes.decode(x, element) if coded else x.astype(np.float64) for x in (before, after))
    most = float_codes.largest(element)
    target = a if exact is None else np.clip(exact, -most, most)
    half = float_codes.reach(np.maximum(np.abs(a), np.abs(b)) if exact is None else target, element)
    allowed = 2 * (half + slack) if exact is None else half + slack
    error = np.abs(b - target)
    if not error.size:
        return NONE
    at = np.unravel_index(int(np.argmax(error / allowed)), error.shape)
    text = f"{b[at]:.6g} in steps stands for {target[at]:.6g}; {allowed[at]:.4g} are allowed"
    return Gap(float(error[at]), float(allowed[at]), text)
