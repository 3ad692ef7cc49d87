"""A KV cache in 8 or 4 bits: operators ``qcompiler::kv_write`` and ``qcompiler::kv_attention``, and a cache of a layer.

``kv_write`` quantizes new tokens into the cache; ``kv_attention`` is the attention of one new token to all that are
there, reading codes. Their laws and layouts are those of :mod:`qcompiler.backends.triton.kv_codes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from qcompiler.backends.triton.kv_codes import FORMS, check_attention, check_write, codes_width, dequantized, quantized
from qcompiler.backends.triton.launching import launch, processors_of, sm_of
from qcompiler.backends.triton.registering import register
from qcompiler.backends.triton.tiles import Tile, tile_for
from qcompiler.errors import InputError

if TYPE_CHECKING:
    from qcompiler.backends.triton.claims import Claim

_CHUNK = 512
"""Tokens of the cache that the reference holds as floats at a time."""
_WRITTEN = 16
"""Tokens a program writes."""
_COMBINED = 16
"""Parts that are combined at a time."""
_ROWS = 32
"""Query heads that share a head of the cache and are multiplied at a time, at most."""
_WAVES = 2
"""Blocks a processor holds at a time: two fit the shared memory with the tiles that ship."""


# -- references ----------------------------------------------------------------------------------------------


def _write_reference(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    values: torch.Tensor,
    positions: torch.Tensor,
    form: str,
) -> None:
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


def _attention_reference(
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


# -- fakes ---------------------------------------------------------------------------------------------------


def _write_fake(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    values: torch.Tensor,
    positions: torch.Tensor,
    form: str,
) -> None:
    check_write(codes, scales, zeros, values, positions, form)


def _attention_fake(
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
    check_attention(q, k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros, lengths, form)
    return q.new_empty(q.shape)


# -- launchers -----------------------------------------------------------------------------------------------


def _bytes(codes: torch.Tensor) -> torch.Tensor:
    """Codes as the kernels read them: 8-bit floats as bytes, since sm_80 has no type for them."""
    return codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()


def write_cuda(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    values: torch.Tensor,
    positions: torch.Tensor,
    form: str,
    tile: Tile | None = None,
) -> None:
    """Launch the writer, one program for up to ``tile.bm`` tokens of a head. Positions outside the cache are skipped."""
    from qcompiler.backends.triton.device.kv_writing import write_kernel

    check_write(codes, scales, zeros, values, positions, form)
    batch, heads, count, head_dim = values.shape
    if not values.numel():
        return
    tile = tile or tile_for("kv.write", sm_of(values.device), count, head_dim, 1)
    block = min(_power(count), tile.bm)
    width = codes.shape[3]
    held = _bytes(codes)
    zero = scales if zeros is None else zeros
    if positions.stride(-1) != 1 and count > 1:
        positions = positions.contiguous()
    launch(
        write_kernel,
        (batch * heads, -(-count // block)),
        values,
        positions,
        held,
        scales,
        zero,
        count,
        codes.shape[2],
        heads,
        *values.stride(),
        positions.stride(0) if positions.dim() == 2 else 0,
        *held.stride()[:3],
        *scales.stride()[:2],
        *zero.stride()[:2],
        FORM=form,
        BYTES=width,
        COLUMNS=_power(width),
        BLOCK=block,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _parts(programs: int, tokens: int, block: int, processors: int) -> int:
    """Parts of the tokens for programs of their own: about a wave of blocks, and at least two steps each."""
    return max(1, min(_WAVES * processors // max(programs, 1), tokens // (2 * block)))


def attention_cuda(
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
    tile: Tile | None = None,
) -> torch.Tensor:
    """Launch attention over ``tile.bn`` tokens at a time, and the combination of parts where there are several.

    ``tile.bm``: query heads at a time, of those that share a head of the cache. Lengths beyond the cache are taken as
    its own: they are known on the GPU only.
    """
    from qcompiler.backends.triton.device.attention import attend_kernel, combine_kernel

    check_attention(q, k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros, lengths, form)
    batch, query_heads, _, head_dim = q.shape
    heads, tokens, width = k_codes.shape[1:]
    y = torch.empty((batch, query_heads, 1, head_dim), dtype=q.dtype, device=q.device)
    if not batch or not query_heads or not tokens:
        return y.zero_()
    keys, values = _bytes(k_codes), _bytes(v_codes)
    if max(k.stride(2) for k in (keys, values)) * tokens >= 1 << 31:
        raise InputError(
            f"qcompiler::kv_attention: the {tokens} tokens of a head span 2 GiB; make them lie closer, [B, H_kv, T, D]"
        )
    group = query_heads // heads
    if tile is None:
        rows = max(16, min(_power(group), _ROWS))
        tile = tile_for(f"kv.attention.{form}", sm_of(q.device), rows, head_dim, 1)
        tiles = -(-group // tile.bm)
        tile = replace(tile, split=_parts(batch * heads * tiles, tokens, tile.bn, processors_of(q.device)))
    split, columns = tile.split, _power(width)
    padded = 2 * columns if form == "int4" else columns
    unit = math.gcd(16, width, *(s for t in (keys, values) for s in t.stride()[:2]))
    partial = y if split == 1 else q.new_empty((batch, query_heads, split, padded), dtype=torch.float32)
    stats = y if split == 1 else q.new_empty((batch, query_heads, split, 2), dtype=torch.float32)
    k_zero = k_scales if k_zeros is None else k_zeros
    v_zero = v_scales if v_zeros is None else v_zeros
    launch(
        attend_kernel,
        (batch * heads * -(-group // tile.bm), split),
        q,
        keys,
        k_scales,
        k_zero,
        values,
        v_scales,
        v_zero,
        lengths.contiguous(),
        y,
        partial,
        stats,
        tokens,
        heads,
        group,
        float(scale),
        q.stride(0),
        q.stride(1),
        q.stride(3),
        *(s // unit for t in (keys, values) for s in t.stride()[:2]),
        *(s for t in (k_scales, v_scales, k_zero, v_zero) for s in t.stride()[:2]),
        FORM=form,
        D=head_dim,
        BYTES=width,
        COLUMNS=columns,
        K_TOKEN=keys.stride(2),
        V_TOKEN=values.stride(2),
        UNIT=unit,
        SPLIT=split,
        ROWS=tile.bm,
        BLOCK=tile.bn,
        NATIVE=sm_of(q.device) >= 89,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if split > 1:
        launch(
            combine_kernel,
            (batch * query_heads,),
            partial,
            stats,
            y,
            D=head_dim,
            WIDTH=padded,
            SPLIT=split,
            PARTS=_power(split),
            CHUNK=_COMBINED,
            num_warps=4,
            num_stages=2,
        )
    return y


register(
    "kv_write(Tensor(a!) codes, Tensor(b!) scales, Tensor(c!)? zeros, Tensor values, Tensor positions, str form) -> ()",
    reference=_write_reference,
    fake=_write_fake,
    cuda=write_cuda,
)
register(
    "kv_attention(Tensor q, Tensor k_codes, Tensor k_scales, Tensor? k_zeros, Tensor v_codes, Tensor v_scales, "
    "Tensor? v_zeros, Tensor lengths, float scale, str form) -> Tensor",
    reference=_attention_reference,
    fake=_attention_fake,
    cuda=attention_cuda,
)
