"""Weight quantization as a recorded computation: nothing is read before the artifact is written, then only once."""

from __future__ import annotations

from collections.abc import Sequence

from qcompiler.clipping import Clip
from qcompiler.dtypes import Array
from qcompiler.errors import BadWeights, InputError
from qcompiler.payload import Computation, ComputedPayload, Payload
from qcompiler.rtn import quantize_weight
from qcompiler.scheme import Scheme
from qcompiler.spec import scale_shape


class WeightQuantization(Computation):
    """Round-to-nearest of a matrix: results are codes, scales and, for an asymmetric scheme, zeros.

    ``weight`` has shape ``[A, B]`` and ``scheme.axis`` names the axis of its reduction (for channel granularity the
    output axis). The results have the weight's orientation; :meth:`transposed` is the same computation the other way
    round, bit for bit. ``stats`` holds ``sum_sq`` and ``sum_sq_error`` once it has run.
    """

    def __init__(self, weight: Payload, scheme: Scheme, clip: Clip = "absmax", *, flip: bool = False) -> None:
        if len(weight.shape) != 2:
            raise InputError(f"only matrices are quantized, not a tensor of shape {list(weight.shape)}")
        self.weight, self.scheme, self.clip, self.flip = weight, scheme, clip, flip
        self._other: WeightQuantization | None = None
        small = scale_shape(weight.shape, scheme)
        shapes = [weight.shape, small] + ([] if scheme.symmetric else [small])
        types = [scheme.dtype, weight.dtype, weight.dtype if scheme.zero == "float" else scheme.dtype]
        results = [(t, s[::-1] if flip else s) for t, s in zip(types, shapes, strict=False)]
        super().__init__(f"rtn<{scheme.text}>", self._quantize, [weight], results)

    def _quantize(self, weight: Payload) -> Sequence[Array]:
        try:
            out = quantize_weight(weight, self.scheme, clip=self.clip, transpose=self.flip)
        except BadWeights:
            self.stats["bad"] = True
            raise
        self.stats.update(out.stats)
        return [out.codes, out.scale] if out.zero is None else [out.codes, out.scale, out.zero]

    def transposed(self) -> WeightQuantization:
        """The computation whose results are the transposes of this one's; always the same object."""
        if self._other is None:
            self._other = WeightQuantization(self.weight, self.scheme, self.clip, flip=not self.flip)
            self._other._other = self
            self._other.stats = self.stats
        return self._other


def transposed(payload: ComputedPayload) -> ComputedPayload | None:
    """The transpose of a result of a :class:`WeightQuantization`, without reading it; None for another computation."""
    source = payload.computation
    if not isinstance(source, WeightQuantization):
        return None
    return source.transposed().outputs()[payload.index]
