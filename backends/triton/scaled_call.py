"""One call of ``qcompiler::a8_linear``: what its arguments say, and what does not fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompiler.backends.triton import layouts
from qcompiler.backends.triton.quantizing import BLOCK
from qcompiler.backends.triton.registering import FLOATS
from qcompiler.backends.triton.weight_only import check_epilogue
from qcompiler.errors import InputError

CODES = {"int8": torch.int8, "f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2}
"""Forms of 8-bit weights, and of activations."""
SHIFTS = {"int4": 8, "uint4": 0}
"""Forms of 4-bit weights, and what is added to their codes where they are stored."""
LONG = 4096
"""Columns over which 8-bit floats are summed apart, 128 at a time, on sm_89 and sm_90: their tensor cores keep some 14
bits of a sum (DeepSeek-V3 technical report, section 3.3.2), and truncate."""
NATIVE = 100
"""The compute capability from which sums of 8-bit floats are whole f32."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call of the operator, but for the epilogue's."""

    x: torch.Tensor
    x_scale: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    n: int
    group: int
    block: int
    form: str

    @property
    def k(self) -> int:
        return self.x.shape[-1]

    @property
    def four(self) -> bool:
        return self.form in SHIFTS

    @property
    def per_row(self) -> bool:
        """The activation has a scale a row, not one for all. A vector's one row has both."""
        return not self.block and self.x_scale.dim() > 1

    @property
    def blocks(self) -> bool:
        """The weight has a scale for each 128 x 128."""
        return not self.four and self.scales.dim() == 2

    @property
    def kernel(self) -> str:
        """The row that serves it, without its target."""
        if self.four:
            return "a8.gemm.w4"
        return "a8.gemm.int8" if self.form == "int8" else "a8.gemm.f8"

    def parts(self, sm: int) -> bool:
        """Whether each 128 columns are summed apart."""
        if self.block or self.blocks or self.group:
            return True
        return self.x.dtype != torch.int8 and (self.four or (self.k > LONG and sm < NATIVE))


# -- checks --------------------------------------------------------------------------------------------------


def refused(what: str) -> InputError:
    return InputError(f"qcompiler::a8_linear: {what}")


def check_call(
    c: Call,
    act: str,
    out: torch.dtype,
    bias: torch.Tensor | None,
    mul: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> None:
    """Raise InputError unless types and shapes fit."""
    if c.form not in CODES and not c.four:
        raise refused(f"no weights of form {c.form!r}; there are {', '.join([*CODES, *SHIFTS])}")
    if c.x.dtype not in CODES.values() or c.x.dim() < 1:
        raise refused(f"the activation is codes [.., K] of int8, e4m3 or e5m2, not {c.x.dtype}{list(c.x.shape)}")
    if not c.four and (c.x.dtype == torch.int8) != (c.form == "int8"):
        raise refused(f"{c.form} weights do not multiply {c.x.dtype} activations; quantize both to int8, or to floats")
    if c.four and c.x.dtype == torch.float8_e5m2:
        raise refused("4-bit weights go up to 15, which e5m2 does not hold; quantize the activation to e4m3 or int8")
    if c.block not in (0, BLOCK):
        raise refused(f"activations have scales for {BLOCK} columns (block={BLOCK}) or a row (0), not {c.block}")
    _check_codes(c)
    _check_scales(c)
    if out not in FLOATS:
        raise refused(f"results are f32, f16 or bf16, not {out}")
    check_epilogue("a8_linear", tuple(c.x.shape[:-1]), c.n, act, bias, mul, residual)


def _check_codes(c: Call) -> None:
    want = layouts.fragment_shape(c.n, c.k, c.form) if c.four else (c.n, c.k)
    kind = torch.int32 if c.four else CODES[c.form]
    if c.codes.dtype != kind or tuple(c.codes.shape) != want:
        raise refused(
            f"{c.form} codes for N={c.n}, K={c.k} are {kind}{list(want)}, not {c.codes.dtype}{list(c.codes.shape)}"
        )
    if c.four and (c.group < 0 or c.group % layouts.TILE):
        raise refused(
            f"4-bit weights have scales for whole rows (group=0) or groups of a multiple of {layouts.TILE}, not "
            f"{c.group}; quantize with such groups, or leave the activation in floats (wn_linear)"
        )
    if not c.four and (c.group or c.zeros is not None):
        raise refused(f"{c.form} weights have neither groups nor zero points")


def _check_scales(c: Call) -> None:
    blocks = -(-c.k // BLOCK)
    if c.block:
        fits = tuple(c.x_scale.shape) == (*c.x.shape[:-1], blocks)
    elif c.per_row:
        fits = tuple(c.x_scale.shape) == (*c.x.shape[:-1], 1)
    else:
        fits = c.x_scale.numel() == 1
    if not fits or c.x_scale.dtype != torch.float32:
        want = [*c.x.shape[:-1], blocks] if c.block else f"{[*c.x.shape[:-1], 1]}, [1] or []"
        raise refused(f"scales of the activation are f32 {want}, not {c.x_scale.dtype}{list(c.x_scale.shape)}")
    shapes: list[tuple[int, ...]]
    if c.four:
        shapes = [(layouts.scale_rows(c.k, c.group), layouts.padded(c.n, layouts.ROWS))]
    else:
        shapes = [(c.n,), (1,), (-(-c.n // BLOCK), blocks)]
    if tuple(c.scales.shape) not in shapes or c.scales.dtype not in FLOATS:
        want = " or ".join(str(list(s)) for s in shapes)
        raise refused(f"scales of {c.form} weights are floats {want}, not {c.scales.dtype}{list(c.scales.shape)}")
    if c.zeros is not None and (c.zeros.dtype != torch.int16 or c.zeros.shape != c.scales.shape):
        raise refused(f"zero points are int16{list(c.scales.shape)}, not {c.zeros.dtype}{list(c.zeros.shape)}")
