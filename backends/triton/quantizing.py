"""Operators ``qcompiler::quantize_rows`` and ``qcompiler::quantize_static``: codes of activations for W8A8 and W4A8.

Codes are int8, e4m3 or e5m2: ``round(x / scale)`` in f32, to nearest, ties to even, saturating. A dynamic scale is
the largest magnitude of a row (or of 128 columns of it) over 127.5 (int8, the law of ``clipping.affine_params``), 448
(e4m3) or 57344 (e5m2); 1 for zeros, never under the smallest normal f32. What comes before it may be fused: an RMS norm
and the factors that SmoothQuant could not fold, each rounded to the dtype of the activation as it would be by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from qcompiler.backends.triton.architectures import architecture
from qcompiler.backends.triton.launching import launch, sm_of
from qcompiler.backends.triton.registering import FLOATS, register
from qcompiler.backends.triton.tiles import Tile, tile_for
from qcompiler.backends.triton.weight_only import rows_of
from qcompiler.errors import InputError

if TYPE_CHECKING:
    from qcompiler.backends.triton.claims import Claim

BLOCK = 128
"""Columns that share a scale where a row has several."""
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""The largest code of each type."""
DIVISOR = {**LARGEST, torch.int8: 127.5}
"""What the largest magnitude is divided by."""
_SMALLEST = 2.0**-126


def codes_name(code: torch.dtype) -> str:
    """``int8``, ``f8e4m3`` or ``f8e5m2``."""
    return {torch.int8: "int8", torch.float8_e4m3fn: "f8e4m3", torch.float8_e5m2: "f8e5m2"}[code]


# -- checks --------------------------------------------------------------------------------------------------


def _check(
    op: str, x: torch.Tensor, smooth: torch.Tensor | None, norm_weight: torch.Tensor | None, code: torch.dtype
) -> None:
    if x.dtype not in FLOATS:
        raise InputError(f"qcompiler::{op} quantizes f16, bf16 and f32, not {x.dtype}; cast the activation first")
    if x.dim() < 1:
        raise InputError(f"qcompiler::{op} quantizes rows [.., K]; the activation is a scalar")
    if code not in LARGEST:
        known = ", ".join(str(c) for c in LARGEST)
        raise InputError(f"qcompiler::{op} gives codes of {known}, not {code}")
    for name, vector in (("smooth", smooth), ("norm_weight", norm_weight)):
        if vector is not None and (vector.dtype not in FLOATS or tuple(vector.shape) != (x.shape[-1],)):
            raise InputError(
                f"qcompiler::{op}: {name} is a float vector of K={x.shape[-1]}, not {vector.dtype}{list(vector.shape)}"
            )


def _check_rows(
    x: torch.Tensor, smooth: torch.Tensor | None, norm_weight: torch.Tensor | None, code: torch.dtype, block: int
) -> None:
    _check("quantize_rows", x, smooth, norm_weight, code)
    if block not in (0, BLOCK):
        raise InputError(f"qcompiler::quantize_rows has a scale a row (block=0) or {BLOCK} columns, not {block}")


def _check_static(x: torch.Tensor, scale: torch.Tensor, smooth: torch.Tensor | None, code: torch.dtype) -> None:
    _check("quantize_static", x, smooth, None, code)
    if scale.dtype != torch.float32 or scale.numel() != 1:
        raise InputError(
            f"qcompiler::quantize_static takes one f32 scale for the tensor, not {scale.dtype}{list(scale.shape)}"
        )


