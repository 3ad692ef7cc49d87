"""Weights of every form for tests of kernels: random canonical codes, the same laid out, and how far sums may be off.

Expected values are those of ``qcompiler.numerics`` on the canonical codes, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from qcompiler import numerics
from qcompiler.backends.triton import layouts
from qcompiler.backends.triton.forms import FORMS
from qcompiler.backends.triton.scheme_forms import scheme_told
from qcompiler.dtypes import F64, TABLE, Array
from qcompiler.float_codes import split_scales
from qcompiler.scheme import ZeroKind

Wide = NDArray[np.float64]

ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
"""Half the distance from 1 to the next number of the type."""

STORED = {torch.float16: np.dtype(np.float16), torch.float32: np.dtype(np.float32)}
STORED[torch.bfloat16] = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Weight:
    """A weight ``[n, k]``: its ``values`` in float64, the ``steps`` its codes are multiples of, and what ``wn_linear``
    takes."""

    form: str
    group: int
    zero: ZeroKind
    values: Wide
    steps: Wide
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    global_scale: torch.Tensor | None

    @property
    def operands(self) -> tuple[torch.Tensor | None, ...]:
        return self.codes, self.scales, self.zeros, self.global_scale


def tensor(array: Array) -> torch.Tensor:
    """The same numbers in torch; bf16 and e4m3 too."""
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


def draw(
    form: str, n: int, k: int, group: int, zero: ZeroKind = "none", scale: torch.dtype = torch.float32, seed: int = 0
) -> Weight:
    """Random codes, all of the form's; scales about 2^-6, exact in the type that the form keeps them in."""
    rng = np.random.default_rng(seed)
    scheme = scheme_told(form, group, zero)
    assert scheme is not None, (form, group, zero)
    scheme = scheme.with_axis(1 if group else 0)
    codes = _codes(form, rng, n, k)
    count = -(-k // group) if group else 1
    scales = np.exp2(rng.uniform(-7, -5, (n, count))).astype(STORED[scale])
    factor = None
    if form == "mxfp4":
        scales = np.exp2(rng.integers(-8, -3, (n, count)).astype(np.float32))
        laid = layouts.pack_scales(split_scales(scales, TABLE["f8e8m0"])[0].view(np.uint8), n, k, group)
    elif form == "nvfp4":
        picked = rng.integers(1, 0x7F, (n, count), dtype=np.uint8)
        picked.flat[0] = 0x7E  # 448, which fixes the factor
        scales = picked.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(2**-10)
        held, whole = split_scales(scales, TABLE["f8e4m3"])
        laid, factor = layouts.pack_scales(held, n, k, group), np.array([whole], np.float32)
    else:
        laid = layouts.pack_scales(scales, n, k, group)
    zeros = _zeros(form, zero, rng, (n, count), scale)
    given = [v if group or v is None else v.reshape(n) for v in (scales, zeros)]
    assert given[0] is not None
    return Weight(
        form,
        group,
        zero,
        numerics.dequantize(codes, given[0], given[1], scheme, F64),
        np.broadcast_to(np.repeat(scales, group or k, 1)[:, :k].astype(np.float64), (n, k)),
        tensor(layouts.pack_codes(codes, form)),
        tensor(laid),
        None if zeros is None else tensor(layouts.pack_zeros(zeros, n, k, group, form)),
        None if factor is None else tensor(factor),
    )


def _codes(form: str, rng: np.random.Generator, n: int, k: int) -> Array:
    known = FORMS[form]
    bits = rng.integers(0, 1 << known.bits, (n, k), dtype=np.uint8)
    if known.kind == "integer":
        return bits if not known.shift else (bits.astype(np.int16) - known.shift).astype(np.int8)
    if form == "nf4":
        return bits
    if known.bits == 4:
        return bits.view(ml_dtypes.float4_e2m1fn)
    storage = ml_dtypes.float8_e4m3fn if form == "f8e4m3" else ml_dtypes.float8_e5m2
    codes = bits.view(storage)
    return np.where(np.isfinite(codes.astype(np.float32)), codes, storage(0))


def _zeros(
    form: str, zero: ZeroKind, rng: np.random.Generator, shape: tuple[int, int], scale: torch.dtype
) -> Array | None:
    if zero == "none":
        return None
    known = FORMS[form]
    whole = rng.integers(0, 1 << known.bits, shape) - known.shift
    if zero == "int":
        return whole.astype(np.int8 if known.shift else np.uint8)
    return (whole + rng.uniform(-0.5, 0.5, shape)).astype(STORED[scale])


def bound(weight: Weight, x: Wide, element: torch.dtype, *, scaled: bool) -> Wide:
    """How far f32 sums ``[M, N]`` of a kernel may be from those of ``x [M, K]`` in float64.

    ``element``: the 16 bits in which it multiplies. ``scaled``: scales go on the weights, which rounds the scale and
    the product. NF4's table is rounded once. A zero point that is no whole number is off by a quarter of the type's
    roundoff in steps, and its difference to the code is rounded. Sums in f32 lose at most K roundoffs of it; scales on
    sums, a factor and partial sums 8 more.
    """
    u, k = ROUNDOFF[element], x.shape[1]
    exact = weight.form in ("mxfp4", "nvfp4")
    roundings = (2 if scaled and not exact else 0) + (weight.form == "nf4") + (weight.zero == "float")
    size, steps = np.abs(x) @ np.abs(weight.values).T, np.abs(x) @ weight.steps.T
    out = size * ((1 + u) ** roundings - 1 + (k + 8) * 2.0**-24)
    return out + (u / 4 * (1 + u) ** 3 * steps if weight.zero == "float" else 0)
