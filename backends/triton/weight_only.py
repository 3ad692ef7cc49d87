"""``qcompiler::wn_linear``: products with weights of 2, 4 or 8 bits, decoded where they are multiplied.

Numbers. Sums, scales on sums and what follows are f32; the result is rounded once. f32 activations are rounded to bf16
first. Weights are exact integers or floats in the activations' 16 bits, with two exceptions: where a scale goes on the
weights (groups under 128, and long groups in tiles of more than 64 rows), ``weight * scale`` is rounded to 16 bits, the
scale before it too (in fp16 both are subnormal below 2^-14, and then off by up to 2^-25); and a zero point that is no
whole number moves its weights by at most 2^-10 of a step (bf16; fp16: 2^-13). The reference rounds activations likewise
and nothing else.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from qcompiler.backends.triton.forms import Form, form_called
from qcompiler.backends.triton.launching import launch, sm_of
from qcompiler.backends.triton.layouts import ROWS, fragment_shape, padded, scale_rows, unpack_codes
from qcompiler.backends.triton.layouts_float import places
from qcompiler.backends.triton.registering import FLOATS, register
from qcompiler.backends.triton.tiles import Tile, tile_for
from qcompiler.dtypes import dtype
from qcompiler.errors import InputError
from qcompiler.float_codes import table

SMALL = 16
"""Rows of x up to which the kernel for decoding is taken."""

LATE = 64
"""Rows of a tile up to which scales of long groups go on the products, not on the weights."""

ACTIVATIONS = ("none", "relu", "silu", "gelu", "gelu_tanh")
CHUNK = 1 << 22
"""Weights that the reference has in f32 at a time."""


# -- checks ----------------------------------------------------------------------------------------------------


def check_weight(
    op: str,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    n: int,
    k: int,
    group: int,
    form: str,
    experts: tuple[int, ...] = (),
) -> Form:
    """Check a weight in the layout of ``layouts.py``; ``experts`` are leading sizes of codes, scales and zeros.

    Raises InputError that names ``op``, what it got and what it takes.
    """
    known = form_called(form)
    fixed = {"mxfp4": 32, "nvfp4": 16}.get(form, group)
    if group != fixed or (form not in ("mxfp4", "nvfp4") and group not in (32, 64) and group % 128):
        raise InputError(
            f"qcompiler::{op}: groups are 32, 64 or a multiple of 128, or 0 (mxfp4: 32, nvfp4: 16), not {group}"
        )
    want = (*experts, *fragment_shape(n, k, form))
    if codes.dtype != torch.int32 or tuple(codes.shape) != want:
        raise InputError(
            f"qcompiler::{op}: {form} codes of a weight [{n}, {k}] are int32{list(want)}, not "
            f"{codes.dtype}{list(codes.shape)}; lay them out with layouts.pack_codes"
        )
    laid = (*experts, scale_rows(k, group), padded(n, ROWS))
    kinds = {"mxfp4": (torch.uint8,), "nvfp4": (torch.float8_e4m3fn,)}.get(form, FLOATS)
    _check_laid(op, "scales", scales, laid, kinds)
    if zeros is not None:
        if known.kind != "integer":
            raise InputError(f"qcompiler::{op}: {form} codes have no zero points; leave zeros out")
        _check_laid(op, "zeros", zeros, laid, (torch.int16, *FLOATS))
    if global_scale is not None and (global_scale.dtype != torch.float32 or global_scale.numel() != 1):
        raise InputError(
            f"qcompiler::{op}: the scale of the whole tensor is one torch.float32, not "
            f"{global_scale.dtype}{list(global_scale.shape)}"
        )
    for name, tensor in (("codes", codes), ("scales", scales), ("zeros", zeros)):
        if tensor is not None and not tensor.is_contiguous():
            raise InputError(f"qcompiler::{op}: {name} must be contiguous, their strides are {list(tensor.stride())}")
    return known


def _check_laid(op: str, name: str, got: torch.Tensor, want: tuple[int, ...], kinds: tuple[torch.dtype, ...]) -> None:
    if tuple(got.shape) != want or got.dtype not in kinds:
        types = " or ".join(map(str, kinds))
        raise InputError(
            f"qcompiler::{op}: {name} are {types} of shape {list(want)}, not {got.dtype}{list(got.shape)}; "
            f"lay them out with layouts.pack_{name}"
        )


def check_epilogue(
    op: str,
    lead: tuple[Any, ...],
    n: int,
    act: str,
    bias: torch.Tensor | None,
    mul: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> None:
    """Check what follows a product whose result is ``[*lead, n]``; raises InputError."""
    if act not in ACTIVATIONS:
        raise InputError(f"qcompiler::{op} knows the activations {', '.join(ACTIVATIONS)}, not {act!r}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise InputError(f"qcompiler::{op}: a bias of {n} features has shape [{n}], not {list(bias.shape)}")
    for name, tensor in (("mul", mul), ("residual", residual)):
        if tensor is None:
            continue
        shape, full = tuple(tensor.shape), (*lead, n)
        fits = len(shape) <= len(full) and all(
            a in (1, b) for a, b in zip(reversed(shape), reversed(full), strict=False)
        )
        if not fits:
            raise InputError(f"qcompiler::{op}: {name} {list(shape)} does not broadcast to the result {list(full)}")
    for name, tensor in (("bias", bias), ("mul", mul), ("residual", residual)):
        if tensor is not None and tensor.dtype not in FLOATS:
            raise InputError(f"qcompiler::{op}: {name} is f32, f16 or bf16, not {tensor.dtype}")


def _check(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    mul: torch.Tensor | None,
    residual: torch.Tensor | None,
    n: int,
    group: int,
    form: str,
    act: str,
) -> Form:
    if x.dim() < 1 or x.dtype not in FLOATS:
        raise InputError(f"qcompiler::wn_linear takes x [.., K] in f32, f16 or bf16, not {x.dtype}{list(x.shape)}")
    known = check_weight("wn_linear", codes, scales, zeros, global_scale, n, int(x.shape[-1]), group, form)
    check_epilogue("wn_linear", tuple(x.shape[:-1]), n, act, bias, mul, residual)
    return known


# -- reference -------------------------------------------------------------------------------------------------


def scale_values(scales: torch.Tensor, form: str) -> torch.Tensor:
    """Laid-out scales in f32; those of mxfp4 are exponents, ``2 ** (byte - 127)`` (OCP MX 1.0, E8M0)."""
    return torch.exp2(scales.float() - 127) if form == "mxfp4" else scales.float()


def scale_columns(scales: torch.Tensor, form: str, group: int, rows: Any = slice(None)) -> torch.Tensor:
    """Scales ``[G', rows]`` of some rows of the weight, a slice or indices, in the order of groups."""
    if form not in ("mxfp4", "nvfp4"):
        return scales[:, rows]
    order = torch.tensor(places(group)).argsort()
    held = scales.view(torch.uint8).reshape(-1, scales.shape[1], len(order))[:, rows][:, :, order]
    return held.transpose(1, 2).reshape(scales.shape[0], -1).view(scales.dtype)


def _spread(laid: torch.Tensor, group: int, k: int) -> torch.Tensor:
    """Laid-out scales or zeros ``[G', rows]`` as ``[rows, k]``, or ``[rows, 1]`` where one spans K."""
    return laid.T if group == 0 else laid.repeat_interleave(group, 0)[:k].T


def decoded_rows(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, k: int, group: int, form: str
) -> torch.Tensor:
    """f32 weights ``[rows, k]`` of fragments ``[tiles, rows, words]``, and of their columns of scales and zeros."""
    known = form_called(form)
    stored = unpack_codes(np.ascontiguousarray(codes.numpy()), form, codes.shape[1], k).view(np.uint8)
    if known.kind == "integer":
        values = torch.from_numpy(stored + np.uint8(known.shift)).float()
        zero = torch.tensor(float(known.shift)) if zeros is None else _spread(zeros.float(), group, k)
        if zeros is not None and zeros.dtype != torch.int16:
            zero = zero + known.shift
        values -= zero
    else:
        word = {"mxfp4": "f4e2m1", "nvfp4": "f4e2m1"}.get(form, form)
        values = torch.from_numpy(table(dtype(word)).astype(np.float32))[torch.from_numpy(stored).long()]
    return values * _spread(scale_values(scales, form), group, k)


def finished(
    sums: torch.Tensor,
    bias: torch.Tensor | None,
    act: str,
    mul: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.dtype,
) -> torch.Tensor:
    """``act(sums + bias) * mul + residual`` in f32, rounded once to ``out``."""
    if bias is not None:
        sums = sums + bias.float()
    functions: dict[str, Any] = {
        "none": lambda v: v,
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
    }
    sums = functions[act](sums)
    if mul is not None:
        sums = sums * mul.float()
    if residual is not None:
        sums = sums + residual.float()
    return sums.to(out)


def widened(rows: torch.Tensor) -> torch.Tensor:
    """Activations in f32 as kernels multiply them: those of f32 are rounded to bf16."""
    return (rows.bfloat16() if rows.dtype == torch.float32 else rows).float()


def _reference(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    mul: torch.Tensor | None,
    residual: torch.Tensor | None,
    n: int,
    group: int,
    form: str,
    act: str,
) -> torch.Tensor:
    _check(x, codes, scales, zeros, global_scale, bias, mul, residual, n, group, form, act)
    k, width = x.shape[-1], codes.shape[1]
    rows = widened(x.reshape(-1, k))
    sums = torch.empty((rows.shape[0], width))
    step = max(1, CHUNK // max(1, k * ROWS)) * ROWS
    for start in range(0, width, step):
        part = slice(start, min(start + step, width))
        of_part = None if zeros is None else zeros[:, part]
        scale = scale_columns(scales, form, group, part)
        sums[:, part] = rows @ decoded_rows(codes[:, part], scale, of_part, k, group, form).T
    if global_scale is not None:
        sums *= global_scale.reshape(())
    return finished(sums[:, :n].reshape(*x.shape[:-1], n), bias, act, mul, residual, x.dtype).contiguous()


def _fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    mul: torch.Tensor | None,
    residual: torch.Tensor | None,
    n: int,
    group: int,
    form: str,
    act: str,
) -> torch.Tensor:
    _check(x, codes, scales, zeros, global_scale, bias, mul, residual, n, group, form, act)
    return x.new_empty((*x.shape[:-1], n))


# -- launch ----------------------------------------------------------------------------------------------------


@functools.cache
def four_columns(sm: int, tile: Tile) -> bool:
    """Whether the products of ``tile`` are ``mma.sync`` of a Triton before 3.9 (see ``unpack.lane_columns``)."""
    import triton

    before = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)
    warpgroups = 90 <= sm < 120 and tile.warps % 4 == 0 and tile.bn >= 64 and tile.bm >= 16
    return before and not warpgroups and tile.bm <= SMALL


