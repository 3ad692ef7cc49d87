"""What quantizing may change, tensor by tensor: half a step of the scale that the values ask for.

The bound is stated by the scheme, not by the scale that a pass wrote: for a group of weights with the range ``lo..hi``
it is half of :func:`qcompiler.clipping.affine_params` of that range (or of the floor that the scale was given), so a
scale that is too large exceeds it as one that is too small does. A range that is shrunk to lose less (``clip = "mse"``)
cuts off what lies beyond ``clipping.FACTORS[-1]`` of it at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompiler import float_codes
from qcompiler.agreement import Gap
from qcompiler.bias_correction import CorrectedBias
from qcompiler.clipping import FACTORS, SCALE_BITS, Floats, affine_params
from qcompiler.dtypes import BF16, F64, Array, DType, dtype_of
from qcompiler.ir import Op
from qcompiler.numerics import choose_qparams, dequantize, quantize, spread
from qcompiler.payload import ComputedPayload, Payload
from qcompiler.scheme import Scheme
from qcompiler.weights import WeightQuantization

ROUNDING = 1e-3
"""Share of a step by which scales may be off: they are rounded to f32 or f16, and the range is that of floats."""


@dataclass
class Range:
    """The least and the greatest value seen, zero included."""

    lo: float = 0.0
    hi: float = 0.0

    def widen(self, x: Array) -> None:
        if x.size:
            self.lo, self.hi = min(self.lo, float(x.min())), max(self.hi, float(x.max()))


def _array(op: Op, index: int) -> Array | None:
    value = op.operand(index)
    return None if value is None or value.payload is None else value.payload.array()


def _floor(scale: Payload | None) -> Floats | None:
    """The floor that the computation of a scale was given."""
    if isinstance(scale, ComputedPayload) and isinstance(scale.computation, WeightQuantization):
        floors = [p.array().astype(np.float64) for p in scale.computation.floors]
        return np.maximum.reduce(floors) if floors else None
    return None


def weight_gap(quantize_op: Op, dequantize_op: Op, *, shrunk: bool) -> Gap | None:
    """The worst error of a pair around a constant, in steps that its range asks for; None where that is no constant.

    ``shrunk``: the pass may have shrunk the range. Reads one tensor.
    """
    x, scale, zero = (_array(quantize_op, i) for i in range(3))
    scheme: Scheme = quantize_op.attrs["scheme"]
    if x is None or scale is None or not x.size:
        return None
    codes = quantize(x, scale, zero, scheme)
    back, back_zero = _array(dequantize_op, 1), _array(dequantize_op, 2)
    if back is None:
        return None
    seen = dequantize(codes, back, back_zero, dequantize_op.attrs["scheme"], F64)
    floor = _floor(quantize_op.operands[1].payload)  # type: ignore[union-attr]
    for value in (quantize_op.operand(0), quantize_op.operand(1)):
        if value is not None and value.payload is not None:
            value.payload.release()
    return _weight_gap(x, seen, floor, scheme, shrunk=shrunk, halves=1)


def rounded_gap(dequantize_op: Op, made: WeightQuantization, *, shrunk: bool) -> Gap:
    """As :func:`weight_gap` for constant codes that ``made`` rounded in another way than to the nearest: within a step.

    Reads one tensor.
    """
    codes, scale, zero = (_array(dequantize_op, i) for i in range(3))
    assert codes is not None and scale is not None
    seen = dequantize(codes, scale, zero, made.scheme, F64)
    floor = _floor(made.outputs()[1])
    return _weight_gap(made.weight.array(), seen, floor, made.scheme, shrunk=shrunk, halves=2)


def _weight_gap(x: Array, seen: Floats, floor: Floats | None, scheme: Scheme, *, shrunk: bool, halves: int) -> Gap:
    """The worst error of ``seen`` in ``halves`` of the steps that ``x`` asks for."""
    step, middle = choose_qparams(x, scheme)
    wanted = step.astype(np.float64)
    if floor is not None:
        wanted = np.maximum(wanted, floor)
    half = spread(wanted, x.shape, scheme) / 2
    error = np.abs(seen - x.astype(np.float64))
    if not scheme.dtype.is_integer:
        return _float_gap(x, error, 2 * half, scheme, shrunk=shrunk)
    if scheme.bits <= 4:
        # Their scales have few significant bits: one that was rounded down leaves the ends of the range out.
        levels = scheme.dtype.qmax - scheme.dtype.qmin
        error = np.maximum(error - levels * 2 * half * 2.0**-SCALE_BITS, 0.0)
    if shrunk:
        center = None if middle is None else spread(middle.astype(np.float64), x.shape, scheme)
        error = np.maximum(error - _cut_off(x.astype(np.float64), half, center, scheme), 0.0)
    return _worst(error / halves, np.broadcast_to(half, x.shape), x)


def _float_gap(x: Array, error: Floats, scale: Floats, scheme: Scheme, *, shrunk: bool) -> Gap:
    """As :func:`_weight_gap` for float codes, whose steps are the gaps between them. ``scale`` is that of the range.

    Under a smaller scale the gap around a value is as wide at most, or, behind a power of two, twice as wide.
    """
    wide = x.astype(np.float64)
    half = scale * float_codes.reach(wide / scale, scheme.dtype)
    if shrunk:
        half, most = 2 * half, scale * float_codes.largest(scheme.dtype)
        beyond = np.maximum(np.abs(wide) - FACTORS[-1] * (1 - 2.0**-SCALE_BITS) * most, 0.0)
        error = np.maximum(error - np.where(beyond > 0, beyond + half, 0.0), 0.0)
    return _worst(error, half, x)


def _cut_off(x: Floats, half: Floats, zero: Floats | None, scheme: Scheme) -> Floats:
    """How much of each value the most that a range may be shrunk by leaves out, and half a step: zero points round."""
    low, high = scheme.dtype.qmin, scheme.dtype.qmax
    if zero is not None:
        lo, hi = (low - zero) * 2 * half, (high - zero) * 2 * half
    else:
        hi = half * (2 * high if scheme.dtype.kind == "uint" else high - low)
        lo = -hi
    beyond = np.maximum(np.maximum(x - FACTORS[-1] * hi, FACTORS[-1] * lo - x), 0.0)
    return np.where(beyond > 0, beyond + half, 0.0)


def activation_gap(
    x: Array, seen: Array, step: Array | float, element: DType, *, covered: tuple[float, float] | None
) -> Gap:
    """The worst error of a pair around an activation, in steps. ``covered``: values beyond are cut off; None: none are.

    ``seen`` is ``x`` after quantizing to codes of type ``element`` by the scales ``step``, which broadcast over ``x``,
    and dequantizing.
    """
    wide = x.astype(np.float64)
    target = wide if covered is None else np.clip(wide, *covered)
    steps = np.broadcast_to(np.asarray(step, np.float64), x.shape)
    half = steps / 2 if element.is_integer else steps * float_codes.reach(target / steps, element)
    unit = 2.0**-8 if dtype_of(seen.dtype) is BF16 else 0.0
    return _worst(np.abs(seen.astype(np.float64) - target), half, x, unit)


def _worst(error: Floats, half: Floats, x: Array, unit: float = 0.0) -> Gap:
    """In steps: half of one, and the rounding of scales, values and results. ``unit``: the least to be allowed for the
    rounding of results, as a share of the value."""
    unit = max(unit, 2.0**-11 if dtype_of(x.dtype).bits == 16 else 2.0**-23)
    slack = ROUNDING * half + 2 * unit * np.abs(x.astype(np.float64))
    steps = np.maximum(error - slack, 0.0) / (2 * half)
    at = np.unravel_index(int(np.argmax(steps)), steps.shape)
    worst = float(steps[at])
    text = f"{float(x[at]):.6g} comes back off by {float(error[at]):.3g}, {worst:.3g} steps where 0.5 are allowed"
    return Gap(worst, 0.5, text)


def asked_step(seen: Range, scheme: Scheme) -> float:
    """The scale that a range asks for."""
    scale, _ = affine_params(np.asarray(seen.lo), np.asarray(seen.hi), scheme, F64)
    return float(scale)


def code_range(scale: float, zero: float, scheme: Scheme) -> tuple[float, float]:
    """The values that the smallest and the largest code stand for."""
    if not scheme.dtype.is_integer:
        return -float_codes.largest(scheme.dtype) * scale, float_codes.largest(scheme.dtype) * scale
    return (scheme.dtype.qmin - zero) * scale, (scheme.dtype.qmax - zero) * scale


def correction_gap(made: CorrectedBias) -> Gap:
    """How far a corrected bias is from the one before, in steps of the weight: half a step of each is what rounds.

    Reads the weight.
    """
    before, after = (p.array().astype(np.float64) for p in (made.uncorrected(), made.outputs()[0]))
    bound = made.bound()
    slack = np.spacing(np.abs(before).max(initial=0.0).astype(made.inputs[0].dtype.storage)).astype(np.float64)
    moved = np.abs(after - before)
    ratio = float((moved / (bound + slack + np.finfo(np.float64).tiny)).max(initial=0.0))
    text = (
        f"the correction moves a bias by {moved.max(initial=0.0):.4g}, the most that rounding does is {bound.max():.4g}"
    )
    return Gap(ratio / 2, 0.5 * (1 + ROUNDING), text)
