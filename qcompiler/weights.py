"""Weight quantization as a recorded computation: nothing is read before the artifact is written, then only once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from qcompiler.balancing import balanced
from qcompiler.clipping import Clip
from qcompiler.dtypes import Array
from qcompiler.errors import BadWeights, InputError
from qcompiler.payload import ArrayPayload, BytesPayload, Computation, ComputedPayload, FilePayload, Payload, computed
from qcompiler.rtn import quantize_weight
from qcompiler.scheme import Scheme
from qcompiler.spec import scale_shape

Rounding = Literal["nearest", "balanced"]


def matrix_shape(shape: tuple[int, ...], scheme: Scheme) -> tuple[tuple[int, int], Scheme]:
    """The matrix that a tensor of ``shape`` is quantized as, and the scheme for it; both have the same order of bytes.

    The axis of ``scheme`` is the first or the last one, which becomes axis 0 or 1. Raises InputError for one between.
    """
    if len(shape) == 2:
        return (shape[0], shape[1]), scheme
    scale_shape(shape, scheme)  # refuses an axis that is not there
    if scheme.granularity == "tensor":
        return (math.prod(shape[:1]), math.prod(shape[1:])), scheme
    axis = (scheme.axis or 0) % len(shape)
    if axis == 0:
        return (shape[0], math.prod(shape[1:])), scheme.with_axis(0)
    if axis == len(shape) - 1:
        return (math.prod(shape[:-1]), shape[-1]), scheme.with_axis(1)
    raise InputError(f"<{scheme}>: a tensor of shape {list(shape)} is quantized along its first or last axis")


def reshaped(payload: Payload, shape: tuple[int, ...]) -> Payload:
    """``payload`` with another shape of as many elements: the same bytes, not read now and not copied."""
    if payload.shape == shape:
        return payload
    if isinstance(payload, FilePayload | BytesPayload):
        return replace(payload, shape=shape)
    if isinstance(payload, ArrayPayload):
        return ArrayPayload(payload.values.reshape(shape), payload.dtype)
    return computed("reshape", lambda p: p.array().reshape(shape), [payload], payload.dtype, shape)


class WeightQuantization(Computation):
    """Round-to-nearest of a weight: results are codes, scales and, for an asymmetric scheme, zeros.

    ``weight`` has any rank, and ``scheme.axis`` names the axis of its reduction (for channel granularity the output
    axis): either axis of a matrix, the first or the last one of other tensors (the channels of a convolution's weight
    ``[O, I / group, ..]`` are axis 0). The results have the weight's orientation; :meth:`transposed` is the same
    computation of a matrix the other way round, bit for bit. ``floors`` have the shape of the scales, which are below
    none of them. Codes are the nearest, or, for the weight of a convolution, ``balanced`` (:mod:`qcompiler.balancing`).
    ``stats`` holds ``sum_sq`` and ``sum_sq_error`` once it has run.
    """

    def __init__(
        self,
        weight: Payload,
        scheme: Scheme,
        clip: Clip = "absmax",
        *,
        flip: bool = False,
        floors: Sequence[Payload] = (),
        rounding: Rounding = "nearest",
    ) -> None:
        if rounding == "balanced" and (len(weight.shape) < 3 or scheme.axis not in (None, 0)):
            raise InputError(f"<{scheme}>: a weight {list(weight.shape)} has no kernels whose sums could be balanced")
        matrix, self._scheme = matrix_shape(weight.shape, scheme)
        if flip and len(weight.shape) != 2:
            raise InputError(f"only matrices are transposed, not a tensor of shape {list(weight.shape)}")
        self.weight, self.scheme, self.clip, self.flip, self.floors = weight, scheme, clip, flip, tuple(floors)
        self.rounding = rounding
        self._other: WeightQuantization | None = None
        small = scale_shape(weight.shape, scheme)
        for floor in self.floors:
            if floor.shape != small:
                raise InputError(f"<{scheme}>: a floor has shape {list(floor.shape)}, the scales have {list(small)}")
        shapes = [weight.shape, small] + ([] if scheme.symmetric else [small])
        types = [scheme.dtype, weight.dtype, weight.dtype if scheme.zero == "float" else scheme.dtype]
        results = [(t, s[::-1] if flip else s) for t, s in zip(types, shapes, strict=False)]
        inputs = [reshaped(weight, matrix), *self.floors]
        label = "rtn" if rounding == "nearest" else rounding
        super().__init__(f"{label}<{scheme.text}>", self._quantize, inputs, results)

    def _quantize(self, weight: Payload, *floors: Payload) -> Sequence[Array]:
        floor: Array | None = None
        if floors:
            floor = np.maximum.reduce([p.array().astype(np.float64) for p in floors])
        try:
            out = quantize_weight(weight, self._scheme, clip=self.clip, transpose=self.flip, floor=floor)
        except BadWeights:
            self.stats["bad"] = True
            raise
        self.stats.update(out.stats)
        codes = out.codes.reshape(self.results[0][1])
        if self.rounding == "balanced":
            x, element = self.weight.array(), self.scheme.dtype
            codes, self.stats["sum_sq_error"] = balanced(x, codes, out.scale, out.zero, element)
        arrays = [codes, out.scale] if out.zero is None else [codes, out.scale, out.zero]
        return [a.reshape(shape) for a, (_, shape) in zip(arrays, self.results, strict=True)]

    def transposed(self) -> WeightQuantization:
        """The computation whose results are the transposes of this one's; always the same object."""
        if self._other is None:
            flip = not self.flip
            self._other = WeightQuantization(self.weight, self.scheme, self.clip, flip=flip, floors=self.floors)
            self._other._other = self
            self._other.stats = self.stats
        return self._other

    def with_floor(self, floor: Payload) -> WeightQuantization:
        """The same with scales of at least ``floor``, of their shape, too; figures go to the same ``stats``."""
        if self.flip:
            raise InputError("a floor is given to the weight as it is stored, not to its transpose")
        new = WeightQuantization(
            self.weight, self.scheme, self.clip, floors=(*self.floors, floor), rounding=self.rounding
        )
        new.stats = self.stats
        return new


def transposed(payload: ComputedPayload) -> ComputedPayload | None:
    """The transpose of a result of a :class:`WeightQuantization`, without reading it; None for another computation."""
    source = payload.computation
    if not isinstance(source, WeightQuantization) or len(source.weight.shape) != 2:
        return None
    return source.transposed().outputs()[payload.index]