def zero_kind(zeros: torch.Tensor | None) -> int:
    """0 where there are no zero points, 1 where they are whole, 2 where they are floats (``unpack.NO_ZEROS`` ...)."""
    return 0 if zeros is None else 1 if zeros.dtype == torch.int16 else 2


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``x [.., K]`` as ``[M, K]`` with neighbouring columns; a copy only where strides ask for it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def rows_like(extra: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """A factor or summand, broadcast to ``shape``, as contiguous rows."""
    return None if extra is None else extra.expand(shape).contiguous().reshape(-1, shape[-1])


def raw_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales as kernels load them: those in 8-bit floats as bytes, since sm_80 has no such type."""
    return scales.view(torch.uint8) if scales.dtype == torch.float8_e4m3fn else scales


def linear_cuda(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    mul: torch.Tensor | None,
    residual: torch.Tensor | None,
    n: int,
    group: int,
    form: str,
    act: str,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Launch the product, and where the tile splits K, the sum of its parts. Arguments as the operator's."""
    from qcompiler.backends.triton.device.epilogue import reduce_kernel
    from qcompiler.backends.triton.device.weight_only import linear_kernel

    _check(x, codes, scales, zeros, global_scale, bias, mul, residual, n, group, form, act)
    shape, k = (*x.shape[:-1], n), x.shape[-1]
    rows = rows_of(x)
    m = rows.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m == 0 or n == 0:
        return out.reshape(shape)
    sm = sm_of(x.device)
    if tile is None:
        tile = tile_for(f"wn.{'gemv' if m <= SMALL else 'gemm'}.{form}", sm, m, n, k)
    factor, summand = rows_like(mul, shape), rows_like(residual, shape)
    split = max(1, min(tile.split, codes.shape[0]))
    partial = torch.empty((split, m, n), dtype=torch.float32, device=x.device) if split > 1 else None
    blocks_m, blocks_n = -(-m // tile.bm), -(-n // tile.bn)
    launch(
        linear_kernel,
        (blocks_m * blocks_n, split),
        rows,
        codes,
        raw_scales(scales),
        zeros,
        global_scale,
        bias,
        factor,
        summand,
        out,
        partial,
        m,
        n,
        k,
        rows.stride(0),
        codes.shape[1],
        FORM=form,
        GROUP=group,
        ZEROS=zero_kind(zeros),
        ACT=act,
        LATE=group >= 128 and tile.bm <= LATE,
        WHOLE=k % 128 == 0,
        LANES=four_columns(sm, tile),
        ONCE=blocks_m == 1,
        BF16=x.dtype != torch.float16,
        SYNC=not 90 <= sm < 120,
        BM=tile.bm,
        BN=tile.bn,
        SPLIT=split,
        GROUPED=tile.grouped,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if partial is not None:
        height = 1 if m == 1 else 4
        launch(
            reduce_kernel,
            (-(-n // 256), -(-m // height)),
            partial,
            bias,
            factor,
            summand,
            out,
            m,
            n,
            SPLIT=split,
            ACT=act,
            BM=height,
            BN=256,
            num_warps=4,
        )
    return out.reshape(shape)


register(
    "wn_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? global_scale, Tensor? bias, Tensor? mul, "
    "Tensor? residual, int n, int group, str form, str act) -> Tensor",
    reference=_reference,
    fake=_fake,
    cuda=linear_cuda,
)
