"""Codes, scales and zero points of a KV cache: their laws, and what a tensor must be to be part of one.

Every token of every head has a scale of its own, f32, so tokens are written without touching others:

======== ================================= ===========================================================
form     codes                             scale, for values x of the token and head
======== ================================= ===========================================================
int8     int8 ``[B, H_kv, T, D]``          ``max|x| / 127``; ``code = round(x / scale)``
f8e4m3   float8_e4m3fn, the same shape     ``max|x| / 448``
int4     uint8 ``[B, H_kv, T, D / 2]``     ``(max(x, 0) - min(x, 0)) / 15``, with a zero point, uint8:
                                           ``code = round(x / scale) + zero``; low 4 bits: the even feature
======== ================================= ===========================================================

Scales and zero points are ``[B, H_kv, T]``. A scale is 1 where all values are 0, never below the smallest normal f32,
and NaN where a value is NaN or infinite, so that what is read back is NaN and not some number.
"""

from __future__ import annotations

import torch

from qcompiler.backends.triton.registering import FLOATS
from qcompiler.errors import InputError

FORMS: dict[str, torch.dtype] = {"int8": torch.int8, "f8e4m3": torch.float8_e4m3fn, "int4": torch.uint8}
"""Forms of a cache and the type of their codes in memory."""
LARGEST_HEAD = 256
_SMALLEST = 2.0**-126
_CHUNK = 512
"""Tokens of the cache that the reference holds as floats at a time."""


def codes_width(head_dim: int, form: str) -> int:
    """Elements of a token's codes. Raises InputError for an unknown form, or a head that kernels do not take."""
    if form not in FORMS:
        raise InputError(f"a KV cache has the form {', '.join(FORMS)}, not {form!r}")
    if head_dim % 16 or not 32 <= head_dim <= LARGEST_HEAD:
        raise InputError(
            f"a KV cache takes heads of 32 to {LARGEST_HEAD} features, a multiple of 16, not {head_dim}; keep this one "
            "in floats"
        )
    return head_dim // 2 if form == "int4" else head_dim


# -- laws ----------------------------------------------------------------------------------------------------


