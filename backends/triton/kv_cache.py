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

from qcompiler.backends.triton.kv_codes import (
    FORMS,
    attention_reference,
    check_attention,
    check_write,
    codes_width,
    write_reference,
)
from qcompiler.backends.triton.launching import launch, processors_of, sm_of
from qcompiler.backends.triton.registering import register
from qcompiler.backends.triton.tiles import Tile, tile_for
from qcompiler.errors import InputError

if TYPE_CHECKING:
    from qcompiler.backends.triton.claims import Claim

_COMBINED = 16
"""Parts that are combined at a time."""
_ROWS = 32
"""Query heads that share a head of the cache and are multiplied at a time, at most."""
_REGISTERS = 255
"""Registers a thread may have, all that there are: the assembler spills a few to fit one more block."""
_WAVES = 2
"""Blocks a processor holds at a time: two fit the shared memory with the tiles that ship."""


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
    """Launch the writer, one program for up to ``tile.bm`` tokens of a head; positions outside are skipped."""
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


def _tile(form: str, group: int, padded: int, sm: int) -> Tile:
    """The tile for ``group`` query heads a head of the cache, of ``padded`` features."""
    return tile_for(f"kv.attention.{form}", sm, max(16, min(_power(group), _ROWS)), padded, 1)


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
    columns = _power(width)
    padded = 2 * columns if form == "int4" else columns
    if tile is None:
        tile = _tile(form, group, padded, sm_of(q.device))
        tiles = -(-group // tile.bm)
        tile = replace(tile, split=_parts(batch * heads * tiles, tokens, tile.bn, processors_of(q.device)))
    split = tile.split
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
        split,
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
        WHOLE=split == 1,
        ROWS=tile.bm,
        BLOCK=tile.bn,
        NATIVE=sm_of(q.device) >= 89,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=_REGISTERS,
    )
    if split > 1:
        launch(
            combine_kernel,
            (batch * query_heads,),
            partial,
            stats,
            y,
            split,
            D=head_dim,
            WIDTH=padded,
            PADDED=_power(split),
            CHUNK=_COMBINED,
            num_warps=4,
            num_stages=2,
        )
    return y


register(
    "kv_write(Tensor(a!) codes, Tensor(b!) scales, Tensor(c!)? zeros, Tensor values, Tensor positions, str form) -> ()",
    reference=write_reference,
    fake=_write_fake,
    cuda=write_cuda,
)
register(
    "kv_attention(Tensor q, Tensor k_codes, Tensor k_scales, Tensor? k_zeros, Tensor v_codes, Tensor v_scales, "
    "Tensor? v_zeros, Tensor lengths, float scale, str form) -> Tensor",
    reference=attention_reference,
    fake=_attention_fake,
    cuda=attention_cuda,
)


