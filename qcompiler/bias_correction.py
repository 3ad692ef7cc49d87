"""The mean error that quantized weights make, taken out of the bias: the maths, its observer and its computation.

Rounding weights changes the output ``o`` of a layer by ``sum_k (Wq - W)[o, k] x[k]``, whose mean over the data is not
zero where activations have a mean: behind a Relu, say. The bias takes it back:
``b' = b + sum_k (W - Wq)[o, k] E[x[k]]`` (Nagel et al., Data-Free Quantization Through Weight Equalization and Bias
Correction, 2019, equation 16). ``k`` runs over channels and the taps of the kernel; ``E`` is over what each tap sees,
the zeros of the padding included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler import float_codes, numerics
from qcompiler.channels import blocks
from qcompiler.clipping import Floats
from qcompiler.dtypes import Array
from qcompiler.errors import CalibrationError
from qcompiler.integer_numerics import padding
from qcompiler.ir import Op, Value
from qcompiler.payload import Computation, ComputedPayload, Payload, computed
from qcompiler.scheme import Scheme
from qcompiler.weights import WeightQuantization


class TapMeans:
    """The mean of what each tap of a convolution's kernel sees of its input ``[B, C, *size]``: ``[C, *kernel]``.

    ``attrs`` are the attributes of ONNX Conv. Without a kernel the input is ``[.., C]``, that of a linear layer, and
    the means are ``[C]``.
    """

    def __init__(self, channels: int, kernel: Sequence[int] = (), attrs: Mapping[str, Any] | None = None) -> None:
        self.channels, self.kernel, self.attrs = channels, tuple(kernel), dict(attrs or {})
        self.seen = self.positions = 0
        self.sums = np.zeros((channels, *self.kernel))

    @property
    def means(self) -> Floats:
        """Float64 ``[C, *kernel]``; zeros before anything was seen."""
        found: Floats = self.sums / max(self.positions, 1)
        return found

    def update(self, x: Array) -> None:
        """See the input of one run; raises CalibrationError for NaN and infinity, or another number of channels."""
        x = np.asarray(x)
        axis = 1 if self.kernel else -1
        if x.ndim < 1 + bool(self.kernel) or x.shape[axis] != self.channels:
            raise CalibrationError(f"has the shape {list(x.shape)}, its reader takes {self.channels} channels")
        sums, positions = self._sums(x)
        if not np.isfinite(sums).all():
            raise CalibrationError("holds NaN or infinity")
        self.sums += sums
        self.positions += positions
        self.seen += x.size

    def _sums(self, x: Array) -> tuple[Floats, int]:
        if not self.kernel:
            return x.reshape(-1, self.channels).sum(axis=0, dtype=np.float64), x.size // self.channels
        d, size = len(self.kernel), x.shape[2:]
        strides = [int(s) for s in self.attrs.get("strides") or [1] * d]
        dilations = [int(s) for s in self.attrs.get("dilations") or [1] * d]
        window = [(k - 1) * s + 1 for k, s in zip(self.kernel, dilations, strict=True)]
        pads = padding(self.attrs, size, window, strides)
        outs = [(size[i] + pads[i] + pads[d + i] - window[i]) // strides[i] + 1 for i in range(d)]
        if min(outs) < 1:
            return np.zeros((self.channels, *self.kernel)), 0
        steps = [(outs[i], strides[i], dilations[i], pads[i]) for i in range(d)]
        return self._along(x, steps, self.kernel), x.shape[0] * math.prod(outs)

    def _along(self, x: Array, steps: Sequence[tuple[int, int, int, int]], kernel: Sequence[int]) -> Floats:
        """Sums ``[C, *kernel]`` of ``x[B, C, *rest]``, the first of the remaining axes first."""
        if not kernel:
            total: Floats = x.sum(axis=0, dtype=np.float64)
            return total
        (out, stride, dilation, before), taps = steps[0], []
        for tap in range(kernel[0]):
            start = tap * dilation - before
            first = max(0, -(start // stride)) if start < 0 else 0  # the first output that sees the tensor here
            last = min(out - 1, (x.shape[2] - 1 - start) // stride)
            rows = (
                x[:, :, start + first * stride : start + last * stride + 1 : stride] if last >= first else x[:, :, :0]
            )
            taps.append(self._along(rows.sum(axis=2, dtype=np.float64), steps[1:], kernel[1:]))
        return np.stack(taps, axis=1)

    def state(self) -> dict[str, Array]:
        return {"seen": np.array([self.seen, self.positions], np.int64), "sums": self.sums}

    def restore(self, state: Mapping[str, Array]) -> None:
        sums = state["sums"]
        if sums.shape != self.sums.shape:
            raise ValueError("means of another form")
        self.seen, self.positions = (int(n) for n in state["seen"])
        self.sums = sums.astype(np.float64)

    def key(self) -> str:
        spelled = ", ".join(f"{k} {v}" for k, v in sorted(self.attrs.items()) if k != "group")
        return f"taps {self.channels} {list(self.kernel)} {spelled}"

    def stand_in(self, shape: tuple[int, ...]) -> None:
        """As if the mean of everything were zero."""
        self.seen = self.positions = 1


class CorrectedBias(Computation):
    """``bias[n]`` plus the mean error of the codes of ``weight``; float64 inside, rounded once to the weight's dtype.

    ``quantized`` are its codes, scale and, if asymmetric, zero point, one a channel or one a tensor. All have the
    orientation of ``weight``: ``[O, I / group, *kernel]`` with ``means[I, *kernel]``, or a matrix whose axis ``along``
    is the reduction, with ``means[K]``.
    """

    def __init__(
        self,
        weight: Payload,
        quantized: Sequence[Payload],
        bias: Payload | None,
        scheme: Scheme,
        means: Floats,
        *,
        n: int,
        along: int = 1,
        group: int = 1,
    ) -> None:
        self.scheme, self.means, self.n, self.along, self.group = scheme, means, n, along, group
        self.bias = bias
        self._parameters = len(quantized)
        given = [weight, *quantized, *([] if bias is None else [bias])]
        super().__init__("corrected bias", self._run, given, [(weight.dtype, (n,))])

    def uncorrected(self) -> Payload:
        """The bias ``[n]`` as it was, zeros where there was none."""
        element, n = self.inputs[0].dtype, self.n
        given = [] if self.bias is None else [self.bias]

        def row(*bias: Payload) -> Array:
            values = bias[0].array().reshape(-1) if bias else np.zeros(1)
            return np.ascontiguousarray(np.broadcast_to(values.astype(element.storage), (n,)))

        return computed("row", row, given, element, (n,))

    def bound(self) -> Floats:
        """How far rounding can move each element, ``[n]``: half a step of every weight; balanced, a whole one.

        A step of float codes is the widest between two of them.
        """
        shape, scale = self.inputs[0].shape, self.inputs[2].array()
        steps = np.broadcast_to(numerics.spread(scale, shape, self.scheme), shape)
        made = self.inputs[1].computation if isinstance(self.inputs[1], ComputedPayload) else None
        widest = float_codes.widest(self.scheme.dtype) if not self.scheme.dtype.is_integer else 1.0
        share = 0.5 * widest if isinstance(made, WeightQuantization) and made.rounding == "nearest" else 1.0
        out = np.zeros(self.n)
        for at in blocks(steps):
            self._weigh(steps[at].astype(np.float64) * share, np.abs(self.means), at, out)
        return out

    def get(self, index: int) -> Array:
        """The bias; it is small, so it is kept, and the weight not quantized again for the next reader."""
        found = super().get(index)
        with self._lock:
            self._kept = {0: found}
        return found

    def _run(self, weight: Payload, *others: Payload) -> tuple[Array]:
        codes, *parameters = [p.array() for p in others[: self._parameters]]
        bias = np.zeros(self.n)
        if len(others) > self._parameters:
            bias += others[-1].array().astype(np.float64).reshape(-1)
        bias += self._mean_error(weight.array(), codes, *parameters)
        return (bias.astype(weight.dtype.storage),)

    def _mean_error(self, weight: Array, codes: Array, scale: Array, zero: Array | None = None) -> Floats:
        """What the codes lack of each output's mean, ``[n]``; a block of rows at a time."""
        steps = np.broadcast_to(numerics.spread(scale, codes.shape, self.scheme), codes.shape)
        zeros = None if zero is None else np.broadcast_to(numerics.spread(zero, codes.shape, self.scheme), codes.shape)
        out = np.zeros(self.n)
        for at in blocks(weight):
            values = numerics.code_values(codes[at], self.scheme.dtype)
            if zeros is not None:
                values -= zeros[at].astype(np.float64)
            error = weight[at].astype(np.float64) - values * steps[at].astype(np.float64)
            self._weigh(error, self.means, at, out)
        return out

    def _weigh(self, part: Floats, means: Floats, at: slice, out: Floats) -> None:
        """Add to ``out[n]`` the sum of ``part``, rows ``at`` of a tensor shaped as the weight, times ``means``."""
        if part.ndim == 2 and self.along == 0:
            out += means[at] @ part
        elif part.ndim == 2:
            out[at] = part @ means
        else:
            table = means.reshape(self.group, *self.inputs[0].shape[1:])
            group = np.arange(self.n)[at] // (self.n // self.group)
            out[at] = (part * table[group]).reshape(len(part), -1).sum(axis=1)


def correction(value: Value | None) -> CorrectedBias | None:
    """The computation behind a constant that is a corrected bias."""
    payload = None if value is None else value.payload
    if isinstance(payload, ComputedPayload) and isinstance(payload.computation, CorrectedBias):
        return payload.computation
    return None


def uncorrect(layer: Op, weight: Value) -> None:
    """Give ``layer``, which reads its float ``weight`` again, the bias that it had before a correction."""
    near = [layer, *(op for r in layer.results for op in r.users)]
    for value in dict.fromkeys(v for op in near for v in op.operands):
        made = correction(value)
        if value is not None and made is not None and made.inputs[0] is weight.payload:
            value.payload = made.uncorrected()