def quantized(values: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales and zero points of ``values[.., D]``, by the laws above."""
    x = values.to(torch.float32)
    if form == "int4":
        low, high = x.amin(-1).clamp(max=0.0), x.amax(-1).clamp(min=0.0)
        scale = _scale(high - low + x.abs().amax(-1) * 0.0, 15.0)
        zero = torch.round(-low / scale).nan_to_num(0.0).clamp(0, 15)
        code = (torch.round(x / scale[..., None]) + zero[..., None]).nan_to_num(0.0).clamp(0, 15).to(torch.uint8)
        return code[..., 0::2] | (code[..., 1::2] << 4), scale, zero.to(torch.uint8)
    scale = _scale(x.abs().amax(-1), 127.0 if form == "int8" else 448.0)
    ratio = x / scale[..., None]
    if form == "int8":
        return torch.round(ratio).nan_to_num(0.0).clamp(-127, 127).to(torch.int8), scale, None
    return ratio.clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale, None


def _scale(largest: torch.Tensor, divisor: float) -> torch.Tensor:
    scale = (largest + largest * 0.0) / divisor  # infinity becomes NaN
    return torch.where(largest == 0, torch.ones_like(scale), scale.clamp(min=_SMALLEST))


def dequantized(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, form: str) -> torch.Tensor:
    """f32 values ``[.., D]``: ``(code - zero) * scale``."""
    if form == "int4":
        assert zeros is not None
        split = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
        return (split.to(torch.float32) - zeros.to(torch.float32)[..., None]) * scales[..., None]
    return codes.to(torch.float32) * scales[..., None]


# -- checks --------------------------------------------------------------------------------------------------


def check_cache(
    op: str, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, head_dim: int, form: str
) -> None:
    """Raise InputError where these are not a cache of heads of ``head_dim`` features in ``form``."""
    width = codes_width(head_dim, form)
    if codes.dim() != 4 or codes.shape[3] != width or codes.dtype != FORMS[form]:
        raise InputError(
            f"qcompiler::{op}: {form} codes of heads of {head_dim} features are {FORMS[form]}[B, H_kv, T, {width}], "
            f"not {codes.dtype}{list(codes.shape)}"
        )
    if codes.stride(3) != 1:
        raise InputError(f"qcompiler::{op}: the codes of a token lie side by side, not {codes.stride(3)} bytes apart")
    wanted = [("scales", scales, torch.float32)]
    if form == "int4":
        if zeros is None:
            raise InputError(f"qcompiler::{op}: an int4 cache has zero points, uint8{list(codes.shape[:3])}")
        wanted.append(("zeros", zeros, torch.uint8))
    elif zeros is not None:
        raise InputError(f"qcompiler::{op}: a cache in {form} has no zero points; pass None")
    for name, t, dtype in wanted:
        if t.shape != codes.shape[:3] or t.dtype != dtype or (t.shape[2] > 1 and t.stride(2) != 1):
            raise InputError(
                f"qcompiler::{op}: {name} are {dtype}{list(codes.shape[:3])} with tokens side by side, not "
                f"{t.dtype}{list(t.shape)} with strides {list(t.stride())}"
            )


def check_write(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    values: torch.Tensor,
    positions: torch.Tensor,
    form: str,
) -> None:
    """Raise InputError where arguments of ``kv_write`` do not fit together."""
    if values.dim() != 4 or values.dtype not in FLOATS:
        raise InputError(
            f"qcompiler::kv_write: values are f16, bf16 or f32 [B, H_kv, S, D], not {values.dtype}{list(values.shape)}"
        )
    check_cache("kv_write", codes, scales, zeros, values.shape[3], form)
    if values.shape[:2] != codes.shape[:2]:
        raise InputError(
            f"qcompiler::kv_write: values of {values.shape[0]} sequences and {values.shape[1]} heads for a cache of "
            f"{codes.shape[0]} and {codes.shape[1]}"
        )
    each = tuple(values.shape[:1]) + tuple(values.shape[2:3])
    if positions.dtype != torch.int64 or tuple(positions.shape) not in (each, each[1:]):
        raise InputError(
            f"qcompiler::kv_write: positions are int64[{each[1]}] or int64{list(each)}, not "
            f"{positions.dtype}{list(positions.shape)}"
        )


def check_attention(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    k_scales: torch.Tensor,
    k_zeros: torch.Tensor | None,
    v_codes: torch.Tensor,
    v_scales: torch.Tensor,
    v_zeros: torch.Tensor | None,
    lengths: torch.Tensor,
    form: str,
) -> None:
    """Raise InputError where arguments of ``kv_attention`` do not fit together."""
    if q.dim() != 4 or q.shape[2] != 1 or q.dtype not in FLOATS:
        raise InputError(
            f"qcompiler::kv_attention: q is f16, bf16 or f32 [B, H, 1, D], not {q.dtype}{list(q.shape)}; attention of "
            "more than one new token is what scaled_dot_product_attention is for"
        )
    check_cache("kv_attention", k_codes, k_scales, k_zeros, q.shape[3], form)
    check_cache("kv_attention", v_codes, v_scales, v_zeros, q.shape[3], form)
    if k_codes.shape != v_codes.shape:
        raise InputError(
            f"qcompiler::kv_attention: keys {list(k_codes.shape)} and values {list(v_codes.shape)} differ in shape"
        )
    batch, heads = k_codes.shape[:2]
    if q.shape[0] != batch or heads == 0 or q.shape[1] % heads:
        raise InputError(
            f"qcompiler::kv_attention: {q.shape[0]} queries of {q.shape[1]} heads for a cache of {batch} sequences and "
            f"{heads} heads; the heads of q are a multiple of those of the cache"
        )
    if lengths.dtype != torch.int64 or tuple(lengths.shape) != (batch,):
        raise InputError(
            f"qcompiler::kv_attention: lengths are int64[{batch}], not {lengths.dtype}{list(lengths.shape)}"
        )


# -- references ----------------------------------------------------------------------------------------------


def write_reference(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    values: torch.Tensor,
    positions: torch.Tensor,
    form: str,
) -> None:
    """``kv_write`` on CPU tensors. Raises InputError for positions outside the cache."""
    check_write(codes, scales, zeros, values, positions, form)
    if not values.numel():
        return
    low, high = int(positions.min()), int(positions.max())
    if low < 0 or high >= codes.shape[2]:
        raise InputError(
            f"qcompiler::kv_write: positions {low}..{high} lie outside a cache of {codes.shape[2]} tokens; allocate a "
            "longer one"
        )
    new = quantized(values, form)
    every = positions.expand(values.shape[0], -1)
    for b in range(values.shape[0]):
        codes.view(torch.uint8)[b, :, every[b]] = new[0][b].view(torch.uint8)
        scales[b, :, every[b]] = new[1][b]
        if zeros is not None and new[2] is not None:
            zeros[b, :, every[b]] = new[2][b]


def attention_reference(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    k_scales: torch.Tensor,
    k_zeros: torch.Tensor | None,
    v_codes: torch.Tensor,
    v_scales: torch.Tensor,
    v_zeros: torch.Tensor | None,
    lengths: torch.Tensor,
    scale: float,
    form: str,
) -> torch.Tensor:
    """``kv_attention`` on CPU tensors, in f32. Raises InputError for lengths beyond the cache."""
    check_attention(q, k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros, lengths, form)
    batch, heads, tokens = k_codes.shape[:3]
    if batch and (int(lengths.min()) < 0 or int(lengths.max()) > tokens):
        raise InputError(
            f"qcompiler::kv_attention: lengths {int(lengths.min())}..{int(lengths.max())} for a cache of {tokens} "
            "tokens; a window that slides is not supported, allocate a cache as long as the longest sequence"
        )
    grouped = q.to(torch.float32).reshape(batch, heads, -1, q.shape[3])
    scores = torch.zeros(*grouped.shape[:3], tokens)
    spans = [slice(s, min(s + _CHUNK, tokens)) for s in range(0, tokens, _CHUNK)]

    def floats(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, span: slice) -> torch.Tensor:
        """Of tokens of a span, with zeros in place of what lies beyond a sequence's length."""
        some = dequantized(codes[:, :, span], scales[:, :, span], None if zeros is None else zeros[:, :, span], form)
        beyond = torch.arange(span.start, span.stop) >= lengths[:, None]
        return some.masked_fill(beyond[:, None, :, None], 0.0)

    for span in spans:
        scores[..., span] = grouped @ floats(k_codes, k_scales, k_zeros, span).transpose(-1, -2) * scale
    beyond = torch.arange(tokens) >= lengths[:, None]
    weights = torch.softmax(scores.masked_fill(beyond[:, None, None, :], float("-inf")), -1)
    weights = weights.masked_fill((lengths == 0)[:, None, None, None], 0.0)
    y = torch.zeros_like(grouped)
    for span in spans:
        y += weights[..., span] @ floats(v_codes, v_scales, v_zeros, span)
    return y.reshape(q.shape).to(q.dtype)
