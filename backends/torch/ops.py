"""The operators ``qcompiler::*`` that torch artifacts call: W8A8 linears and convolutions, and quantizing activations.

Importing this module registers them; it needs torch alone. They are written against the dispatcher directly, which
costs 5 us a call (``torch.library.custom_op``: 80 us).

``qlinear`` and ``qconv`` are oneDNN's kernels: products of uint8 activations and int8 weights are summed in int32
exactly, then scaled and biased in f32, and rounded once to the result's type. On chips without VNNI these kernels
saturate; the rows that use them ask for it. What oneDNN does not look at (a missing scale, say) is checked here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from qcompiler.backends.torch.packing import PACKED, conv_weight, linear_weight
from qcompiler.errors import InputError

NAMESPACE = "qcompiler"
_LIBRARY: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
_RESULTS = (torch.float32, torch.bfloat16, torch.uint8)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_TINY = 2.0**-126
"""The smallest normal f32: scales are never below it."""


def _define(schema: str) -> None:
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


_define(
    "qlinear(Tensor x, Tensor x_scale, Tensor x_zero, Tensor weight, Tensor w_scale, Tensor? bias, float y_scale, "
    "int y_zero, ScalarType out) -> Tensor"
)
_define(
    "qconv(Tensor x, Tensor x_scale, Tensor x_zero, Tensor weight, Tensor w_scale, Tensor? bias, int[] stride, "
    "int[] padding, int[] dilation, int groups, float y_scale, int y_zero, ScalarType out) -> Tensor"
)
_define("quantize(Tensor x, Tensor scale, Tensor zero) -> Tensor")
_define("quantize_dynamic(Tensor x) -> (Tensor codes, Tensor scale, Tensor zero)")
_define("copied(Tensor x) -> Tensor")


# -- what both products check --------------------------------------------------------------------------------


def _check(op: str, x: torch.Tensor, w_scale: torch.Tensor, n: int, out: torch.dtype) -> None:
    """What oneDNN would compute wrongly, slowly or from foreign memory."""
    if x.dtype is not torch.uint8:
        raise InputError(
            f"qcompiler::{op} takes torch.uint8 activations, not {x.dtype}; oneDNN computes others by its reference "
            "code, hundreds of times slower"
        )
    if out not in _RESULTS:
        raise InputError(f"qcompiler::{op} gives torch.float32, torch.bfloat16 or torch.uint8, not {out}")
    if w_scale.numel() != n:
        raise InputError(
            f"qcompiler::{op} has {n} output channels and {w_scale.numel()} weight scales; give one a channel"
        )


_W_ZERO = torch.zeros(1, dtype=torch.int64, device="cpu")


# -- linear --------------------------------------------------------------------------------------------------


def _features(x: torch.Tensor, weight: torch.Tensor) -> int:
    """N of a weight ``[N, K]``, or of a packed one, which says ``[K, N]``."""
    k, shape = x.shape[-1], weight.shape
    if shape[1] == k:  # where N is K, it is the same number either way
        return shape[0]
    if shape[0] == k:
        return shape[1]
    raise InputError(f"qcompiler::qlinear: the activation ends in {k}, the weight is {list(shape)}")


def _qlinear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    y_scale: float,
    y_zero: int,
    out: torch.dtype,
) -> torch.Tensor:
    n = _features(x, weight)
    _check("qlinear", x, w_scale, n, out)
    if not x.numel():
        return x.new_empty((*x.shape[:-1], n), dtype=out)  # oneDNN forgets all axes but one
    packed = PACKED.get(weight, "linear", linear_weight)
    y: torch.Tensor = torch.ops.onednn.qlinear_pointwise.tensor(
        x, x_scale, x_zero, packed, w_scale, _W_ZERO, bias, y_scale, y_zero, out, "none", [], ""
    )
    return y


def _qlinear_fake(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    y_scale: float,
    y_zero: int,
    out: torch.dtype,
) -> torch.Tensor:
    n = _features(x, weight)
    _check("qlinear", x, w_scale, n, out)
    return x.new_empty((*x.shape[:-1], n), dtype=out)


# -- convolution ---------------------------------------------------------------------------------------------


def _format(x: torch.Tensor) -> torch.memory_format:
    """What torch's own convolutions give for an activation laid out like ``x``."""
    if x.dim() < 4:
        return torch.contiguous_format
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    plain = x.is_contiguous() or not x.is_contiguous(memory_format=last)
    return torch.contiguous_format if plain else last


def _qconv(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    y_scale: float,
    y_zero: int,
    out: torch.dtype,
) -> torch.Tensor:
    size = _conv_size(x, weight, w_scale, stride, padding, dilation, groups, out)
    if 0 in size:
        return x.new_empty(size, dtype=out)  # oneDNN has no convolution of an empty batch
    kernel = weight.shape[2 - x.dim() :]
    if any(p > d * (k - 1) for p, d, k in zip(padding, dilation, kernel, strict=True)):
        # Some windows see padding alone. Where all along an axis do, oneDNN crashes the process.
        x = _padded(x, padding, int(x_zero))
        padding = [0] * len(padding)
    key = ("conv", tuple(stride), tuple(padding), tuple(dilation), groups)
    packed = PACKED.get(weight, key, lambda w: conv_weight(w, stride, padding, dilation, groups))
    y: torch.Tensor = torch.ops.onednn.qconv_pointwise.tensor(
        *(x, x_scale, x_zero, packed, w_scale, _W_ZERO, bias, stride, padding, dilation, groups),
        *(y_scale, y_zero, out, "none", [], ""),
    )
    return y.contiguous(memory_format=_format(x))


