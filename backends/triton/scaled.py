"""Operator ``qcompiler::a8_linear``: a linear whose activations are codes (int8, e4m3, e5m2), as its weights are.

``y = act(x W^T + bias) * mul + residual`` in f32, rounded once to ``out``. Products of int8 are summed in int32,
exactly; those of 8-bit floats in f32. Weights are 8-bit codes ``[N, K]`` as they are, or fragments of 4-bit codes
(``layouts``), which are widened in registers to the activation's codes: a code minus its zero point is at most 15 in
magnitude, which int8 and e4m3 hold exactly.

Scales of the activation: one, one a row, or one for each 128 columns of a row (``block=128``). Those of the weight:
one, one a row, or ``[ceil(N / 128), ceil(K / 128)]``; of 4-bit weights ``[G, N']``, for whole rows or for groups of a
multiple of 128.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from qcompiler.backends.triton import layouts
from qcompiler.backends.triton.architectures import architecture
from qcompiler.backends.triton.launching import launch, sm_of
from qcompiler.backends.triton.quantizing import BLOCK, FLOATS, as_rows
from qcompiler.backends.triton.registering import register
from qcompiler.backends.triton.tiles import Tile, tile_for
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
REDUCED = (4, 256)
"""Tile of the kernel that adds up partial sums."""
CHUNK = 1024
"""Rows of the weight that the reference widens at a time."""

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
}


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


def _refuse(what: str) -> InputError:
    return InputError(f"qcompiler::a8_linear: {what}")


def _check(c: Call, act: str, out: torch.dtype, bias: torch.Tensor | None, *whole: torch.Tensor | None) -> None:
    """Raise InputError unless types and shapes fit; ``whole`` are operands of the result's shape."""
    if c.form not in CODES and not c.four:
        raise _refuse(f"no weights of form {c.form!r}; there are {', '.join([*CODES, *SHIFTS])}")
    if c.x.dtype not in CODES.values() or c.x.dim() < 1:
        raise _refuse(f"the activation is codes [.., K] of int8, e4m3 or e5m2, not {c.x.dtype}{list(c.x.shape)}")
    if not c.four and (c.x.dtype == torch.int8) != (c.form == "int8"):
        raise _refuse(f"{c.form} weights do not multiply {c.x.dtype} activations; quantize both to int8, or to floats")
    if c.four and c.x.dtype == torch.float8_e5m2:
        raise _refuse("4-bit weights go up to 15, which e5m2 does not hold; quantize the activation to e4m3 or int8")
    if c.block not in (0, BLOCK):
        raise _refuse(f"activations have scales for {BLOCK} columns (block={BLOCK}) or a row (0), not {c.block}")
    _check_codes(c)
    _check_scales(c)
    if act not in _ACTIVATIONS:
        raise _refuse(f"no activation {act!r}; there are {', '.join(_ACTIVATIONS)}")
    if out not in FLOATS:
        raise _refuse(f"results are f32, f16 or bf16, not {out}")
    if bias is not None and tuple(bias.shape) != (c.n,):
        raise _refuse(f"the bias is [N={c.n}], not {list(bias.shape)}")
    for operand in whole:
        if operand is not None and operand.shape != (*c.x.shape[:-1], c.n):
            raise _refuse(f"mul and residual are {[*c.x.shape[:-1], c.n]} as the result, not {list(operand.shape)}")


