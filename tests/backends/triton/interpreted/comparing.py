"""Is what a weight-only kernel computed within what rounding explains?"""

from __future__ import annotations

import numpy as np
import torch

from qcompiler.backends.triton.weight_only import LATE
from tests.backends.triton.weight_cases import ROUNDOFF, Weight, bound


def worst_of_linear(y: torch.Tensor, x: torch.Tensor, weight: Weight, bm: int) -> float:
    """The largest error of ``y [M, N]`` for ``x [M, K]``, in units of what is allowed for that element; at most 1 where
    the kernel is right. ``bm``: rows of the kernel's tile, which decide where long groups are scaled."""
    used = torch.bfloat16 if x.dtype == torch.float32 else x.dtype
    rounded = x.to(used).double().numpy()
    scaled = weight.group != 0 and not (weight.group >= 128 and bm <= LATE)
    wanted = rounded @ weight.values.T
    allowed = bound(weight, rounded, used, scaled=scaled)
    allowed += ROUNDOFF[x.dtype] * (np.abs(wanted) + allowed)
    return float((np.abs(y.double().numpy() - wanted) / allowed).max())


def check_linear(y: torch.Tensor, x: torch.Tensor, weight: Weight, bm: int) -> None:
    """Raise AssertionError where ``y`` is not ``x W^T`` within :func:`worst_of_linear`."""
    assert (y.dtype, tuple(y.shape)) == (x.dtype, (x.shape[0], weight.values.shape[0]))
    worst = worst_of_linear(y, x, weight, bm)
    assert worst <= 1, f"{weight.form} g{weight.group}: off by {worst:.3g} times what rounding explains"