def _padded(x: torch.Tensor, padding: Sequence[int], value: int) -> torch.Tensor:
    sides = [side for p in reversed(padding) for side in (p, p)]
    return torch.nn.functional.pad(x, sides, value=value).contiguous(memory_format=_format(x))


def _qconv_fake(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    x_zero: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    y_scale: float,
    y_zero: int,
    out: torch.dtype,
) -> torch.Tensor:
    size = _conv_size(x, weight, w_scale, stride, padding, dilation, groups, out)
    return torch.empty(size, dtype=out, device=x.device, memory_format=_format(x))


def _conv_size(
    x: torch.Tensor,
    weight: torch.Tensor,
    w_scale: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    out: torch.dtype,
) -> list[int]:
    """The sizes of the result, after the checks."""
    axes, channels = x.dim() - 2, weight.shape[1] * groups
    # A packed weight of a 1-D convolution has one more axis, of size 1.
    if not 1 <= axes <= 3 or weight.dim() not in (x.dim(), 4 if axes == 1 else x.dim()) or x.shape[1] != channels:
        raise InputError(
            f"qcompiler::qconv: the activation {list(x.shape)} does not fit the weight {list(weight.shape)} in "
            f"{groups} groups"
        )
    _check("qconv", x, w_scale, weight.shape[0], out)
    kernel = weight.shape[-axes:]
    spatial = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    return [x.shape[0], weight.shape[0], *spatial]


# -- codes of activations ------------------------------------------------------------------------------------


_MIDDLE = 1.5 * 2.0**23
"""Added to an f32 below 2^22 it rounds that to an integer, half to even, and leaves it in the low bits."""


def _codes(x: torch.Tensor, scale: torch.Tensor, zero: int) -> torch.Tensor:
    """``clamp(round(x / scale) + zero, 0, 255)``, rounded half to even; one temporary of 4 bytes an element.

    Clamped before it is rounded, which gives the same since the bounds are integers, and shifted in uint8.
    """
    wide = x.div(scale) if x.dtype is torch.float32 else x.to(torch.float32).div_(scale)
    wide.clamp_(-zero, 255 - zero).add_(_MIDDLE)
    return wide.view(torch.int32).to(torch.uint8).add_(zero)


def _check_floats(op: str, x: torch.Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise InputError(f"qcompiler::{op} takes f32, f16 and bf16 activations, not {x.dtype}")


def _quantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    _check_floats("quantize", x)
    return _codes(x, scale, int(zero))


def _quantize_dynamic(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """uint8 codes of ``x``, their scale (f32) and zero point (uint8), by the range of ``x`` widened to hold 0.

    The law is :func:`qcompiler.clipping.affine_params`, in f64 and rounded once. Raises InputError for NaN and
    infinity, which have no codes.
    """
    _check_floats("quantize_dynamic", x)
    lo = hi = 0.0
    if x.numel():
        lo, hi = (v.item() for v in torch.aminmax(x))
        if not hi - lo < float("inf"):  # also true of NaN
            raise InputError("an activation holds NaN or infinity, which have no 8-bit codes; run the float model")
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    exact = (hi - lo) / 255.0
    step = ctypes.c_float(max(exact, _TINY) if exact > 0 else 1.0).value  # rounded to f32
    scale = torch.scalar_tensor(step, dtype=torch.float32, device=x.device)
    point = min(round(-lo / step), 255)
    zero = torch.scalar_tensor(point, dtype=torch.uint8, device=x.device)
    return _codes(x, scale, point), scale, zero


def _quantize_fake(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    _check_floats("quantize", x)
    return x.div(1.0).to(torch.uint8)


def _quantize_dynamic_fake(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check_floats("quantize_dynamic", x)
    scale = torch.empty((), dtype=torch.float32, device=x.device)
    zero = torch.empty((), dtype=torch.uint8, device=x.device)
    return x.div(1.0).to(torch.uint8), scale, zero


def _copied(x: torch.Tensor) -> torch.Tensor:
    """``x`` in contiguous memory of its own: ``clone`` that no compiler takes for nothing."""
    return x.clone(memory_format=torch.contiguous_format)


# -- registration --------------------------------------------------------------------------------------------

for _name, _cpu, _fake in (
    ("qlinear", _qlinear, _qlinear_fake),
    ("qconv", _qconv, _qconv_fake),
    ("quantize", _quantize, _quantize_fake),
    ("quantize_dynamic", _quantize_dynamic, _quantize_dynamic_fake),
    ("copied", _copied, _copied),
):
    _LIBRARY.impl(_name, _cpu, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_LIBRARY)
for _name, _cpu in (("qlinear", _qlinear), ("qconv", _qconv)):
    _LIBRARY.impl(_name, _cpu, "MkldnnCPU")  # a packed weight brings this dispatch key
