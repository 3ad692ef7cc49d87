"""``qcompiler::wn_grouped``: the experts of a mixture, each with a weight of 2, 4 or 8 bits, in one launch.

Rows of x are sorted by expert; ``offsets`` int32 ``[E]`` tells where those of each end, as ``torch._grouped_mm`` takes
it, and stays on the device: the grid is an upper bound, and each block finds its expert itself. Rows behind the last
expert's come out as 0. Weights, scales and zero points are laid out as those of ``wn_linear`` with a leading axis of
experts; a bias is ``[E, n]``, the scale of a whole tensor (nvfp4) one number or ``[E]``. Numbers as ``wn_linear``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from qcompiler.backends.triton.launching import launch, sm_of
from qcompiler.backends.triton.layouts import fragment_shape, scale_rows
from qcompiler.backends.triton.registering import FLOATS, register
from qcompiler.backends.triton.tiles import Tile, tile_for
from qcompiler.backends.triton.weight_only import (
    ACTIVATIONS,
    LATE,
    check_weight,
    decoded_rows,
    finished,
    four_columns,
    raw_scales,
    rows_of,
    scale_columns,
    widened,
    zero_kind,
)
from qcompiler.errors import InputError

if TYPE_CHECKING:
    from qcompiler.backends.triton.claims import Claim

_MOST = 1 << 12
"""Experts; each block looks through them all."""
_REGISTERS = (168, 255)
"""Registers a thread may have in tiles of up to 16 rows and in larger ones: left alone, the assembler spills a few."""


def _check(
    x: torch.Tensor,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    group: int,
    form: str,
    act: str,
) -> None:
    if x.dim() != 2 or x.dtype not in FLOATS:
        raise InputError(f"qcompiler::wn_grouped takes x [T, K] in f32, f16 or bf16, not {x.dtype}{list(x.shape)}")
    experts = int(codes.shape[0]) if codes.dim() == 4 else -1
    if experts < 1 or experts >= _MOST or offsets.dtype != torch.int32 or tuple(offsets.shape) != (experts,):
        raise InputError(
            f"qcompiler::wn_grouped takes codes [E, ceil(K / 128), N', words] of 1 to {_MOST - 1} experts and offsets "
            f"int32[E], not {list(codes.shape)} and {offsets.dtype}{list(offsets.shape)}"
        )
    each = global_scale is not None and tuple(global_scale.shape) == (experts,)
    if each and global_scale is not None and global_scale.dtype != torch.float32:
        raise InputError(f"qcompiler::wn_grouped: scales of whole tensors are f32, not {global_scale.dtype}")
    whole = None if each else global_scale
    check_weight("wn_grouped", codes, scales, zeros, whole, n, int(x.shape[1]), group, form, (experts,))
    if act not in ACTIVATIONS:
        raise InputError(f"qcompiler::wn_grouped knows the activations {', '.join(ACTIVATIONS)}, not {act!r}")
    if bias is not None and (tuple(bias.shape) != (experts, n) or bias.dtype not in FLOATS):
        raise InputError(
            f"qcompiler::wn_grouped: the bias of {experts} experts of {n} features is [{experts}, {n}] in f32, f16 or "
            f"bf16, not {bias.dtype}{list(bias.shape)}"
        )


def _reference(
    x: torch.Tensor,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    group: int,
    form: str,
    act: str,
) -> torch.Tensor:
    _check(x, offsets, codes, scales, zeros, global_scale, bias, n, group, form, act)
    ends = [0, *offsets.tolist()]
    if any(a > b for a, b in pairwise(ends)) or ends[-1] > x.shape[0]:
        raise InputError(
            f"qcompiler::wn_grouped: offsets are where the rows of each expert end, so they grow up to T={x.shape[0]}; "
            f"these are {ends[1:]}"
        )
    y = torch.zeros((x.shape[0], n), dtype=x.dtype)
    for e, (start, end) in enumerate(pairwise(ends)):
        if start == end:
            continue
        of_expert = None if zeros is None else zeros[e]
        scale = scale_columns(scales[e], form, group)
        sums = widened(x[start:end]) @ decoded_rows(codes[e], scale, of_expert, x.shape[1], group, form).T
        if global_scale is not None:
            sums *= global_scale.reshape(-1)[e if global_scale.numel() > 1 else 0]
        y[start:end] = finished(sums[:, :n], None if bias is None else bias[e], act, None, None, x.dtype)
    return y


def _fake(
    x: torch.Tensor,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    group: int,
    form: str,
    act: str,
) -> torch.Tensor:
    _check(x, offsets, codes, scales, zeros, global_scale, bias, n, group, form, act)
    return x.new_empty((x.shape[0], n))


def grouped_cuda(
    x: torch.Tensor,
    offsets: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    group: int,
    form: str,
    act: str,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Launch the product. A tile from the tables is that for T / E rows, as if experts had equal shares of them."""
    from qcompiler.backends.triton.device.grouped import grouped_kernel

    _check(x, offsets, codes, scales, zeros, global_scale, bias, n, group, form, act)
    rows = rows_of(x)
    count, k = rows.shape
    experts = codes.shape[0]
    out = torch.empty((count, n), dtype=x.dtype, device=x.device)
    if count == 0 or n == 0:
        return out
    sm = sm_of(x.device)
    tile = tile or tile_for(f"grouped.{form}", sm, -(-count // experts), n, k)
    if x.dtype == torch.float32 and tile.bm > 16:
        rows = rows.to(torch.bfloat16)  # as the kernel would, but once and not for each tile of N
    launch(
        grouped_kernel,
        (count // tile.bm + min(experts + 1, count), -(-n // tile.bn)),
        rows,
        offsets.contiguous(),
        codes,
        raw_scales(scales),
        zeros,
        global_scale,
        None if bias is None else bias.contiguous(),
        out,
        count,
        n,
        k,
        rows.stride(0),
        codes.shape[2],
        scale_rows(k, group),
        0 if global_scale is None or global_scale.numel() == 1 else 1,
        EXPERTS=experts,
        PADDED=1 << experts.bit_length(),
        FORM=form,
        GROUP=group,
        ZEROS=zero_kind(zeros),
        ACT=act,
        LATE=group >= 128 and tile.bm <= LATE,
        WHOLE=k % 128 == 0,
        LANES=four_columns(sm, tile),
        ONCE=count // experts < tile.bm,
        BF16=x.dtype != torch.float16,
        SYNC=not 90 <= sm < 120,
        BM=tile.bm,
        BN=tile.bn,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=_REGISTERS[tile.bm > 16],
    )
    return out


register(
    "wn_grouped(Tensor x, Tensor offsets, Tensor codes, Tensor scales, Tensor? zeros, Tensor? global_scale, "
    "Tensor? bias, int n, int group, str form, str act) -> Tensor",
    reference=_reference,
    fake=_fake,
    cuda=grouped_cuda,
)


# -- claims --------------------------------------------------------------------------------------------------

_CASES: tuple[tuple[str, int, bool, int, torch.dtype], ...] = (
    ("int4", 128, False, 4, torch.bfloat16),
    ("uint4", 32, True, 512, torch.float16),
    ("int8", 0, False, 4096, torch.bfloat16),
    ("mxfp4", 32, False, 4, torch.bfloat16),
    ("nvfp4", 16, False, 4096, torch.bfloat16),
    ("uint8", 0, True, 32768, torch.bfloat16),
    ("int2", 64, False, 64, torch.bfloat16),
    ("uint2", 64, True, 32768, torch.bfloat16),
    ("f4e2m1", 64, False, 512, torch.bfloat16),
    ("f8e4m3", 0, False, 64, torch.float16),
    ("f8e5m2", 0, False, 32768, torch.bfloat16),
    ("nf4", 64, False, 512, torch.bfloat16),
)
"""Form, group, zero points, rows, activation."""


def claims(sm: int) -> Iterator[Claim]:
    """What is proved for ``sm``: experts' weights are read 16 bytes a thread and multiplied by tensor cores."""
    from qcompiler.backends.triton.claims import Claim, fake

    experts, n, k = 8, 14336, 4096
    for form, group, asymmetric, count, element in _CASES:

        def run(
            form: str = form,
            group: int = group,
            asymmetric: bool = asymmetric,
            count: int = count,
            element: torch.dtype = element,
        ) -> object:
            laid = (experts, scale_rows(k, group), n)
            scales = fake(laid, {"mxfp4": torch.uint8, "nvfp4": torch.float8_e4m3fn}.get(form, element))
            zeros = fake(laid, torch.int16) if asymmetric else None
            factor = fake((experts,), torch.float32) if form == "nvfp4" else None
            codes = fake((experts, *fragment_shape(n, k, form)), torch.int32)
            x, offsets = fake((count, k), element), fake((experts,), torch.int32)
            return grouped_cuda(x, offsets, codes, scales, zeros, factor, None, n, group, form, "none")

        case = f"{form} g{group}{' asym' if asymmetric else ''} E={experts} T={count} {n}x{k} {element}"
        row = f"torch-cuda/grouped.{form}"
        yield Claim(row, case.replace("torch.", ""), run, "f16", wide=frozenset({"codes_ptr"}))
