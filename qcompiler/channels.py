"""Factors and shifts of channels, folded into the weights and bias beside them: the maths, and as a computation.

Everything is computed in float64 and rounded once to the dtype of the weight; the weight is widened a block at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qcompiler.clipping import Floats
from qcompiler.dtypes import Array
from qcompiler.payload import Computation, Payload

BLOCK = 1 << 20
"""Weights that are held in float64 at a time."""

Law = Callable[[Sequence[Floats]], tuple[Floats, Floats]]
"""From constants to the factor and the shift of each channel: float64, ``[C]`` or ``[1]``."""


def batch_law(epsilon: float) -> Law:
    """Factor and shift of ONNX BatchNormalization with the constants scale, bias, mean, variance, each ``[C]``.

    ``y = (x - mean) / sqrt(variance + epsilon) * scale + bias`` (ONNX operator BatchNormalization, inference form).
    """

    def law(constants: Sequence[Floats]) -> tuple[Floats, Floats]:
        scale, bias, mean, variance = constants
        factor = scale / np.sqrt(variance + epsilon)
        return factor, bias - mean * factor

    return law


def multiply(constants: Sequence[Floats]) -> tuple[Floats, Floats]:
    """``y = x * c``."""
    return constants[0], np.zeros(1)


def divide(constants: Sequence[Floats]) -> tuple[Floats, Floats]:
    """``y = x / c``; a division by zero makes infinite weights, which have no codes."""
    with np.errstate(divide="ignore"):
        return 1.0 / constants[0], np.zeros(1)


def add(constants: Sequence[Floats]) -> tuple[Floats, Floats]:
    """``y = x + c``."""
    return np.ones(1), constants[0]


def subtract(constants: Sequence[Floats]) -> tuple[Floats, Floats]:
    """``y = x - c``."""
    return np.ones(1), -constants[0]


def scaled(weight: Array, table: Floats, rows: NDArray[np.int64]) -> Array:
    """Row ``r`` of ``weight[R, ..]`` times ``table[rows[r]]``, which broadcasts over it."""
    out = np.empty_like(weight)
    for at in blocks(weight):
        with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is infinite, and has no code
            out[at] = weight[at].astype(np.float64) * table[rows[at]]
    return out


def row_sums(weight: Array, table: Floats, rows: NDArray[np.int64]) -> Floats:
    """The sum of row ``r`` of ``weight[R, ..]`` times ``table[rows[r]]``, which broadcasts over it: ``[R]``."""
    out = np.empty(len(weight))
    for at in blocks(weight):
        product = weight[at].astype(np.float64) * table[rows[at]]
        out[at] = product.reshape(len(product), -1).sum(axis=1)
    return out


def blocks(weight: Array) -> list[slice]:
    """Rows of ``weight`` that are widened to float64 together."""
    step = max(1, BLOCK // max(1, math.prod(weight.shape[1:])))
    return [slice(start, start + step) for start in range(0, len(weight), step)]


@dataclass(frozen=True)
class ChannelFolding:
    """A layer's ``weight`` and ``bias[n]`` (or None), and ``y = x * factor + shift`` of channels beside it.

    ``law`` makes factor and shift of ``constants``. ``where`` says which channels they are: the *rows* of the weight
    (the outputs of a convolution ``[O, I / group, ..]`` or a matrix ``[N, K]``), its *columns* (the outputs of a matrix
    ``[K, N]``), those of a *transposed* convolution ``[I, O / group, ..]``, or the *inputs* of a convolution that pads
    nothing, whose shifts go through the weight into the bias.
    """

    weight: Payload
    bias: Payload | None
    constants: tuple[Payload, ...]
    law: Law
    n: int
    where: Literal["rows", "columns", "transposed", "inputs"] = "rows"
    group: int = 1

    def payloads(self) -> tuple[Payload, Payload]:
        """The new weight and bias, not computed yet."""
        given = [self.weight, *self.constants, *([] if self.bias is None else [self.bias])]
        results = [(self.weight.dtype, self.weight.shape), (self.weight.dtype, (self.n,))]
        weight, bias = Computation("fold channels", self._run, given, results).outputs()
        return weight, bias

    def _run(self, weight: Payload, *others: Payload) -> tuple[Array, Array]:
        constants = [p.array().astype(np.float64).reshape(-1) for p in others[: len(self.constants)]]
        factor, shift = self.law(constants)
        bias = np.zeros(self.n)
        if self.bias is not None:
            bias += others[-1].array().astype(np.float64).reshape(-1)
        source = weight.array()
        table, rows = self._table(factor)
        if self.where == "inputs":
            bias = bias + row_sums(source, *self._table(shift))
        else:
            bias = bias * factor + shift
        with np.errstate(over="ignore"):
            return scaled(source, table, rows), bias.astype(self.weight.dtype.storage)

    def _table(self, values: Floats) -> tuple[Floats, NDArray[np.int64]]:
        """``values`` of the channels as :func:`scaled` takes them."""
        shape = self.weight.shape
        ones, each = [1] * (len(shape) - 2), shape[1]
        if self.where == "rows":
            return np.broadcast_to(values, (self.n,)).reshape(self.n, 1, *ones), np.arange(self.n)
        spread = np.broadcast_to(values, (each * self.group,)).reshape(self.group, each, *ones)
        return spread, np.arange(shape[0]) // max(1, shape[0] // self.group)