def scales_shape(x: torch.Tensor, block: int) -> list[int]:
    """Shape of the dynamic scales of ``x[.., K]``."""
    return [*x.shape[:-1], (x.shape[-1] + block - 1) // block if block else 1]


# -- references ----------------------------------------------------------------------------------------------


def _prepared(
    x: torch.Tensor, smooth: torch.Tensor | None, norm_weight: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """f32 values that are quantized."""
    y = x.to(torch.float32)
    if norm_weight is not None:
        rms = 1.0 / torch.sqrt(y.square().mean(-1, keepdim=True) + eps)
        y = (y * rms * norm_weight.to(torch.float32)).to(x.dtype).to(torch.float32)
    if smooth is not None:
        y = (y * smooth.to(torch.float32)).to(x.dtype).to(torch.float32)
    return y


def _codes(ratio: torch.Tensor, code: torch.dtype) -> torch.Tensor:
    if code == torch.int8:
        return ratio.nan_to_num(0.0, 127.0, -128.0).round_().clamp_(-128, 127).to(torch.int8)
    return ratio.clamp(-LARGEST[code], LARGEST[code]).to(code)


def _scales(largest: torch.Tensor, code: torch.dtype) -> torch.Tensor:
    scale = (largest / DIVISOR[code]).clamp(min=_SMALLEST)
    return torch.where(largest == 0, torch.ones_like(scale), scale)


def _rows_reference(
    x: torch.Tensor,
    smooth: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    code: torch.dtype,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_rows(x, smooth, norm_weight, code, block)
    y = _prepared(x, smooth, norm_weight, eps)
    k = x.shape[-1]
    width = block or max(k, 1)
    shape = scales_shape(x, block)
    padded = torch.nn.functional.pad(y, (0, shape[-1] * width - k)).reshape(*shape, width)
    scale = _scales(padded.abs().amax(-1), code)
    codes = _codes(padded / scale[..., None], code).reshape(*x.shape[:-1], -1)[..., :k].contiguous()
    return codes, scale.contiguous()


def _static_reference(
    x: torch.Tensor, scale: torch.Tensor, smooth: torch.Tensor | None, code: torch.dtype
) -> torch.Tensor:
    _check_static(x, scale, smooth, code)
    return _codes(_prepared(x, smooth, None, 0.0) / scale.reshape(()), code).contiguous()


# -- fakes ---------------------------------------------------------------------------------------------------


def _rows_fake(
    x: torch.Tensor,
    smooth: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    code: torch.dtype,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_rows(x, smooth, norm_weight, code, block)
    return x.new_empty(x.shape, dtype=code), x.new_empty(scales_shape(x, block), dtype=torch.float32)


def _static_fake(x: torch.Tensor, scale: torch.Tensor, smooth: torch.Tensor | None, code: torch.dtype) -> torch.Tensor:
    _check_static(x, scale, smooth, code)
    return x.new_empty(x.shape, dtype=code)


# -- launchers -----------------------------------------------------------------------------------------------


def _check_unit(op: str, code: torch.dtype, sm: int) -> None:
    if code != torch.int8 and not architecture(sm).native_f8:
        raise InputError(f"qcompiler::{op}: sm_{sm} has no casts to {code}, sm_89 and later do; quantize to int8")


def _width(k: int, tile: Tile) -> int:
    """Columns at a time: a power of two that holds the row, or the tile's."""
    return min(max(1 << (k - 1).bit_length(), BLOCK), tile.bk)


def rows_cuda(
    x: torch.Tensor,
    smooth: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    code: torch.dtype,
    block: int,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the dynamic quantizer, one program a row; ``tile.bk`` columns of it are in registers at a time."""
    from qcompiler.backends.triton.device.quantize import quantize_blocks_kernel, quantize_rows_kernel

    _check_rows(x, smooth, norm_weight, code, block)
    _check_unit("quantize_rows", code, sm_of(x.device))
    codes = torch.empty(x.shape, dtype=code, device=x.device)
    scale = torch.empty(scales_shape(x, block), dtype=torch.float32, device=x.device)
    k = x.shape[-1]
    if not x.numel():
        return codes, scale.fill_(1.0)
    rows = rows_of(x)
    tile = tile or tile_for("quantize", sm_of(x.device), rows.shape[0], 1, k)
    width = _width(k, tile)
    constants = {"DIVISOR": DIVISOR[code], "LARGEST": LARGEST[code], "WIDTH": width}
    constants |= {"HAS_SMOOTH": smooth is not None, "HAS_NORM": norm_weight is not None}
    vectors = [rows if v is None else v.contiguous() for v in (smooth, norm_weight)]
    arguments = (rows, *vectors, codes, scale, k, rows.stride(0), float(eps))
    if block:
        kernel, constants = quantize_blocks_kernel, constants | {"BLOCK": block}
    else:
        kernel, constants = quantize_rows_kernel, constants | {"WHOLE": width >= k}
    launch(kernel, (rows.shape[0],), *arguments, num_warps=tile.warps, num_stages=tile.stages, **constants)
    return codes, scale


def static_cuda(
    x: torch.Tensor,
    scale: torch.Tensor,
    smooth: torch.Tensor | None,
    code: torch.dtype,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Launch the static quantizer, one program for ``tile.bk`` columns of a row."""
    from qcompiler.backends.triton.device.quantize import quantize_static_kernel

    _check_static(x, scale, smooth, code)
    _check_unit("quantize_static", code, sm_of(x.device))
    codes = torch.empty(x.shape, dtype=code, device=x.device)
    if not x.numel():
        return codes
    rows = rows_of(x)
    m, k = rows.shape
    tile = tile or tile_for("quantize", sm_of(x.device), m, 1, k)
    width = _width(k, tile)
    factors = rows if smooth is None else smooth.contiguous()
    launch(
        quantize_static_kernel,
        (m, -(-k // width)),
        rows,
        scale,
        factors,
        codes,
        k,
        rows.stride(0),
        LARGEST=LARGEST[code],
        WIDTH=width,
        HAS_SMOOTH=smooth is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return codes


register(
    "quantize_rows(Tensor x, Tensor? smooth, Tensor? norm_weight, float eps, ScalarType code, int block) "
    "-> (Tensor, Tensor)",
    reference=_rows_reference,
    fake=_rows_fake,
    cuda=rows_cuda,
)
register(
    "quantize_static(Tensor x, Tensor scale, Tensor? smooth, ScalarType code) -> Tensor",
    reference=_static_reference,
    fake=_static_fake,
    cuda=static_cuda,
)


# -- claims --------------------------------------------------------------------------------------------------

_CASES: tuple[tuple[torch.dtype, torch.dtype, int, int, bool, bool], ...] = (
    (torch.bfloat16, torch.int8, 4096, 0, False, False),
    (torch.bfloat16, torch.int8, 4096, 0, True, True),
    (torch.float16, torch.int8, 28672, 0, True, True),
    (torch.bfloat16, torch.float8_e4m3fn, 8192, 0, False, True),
    (torch.bfloat16, torch.float8_e4m3fn, 4096, BLOCK, False, True),
    (torch.float32, torch.float8_e5m2, 4095, 0, False, False),
)
"""Activation, codes, K, block, smooth, norm."""


def claims(sm: int) -> Iterator[Claim]:
    """What is proved of these kernels for ``sm``: dynamic, with and without what is fused, and static."""
    from qcompiler.backends.triton.claims import Claim, fake

    row, outputs = "torch-cuda/quantize", frozenset({"y_ptr", "scale_ptr"})

    def dynamic(
        element: torch.dtype, code: torch.dtype, k: int, block: int, smooth: bool, norm: bool
    ) -> Callable[[], object]:
        def run() -> object:
            vectors = [fake((k,), torch.float32) if given else None for given in (smooth, norm)]
            return rows_cuda(fake((4096, k), element), vectors[0], vectors[1], 1e-5, code, block)

        return run

    for element, code, k, block, smooth, norm in _CASES:
        fused = "".join(f" {name}" for name, given in (("smooth", smooth), ("norm", norm)) if given)
        case = f"{str(element)[6:]} to {codes_name(code)} {'b128' if block else 'token'} K={k}{fused}"
        least = 80 if code == torch.int8 else 89
        run = dynamic(element, code, k, block, smooth, norm)
        wide = frozenset({"x_ptr"}) if k % BLOCK == 0 else frozenset[str]()
        yield Claim(row, case, run, None, outputs, wide, least)

    def static() -> object:
        return static_cuda(fake((4096, 4096), torch.bfloat16), fake((), torch.float32), None, torch.int8)

    yield Claim(row, "bf16 to int8 static K=4096", static, None, outputs, frozenset({"x_ptr"}))
