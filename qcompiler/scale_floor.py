"""Why a weight's scale has a floor: the bias of an integer kernel is an int32 in steps of ``x_scale * w_scale``.

A channel whose weights are tiny beside its bias has so small a scale that the rounded bias does not fit into 32 bits,
and runtimes wrap or saturate it. The floor makes the bias at most 2^30 steps, which leaves as much room again for the
products. What it costs is below ``2^-23 |bias|`` for each product of such a channel: half a step of the weight times
the 255 steps of an activation.
"""

from __future__ import annotations

import numpy as np

from qcompiler.clipping import Floats
from qcompiler.dtypes import F32, F64, Array
from qcompiler.errors import BadWeights, InputError
from qcompiler.ir import Op, Value
from qcompiler.payload import ComputedPayload, Payload, computed
from qcompiler.spec import scale_shape
from qcompiler.weights import WeightQuantization

BIAS_STEPS = 2**30
"""The largest bias, in steps of its scale."""


def least_scales(bias: Array, x_scale: Array) -> Floats:
    """The least scale of each output channel's weights: ``|bias| / (x_scale * 2^30)``, float64, shaped as ``bias``.

    ``x_scale`` has one element. Raises BadWeights for NaN or infinity in the bias, InputError where the activation's
    scale is not positive, or so small that no float32 scale of the weights would do.
    """
    b, x = np.abs(bias.astype(np.float64)), float(np.asarray(x_scale, np.float64).reshape(()))
    finite = np.isfinite(b)
    if not finite.all():
        raise BadWeights(int(b.size - np.count_nonzero(finite)), b.size, "a bias")
    if not (np.isfinite(x) and x > 0):
        raise InputError(f"the scale of an activation is {x:g}; it must be a positive number")
    floor: Floats = b / (x * BIAS_STEPS)
    if floor.size and floor.max() > float(np.finfo(F32.storage).max):
        raise InputError(f"a bias of {b.max():g} beside an activation of scale {x:g} has no int32 form")
    return floor


def with_scale_floor(dq: Op, bias: Value, x_scale: Value) -> bool:
    """Give the weight behind ``dq`` scales at which ``bias`` fits into an int32; nothing is read now.

    ``dq`` is the ``q.dequantize`` of a pair that ``insert-qdq`` made, per channel or per tensor; ``bias`` a float
    constant with one element or one an output channel, ``x_scale`` the constant scale (one element) of the activation
    that the layer reads. The constants that ``dq`` reads get a new payload; several calls for one weight (tied layers)
    all hold. False, and nothing done, where the scale was not computed here: a scale that came with the model is kept.
    Raises InputError for groups.
    """
    scheme, scale, zero = dq.attrs["scheme"], dq.operand(1), dq.operand(2)
    assert scale is not None
    made = scale.payload
    if not isinstance(made, ComputedPayload) or not isinstance(made.computation, WeightQuantization):
        return False
    if scheme.granularity not in ("tensor", "channel"):
        raise InputError(f"'{dq.label}': <{scheme}> has no one scale a channel, so its bias has no int32 form")
    if not (bias.is_const and x_scale.is_const) or bias.payload is None or x_scale.payload is None:
        raise InputError(f"'{dq.label}': the bias {bias!r} and the scale {x_scale!r} must be constants")
    shape = scale_shape(made.computation.weight.shape, made.computation.scheme)
    if bias.payload.size not in (1, *shape) and shape:
        raise InputError(f"'{dq.label}': the bias {bias!r} has {bias.payload.size} elements for {shape[0]} channels")

    def floor(b: Payload, x: Payload) -> Array:
        found = least_scales(b.array().reshape(-1), x.array())
        return np.ascontiguousarray(np.broadcast_to(found, shape)) if shape else np.asarray(found.max(initial=0.0))

    payload = computed("bias floor", floor, [bias.payload, x_scale.payload], F64, shape)
    old, outputs = made.computation, made.computation.with_floor(payload).outputs()
    for value in (dq.operand(0), scale, zero):  # the codes too, where they are constant already
        if value is not None and isinstance(value.payload, ComputedPayload) and value.payload.computation is old:
            value.payload = outputs[value.payload.index]
    return True