# -- a cache of a layer --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizedCache:
    """Keys and values of one layer, for a loop that decodes: allocate it once, write tokens, attend to them.

    Codes, scales and zero points are as in :mod:`kv_codes`. ``lengths``: tokens there are of each sequence, int64
    ``[B]``; the host does not know them, so it does not wait for the device either.
    """

    form: str
    k_codes: torch.Tensor
    k_scales: torch.Tensor
    k_zeros: torch.Tensor | None
    v_codes: torch.Tensor
    v_scales: torch.Tensor
    v_zeros: torch.Tensor | None
    lengths: torch.Tensor

    @classmethod
    def allocate(
        cls,
        batch: int,
        kv_heads: int,
        length: int,
        head_dim: int,
        form: str = "int8",
        device: torch.device | str = "cpu",
    ) -> QuantizedCache:
        """An empty cache for ``length`` tokens of each sequence, in ``int8``, ``f8e4m3`` or ``int4``."""
        lead = (batch, kv_heads, length)
        shape = (*lead, codes_width(head_dim, form))

        def part() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
            zeros = torch.zeros(lead, dtype=torch.uint8, device=device) if form == "int4" else None
            codes = torch.zeros(shape, dtype=torch.uint8, device=device).view(FORMS[form])
            return codes, torch.zeros(lead, dtype=torch.float32, device=device), zeros

        return cls(form, *part(), *part(), torch.zeros(batch, dtype=torch.int64, device=device))

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, scales and zero points."""
        held = (self.k_codes, self.k_scales, self.k_zeros, self.v_codes, self.v_scales, self.v_zeros)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def write(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor | None = None) -> None:
        """Put in ``keys`` and ``values [B, H_kv, S, D]``: after the tokens there are, or at ``positions``, int64
        ``[S]`` or ``[B, S]``. A sequence's length becomes its highest position plus one, if that is more than before.

        On CPUs a position beyond the cache raises InputError; on GPUs the token is dropped.
        """
        count = keys.shape[2]
        if positions is None:
            positions = self.lengths[:, None] + torch.arange(count, device=self.lengths.device)
        write = torch.ops.qcompiler.kv_write
        write(self.k_codes, self.k_scales, self.k_zeros, keys, positions, self.form)
        write(self.v_codes, self.v_scales, self.v_zeros, values, positions, self.form)
        if count:
            reached = positions.amax(-1).clamp(max=self.k_codes.shape[2] - 1) + 1
            self.lengths.copy_(torch.maximum(self.lengths, reached))

    def attend(self, q: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        """Attention of ``q [B, H, 1, D]`` over the tokens there are; ``scale`` is ``D ** -0.5`` if not given."""
        scale = q.shape[3] ** -0.5 if scale is None else scale
        keys = (self.k_codes, self.k_scales, self.k_zeros)
        values = (self.v_codes, self.v_scales, self.v_zeros)
        y: torch.Tensor = torch.ops.qcompiler.kv_attention(q, *keys, *values, self.lengths, scale, self.form)
        return y


# -- claims --------------------------------------------------------------------------------------------------

_ATTENTION: tuple[tuple[str, int, int, int, int, torch.dtype], ...] = (
    ("int8", 128, 32, 8, 8192, torch.bfloat16),
    ("int4", 128, 64, 4, 8191, torch.bfloat16),
    ("int8", 80, 32, 1, 4096, torch.float16),
    ("f8e4m3", 256, 8, 8, 4096, torch.bfloat16),
)
"""Form, D, H, H_kv, T, query."""
_WRITTEN: tuple[tuple[str, int, int, torch.dtype], ...] = (
    ("int8", 128, 1, torch.bfloat16),
    ("int4", 128, 512, torch.bfloat16),
    ("f8e4m3", 80, 512, torch.float16),
)
"""Form, D, tokens written, values."""


def claims(sm: int) -> Iterator[Claim]:
    """What is proved for ``sm``: codes are read 16 bytes a thread and multiplied by tensor cores, nothing spills, and
    attention stores its result and sums of parts alone."""
    from qcompiler.backends.triton.claims import Claim, fake

    def cache(
        form: str, heads: int, tokens: int, head_dim: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        lead = (4, heads, tokens)
        zeros = fake(lead, torch.uint8) if form == "int4" else None
        return fake((*lead, codes_width(head_dim, form)), FORMS[form]), fake(lead, torch.float32), zeros

    for form, head_dim, heads, kv_heads, tokens, element in _ATTENTION:

        def attend(
            form: str = form,
            head_dim: int = head_dim,
            heads: int = heads,
            kv_heads: int = kv_heads,
            tokens: int = tokens,
            element: torch.dtype = element,
        ) -> object:
            held = cache(form, kv_heads, tokens, head_dim)
            q = fake((4, heads, 1, head_dim), element)
            return attention_cuda(q, *held, *held, fake((4,), torch.int64), head_dim**-0.5, form)

        case = f"{form} D={head_dim} H={heads}/{kv_heads} T={tokens} {element}".replace("torch.", "")
        outputs = frozenset({"y_ptr", "partial_ptr", "stats_ptr"})
        taken = 2 * head_dim * _tile(form, heads // kv_heads, _power(head_dim), sm).bn  # keys and values
        wide = frozenset({"k_ptr", "v_ptr"})
        yield Claim("torch-cuda/kv.attention", case, attend, "f16", outputs, wide, loop_weights=taken)
    for form, head_dim, count, element in _WRITTEN:

        def write(
            form: str = form, head_dim: int = head_dim, count: int = count, element: torch.dtype = element
        ) -> object:
            held = cache(form, 8, 4096, head_dim)
            write_cuda(*held, fake((4, 8, count, head_dim), element), fake((count,), torch.int64), form)
            return held

        case = f"{form} D={head_dim} S={count} {element}".replace("torch.", "")
        yield Claim("torch-cuda/kv.write", case, write, None, frozenset({"codes_ptr", "scale_ptr", "zero_ptr"}))
