"""``qcompiler::wn_embedding``: rows of a table of 2, 4 or 8 bits, decoded when they are asked for.

The table has the layout of a weight (:mod:`qcompiler.backends.triton.layouts`) with a row for each token, so a tied
language head and embedding are one tensor. Only rows that are asked for are read. Numbers: exact codes, zero points and
scales in f32, rounded once; of nf4 the kernel rounds the values of codes to float16 before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from qcompiler.backends.triton.launching import launch, sm_of
from qcompiler.backends.triton.layouts import ROWS, padded
from qcompiler.backends.triton.registering import FLOATS, register
from qcompiler.backends.triton.tiles import Tile, tile_for
from qcompiler.backends.triton.weight_only import (
    CHUNK,
    check_weight,
    decoded_rows,
    raw_scales,
    scale_columns,
    zero_kind,
)
from qcompiler.errors import InputError

if TYPE_CHECKING:
    from qcompiler.backends.triton.claims import Claim


def _check(
    indices: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    k: int,
    group: int,
    form: str,
    out: torch.dtype,
) -> None:
    if indices.dtype not in (torch.int32, torch.int64):
        raise InputError(f"qcompiler::wn_embedding: indices are int32 or int64, not {indices.dtype}")
    if out not in FLOATS:
        raise InputError(f"qcompiler::wn_embedding gives f32, f16 or bf16, not {out}")
    if codes.dim() != 3:
        raise InputError(f"qcompiler::wn_embedding: a table is [ceil(K / 128), N', words], not {list(codes.shape)}")
    check_weight("wn_embedding", codes, scales, zeros, global_scale, int(codes.shape[1]), k, group, form)


def _reference(
    indices: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    k: int,
    group: int,
    form: str,
    out: torch.dtype,
) -> torch.Tensor:
    _check(indices, codes, scales, zeros, global_scale, k, group, form, out)
    flat = indices.reshape(-1).long()
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= codes.shape[1]):
        raise InputError(
            f"qcompiler::wn_embedding: indices {int(flat.min())}..{int(flat.max())} for a table of "
            f"{codes.shape[1]} rows"
        )
    y = torch.empty((flat.numel(), k), dtype=out)
    step = max(1, CHUNK // max(1, k * ROWS)) * ROWS
    for start in range(0, flat.numel(), step):
        some = flat[start : start + step]
        rows = torch.nn.functional.pad(some, (0, padded(some.numel(), ROWS) - some.numel()))
        of_rows = None if zeros is None else zeros[:, rows]
        scale = scale_columns(scales, form, group, rows)
        values = decoded_rows(codes[:, rows], scale, of_rows, k, group, form)[: some.numel()]
        y[start : start + step] = values if global_scale is None else values * global_scale.reshape(())
    return y.reshape(*indices.shape, k)


def _fake(
    indices: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    k: int,
    group: int,
    form: str,
    out: torch.dtype,
) -> torch.Tensor:
    _check(indices, codes, scales, zeros, global_scale, k, group, form, out)
    return codes.new_empty((*indices.shape, k), dtype=out)


def embedding_cuda(
    indices: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    k: int,
    group: int,
    form: str,
    out: torch.dtype,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Launch the gather, one program for ``tile.bn`` rows and 128 columns. An index outside the table gives NaN."""
    from qcompiler.backends.triton.device.gather import gather_kernel

    _check(indices, codes, scales, zeros, global_scale, k, group, form, out)
    flat = indices.reshape(-1)
    count = flat.numel()
    y = torch.empty((count, k), dtype=out, device=codes.device)
    if count and k:
        tile = tile or tile_for("gather", sm_of(codes.device), count, 128, k)
        rows = min(tile.bn, 1 << (count - 1).bit_length())
        launch(
            gather_kernel,
            (-(-count // rows), codes.shape[0]),
            flat.contiguous(),
            codes,
            raw_scales(scales),
            zeros,
            global_scale,
            y,
            count,
            k,
            codes.shape[1],
            FORM=form,
            GROUP=group,
            ZEROS=zero_kind(zeros),
            BN=rows,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return y.reshape(*indices.shape, k)


register(
    "wn_embedding(Tensor indices, Tensor codes, Tensor scales, Tensor? zeros, Tensor? global_scale, int k, int group, "
    "str form, ScalarType out) -> Tensor",
    reference=_reference,
    fake=_fake,
    cuda=embedding_cuda,
)


# -- claims --------------------------------------------------------------------------------------------------

_CASES: tuple[tuple[str, int, bool, int, torch.dtype], ...] = (
    ("int4", 128, True, 512, torch.bfloat16),
    ("int8", 0, False, 512, torch.float16),
    ("nvfp4", 16, False, 512, torch.bfloat16),
    ("nf4", 64, False, 1, torch.bfloat16),
)
"""Form, group, zero points, rows asked for, output."""


def claims(sm: int) -> Iterator[Claim]:
    """What is proved of the gather for ``sm``: nothing spills, and only the rows asked for are written."""
    from qcompiler.backends.triton.claims import Claim, fake
    from qcompiler.backends.triton.layouts import fragment_shape, scale_rows

    n, k = 32000, 4096
    for form, group, asymmetric, count, out in _CASES:

        def run(
            form: str = form,
            group: int = group,
            asymmetric: bool = asymmetric,
            count: int = count,
            out: torch.dtype = out,
        ) -> object:
            laid = (scale_rows(k, group), n)
            scales = fake(laid, torch.float8_e4m3fn if form == "nvfp4" else torch.bfloat16)
            zeros = fake(laid, torch.int16) if asymmetric else None
            whole = fake((1,), torch.float32) if form == "nvfp4" else None
            codes = fake(fragment_shape(n, k, form), torch.int32)
            return embedding_cuda(fake((count,), torch.int64), codes, scales, zeros, whole, k, group, form, out)

        case = f"{form} g{group} {count} rows of {n}x{k} to {out}".replace("torch.", "")
        wide = frozenset({"codes_ptr"} if count > 1 else ())  # 128 columns of one row are 2 to 4 bytes a thread
        yield Claim("torch-cuda/gather", case, run, None, wide=wide)