def _check_codes(c: Call) -> None:
    want = layouts.fragment_shape(c.n, c.k, c.form) if c.four else (c.n, c.k)
    kind = torch.int32 if c.four else CODES[c.form]
    if c.codes.dtype != kind or tuple(c.codes.shape) != want:
        raise _refuse(
            f"{c.form} codes for N={c.n}, K={c.k} are {kind}{list(want)}, not {c.codes.dtype}{list(c.codes.shape)}"
        )
    if c.four and (c.group < 0 or c.group % layouts.TILE):
        raise _refuse(
            f"4-bit weights have scales for whole rows (group=0) or groups of a multiple of {layouts.TILE}, not "
            f"{c.group}; quantize with such groups, or leave the activation in floats (wn_linear)"
        )
    if not c.four and (c.group or c.zeros is not None):
        raise _refuse(f"{c.form} weights have neither groups nor zero points")


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
        raise _refuse(f"scales of the activation are f32 {want}, not {c.x_scale.dtype}{list(c.x_scale.shape)}")
    if c.four:
        shapes = [(layouts.scale_rows(c.k, c.group), layouts.padded(c.n, layouts.ROWS))]
    else:
        shapes = [(c.n,), (1,), (-(-c.n // BLOCK), blocks)]
    if tuple(c.scales.shape) not in shapes or c.scales.dtype not in FLOATS:
        want = " or ".join(str(list(s)) for s in shapes)
        raise _refuse(f"scales of {c.form} weights are floats {want}, not {c.scales.dtype}{list(c.scales.shape)}")
    if c.zeros is not None and (c.zeros.dtype != torch.uint8 or c.zeros.shape != c.scales.shape):
        raise _refuse(f"zero points are uint8{list(c.scales.shape)}, not {c.zeros.dtype}{list(c.zeros.shape)}")


# -- reference -----------------------------------------------------------------------------------------------


def _spread(scales: torch.Tensor, columns: int) -> torch.Tensor:
    """Scales of 128 columns each ``[.., G]``, one a column."""
    return scales.double().repeat_interleave(BLOCK, -1)[..., :columns]


def _widened(c: Call, start: int, stop: int) -> torch.Tensor:
    """Rows ``start`` to ``stop`` of the weight in float64."""
    if not c.four:
        codes = c.codes[start:stop].double()
        if c.blocks:
            scales = c.scales[torch.arange(start, stop, device="cpu") // BLOCK]
            return codes * _spread(scales, c.k)
        return codes * (c.scales[start:stop] if c.scales.numel() > 1 else c.scales).double()[:, None]
    tall = layouts.padded(stop, layouts.ROWS)
    fragments = c.codes[:, start:tall].contiguous().numpy()
    codes = torch.from_numpy(layouts.unpack_codes(fragments, c.form, stop - start, c.k)).double() + SHIFTS[c.form]
    zeros = torch.full_like(c.scales, SHIFTS[c.form]) if c.zeros is None else c.zeros
    group = c.group or layouts.padded(c.k, layouts.TILE)
    scales, zeros = (t[:, start:stop].double().T.repeat_interleave(group, -1)[:, : c.k] for t in (c.scales, zeros))
    return (codes - zeros) * scales


def _reference(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    mul: torch.Tensor | None,
    residual: torch.Tensor | None,
    n: int,
    group: int,
    block: int,
    form: str,
    act: str,
    out: torch.dtype,
) -> torch.Tensor:
    c = Call(x, x_scale, codes, scales, zeros, n, group, block, form)
    _check(c, act, out, bias, mul, residual)
    wide = x.double() * (_spread(x_scale, c.k) if block else x_scale.double())
    y = torch.empty((*x.shape[:-1], n), dtype=torch.float64, device=x.device)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        y[..., start:stop] = wide @ _widened(c, start, stop).T
    if bias is not None:
        y += bias.double()
    y = _ACTIVATIONS[act](y)
    if mul is not None:
        y = y * mul.double()
    if residual is not None:
        y = y + residual.double()
    return y.to(out)


def _fake(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    mul: torch.Tensor | None,
    residual: torch.Tensor | None,
    n: int,
    group: int,
    block: int,
    form: str,
    act: str,
    out: torch.dtype,
) -> torch.Tensor:
    _check(Call(x, x_scale, codes, scales, zeros, n, group, block, form), act, out, bias, mul, residual)
    return x.new_empty((*x.shape[:-1], n), dtype=out)


# -- launcher ------------------------------------------------------------------------------------------------


def tile_of(c: Call, sm: int) -> Tile:
    """The tile of the tables; sums of 128 columns apart have entries of their own."""
    key = c.kernel + (".parts" if c.parts(sm) and not c.four else "")
    rows = c.x.numel() // max(c.k, 1)
    return tile_for(key, sm, rows, c.n, c.k)


def linear_cuda(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    mul: torch.Tensor | None,
    residual: torch.Tensor | None,
    n: int,
    group: int,
    block: int,
    form: str,
    act: str,
    out: torch.dtype,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Launch the product: a block for each tile of the result and each of ``tile.split`` runs of columns."""
    from qcompiler.backends.triton.device.codes_gemm import codes_gemm_kernel
    from qcompiler.backends.triton.device.epilogue import reduce_kernel

    c = Call(x, x_scale, codes, scales, zeros, n, group, block, form)
    _check(c, act, out, bias, mul, residual)
    sm = sm_of(x.device)
    if x.dtype != torch.int8 and not architecture(sm).native_f8:
        raise _refuse(f"sm_{sm} has no products of 8-bit floats, sm_89 and later do; quantize the activation to int8")
    y = torch.empty((*x.shape[:-1], n), dtype=out, device=x.device)
    if not y.numel():
        return y
    tile = tile or tile_of(c, sm)
    rows, m = as_rows(x), x.numel() // max(c.k, 1)
    parts = c.parts(sm)
    if parts or c.four:
        tile = replace(tile, bk=BLOCK, bn=min(tile.bn, BLOCK))
    blocks = -(-m // tile.bm) * -(-n // tile.bn)
    partial = torch.empty((tile.split, m, n), dtype=torch.float32, device=x.device) if tile.split > 1 else None
    epilogue = [None if t is None else t.contiguous() for t in (bias, mul, residual)]
    launch(
        codes_gemm_kernel,
        (blocks, tile.split),
        rows,
        x_scale.contiguous(),
        codes.contiguous(),
        scales.contiguous(),
        None if zeros is None else zeros.contiguous(),
        *epilogue,
        y,
        partial,
        m,
        n,
        c.k,
        rows.stride(0),
        scales.shape[-1],
        SHARED=max(group // BLOCK, 1),
        X_SCALE=2 if block else int(c.per_row),
        W_SCALE=_weight_scale(c),
        FOUR=c.four,
        SHIFT=SHIFTS.get(form, 0),
        PARTS=parts,
        SWAP=c.four or tile.bm < 64,
        EVEN=c.k % tile.bk == 0,
        BM=tile.bm,
        BN=tile.bn,
        BK=tile.bk,
        SPLIT=tile.split,
        GROUPED=tile.grouped,
        ACT=act,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if partial is not None:
        grid = (-(-n // REDUCED[1]), -(-m // REDUCED[0]))
        arguments = (partial, *epilogue, y, m, n)
        options = {"SPLIT": tile.split, "ACT": act, "BM": REDUCED[0], "BN": REDUCED[1]}
        launch(reduce_kernel, grid, *arguments, num_warps=4, **options)
    return y


def _weight_scale(c: Call) -> int:
    if c.four:
        return 3 if c.group else 1
    return 2 if c.blocks else int(c.scales.numel() > 1)


register(
    "a8_linear(Tensor x, Tensor x_scale, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, Tensor? mul, "
    "Tensor? residual, int n, int group, int block, str form, str act, ScalarType out) -> Tensor",
    reference=_reference,
    fake=_fake,
    cuda=linear_cuda,
)
