"""Rounding that keeps the sums of a convolution's weights: a data-free answer to inputs that have a mean.

Rounding to nearest leaves each kernel with a sum of errors, which the mean of its input multiplies: behind a Relu that
is most of what rounding costs. Here the weights that lie nearest to the middle between two codes are rounded the other
way until no kernel, and then no output channel, has a sum of errors beyond half a step (Guo et al., SQuant: On-the-Fly
Data-Free Quantization via Diagonal Hessian Approximation, 2022, section 4). No error grows beyond one step.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qcompiler.channels import blocks
from qcompiler.clipping import Floats
from qcompiler.dtypes import Array, DType


def balanced(weight: Array, codes: Array, scale: Array, zero: Array | None, element: DType) -> tuple[Array, float]:
    """Codes of ``weight[O, C, *kernel]`` with balanced sums, and the sum of their squared errors.

    ``codes`` are those of rounding to nearest, of type ``element``; ``scale`` and ``zero`` are ``[O]`` or ``[]``.
    """
    shape = weight.shape
    taps = math.prod(shape[2:])
    steps = np.broadcast_to(scale.astype(np.float64), (shape[0],)).reshape(-1, 1, 1)
    zeros = np.broadcast_to(0.0 if zero is None else zero.astype(np.float64), (shape[0],)).reshape(-1, 1, 1)
    out, total = np.empty_like(codes), 0.0
    for at in blocks(weight):
        whole = codes[at].astype(np.float64).reshape(-1, shape[1], taps)
        error = weight[at].astype(np.float64).reshape(whole.shape) / steps[at] - (whole - zeros[at])
        _within_kernels(whole, error, element)
        _between_kernels(whole, error, element)
        out[at] = whole.reshape(codes[at].shape)
        total += float(np.square(error * steps[at]).sum())
    return out, total


def _gain(codes: Floats, error: Floats, sign: Floats, element: DType) -> Floats:
    """How wrong each weight was rounded against ``sign``; minus infinity where it cannot be rounded the other way."""
    moved = codes + sign
    possible = (sign * error > 0) & (moved >= element.qmin) & (moved <= element.qmax)
    return np.where(possible, sign * error, -np.inf)


def _largest(gain: Floats, count: Floats) -> NDArray[np.bool_]:
    """The ``count`` largest along the last axis, of those that are finite."""
    order = np.argsort(-gain, axis=-1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(gain.shape[-1]), order.shape), axis=-1)
    chosen: NDArray[np.bool_] = (rank < count[..., None]) & np.isfinite(gain)
    return chosen


def _within_kernels(codes: Floats, error: Floats, element: DType) -> None:
    """Bring the sum of errors of each kernel ``[O, C, :]`` to half a step."""
    sums = error.sum(axis=2)
    sign = np.where(sums < 0, -1.0, 1.0)[:, :, None]
    moved = sign * _largest(_gain(codes, error, sign, element), np.rint(np.abs(sums)))
    codes += moved
    error -= moved


def _between_kernels(codes: Floats, error: Floats, element: DType) -> None:
    """Bring the sum of errors of each channel ``[O, :, :]`` to half a step, by one weight of a kernel at most."""
    sums = error.sum(axis=2)
    whole = sums.sum(axis=1)
    sign = np.where(whole < 0, -1.0, 1.0)
    gain = _gain(codes, error, sign[:, None, None], element)
    best = gain.argmax(axis=2)[:, :, None]
    possible = np.isfinite(np.take_along_axis(gain, best, axis=2)[:, :, 0])
    kernels = _largest(np.where(possible, sign[:, None] * sums, -np.inf), np.rint(np.abs(whole)))
    moved = np.zeros_like(codes)
    np.put_along_axis(moved, best, (kernels * sign[:, None])[:, :, None], axis=2)
    codes += moved
    error -= moved
