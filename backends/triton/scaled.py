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

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from qcompiler.backends.triton import layouts
from qcompiler.backends.triton.architectures import architecture
from qcompiler.backends.triton.launching import launch, processors_of, sm_of
from qcompiler.backends.triton.quantizing import BLOCK
from qcompiler.backends.triton.registering import register
from qcompiler.backends.triton.scaled_call import CODES, SHIFTS, Call, check_call, refused
from qcompiler.backends.triton.tiles import Tile, tile_for
from qcompiler.backends.triton.weight_only import finished, rows_like, rows_of

if TYPE_CHECKING:
    from qcompiler.backends.triton.claims import Claim

STREAMED = 90
"""The compute capability from which there is a unit for bulk copies of tiles."""
NARROW = Tile(64, 64, BLOCK, 8, 2)
"""For operands that are loaded byte by byte, which takes many registers; ``split`` is that of the table."""
REDUCED = (4, 256)
"""Tile of the kernel that adds up partial sums."""
CHUNK = 1024
"""Rows of the weight that the reference widens at a time."""


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
    check_call(c, act, out, bias, mul, residual)
    wide = x.double() * (_spread(x_scale, c.k) if block else x_scale.double())
    y = torch.empty((*x.shape[:-1], n), dtype=torch.float64, device=x.device)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        y[..., start:stop] = wide @ _widened(c, start, stop).T
    return finished(y.float(), bias, act, mul, residual, out)


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
    check_call(Call(x, x_scale, codes, scales, zeros, n, group, block, form), act, out, bias, mul, residual)
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
    check_call(c, act, out, bias, mul, residual)
    sm = sm_of(x.device)
    if x.dtype != torch.int8 and not architecture(sm).native_f8:
        raise refused(f"sm_{sm} has no products of 8-bit floats, sm_89 and later do; quantize the activation to int8")
    y = torch.empty((*x.shape[:-1], n), dtype=out, device=x.device)
    if not y.numel():
        return y
    tile = tile or tile_of(c, sm)
    if streams(c, tile, sm):
        return _stream(c, tile, bias, mul, residual, act, y)
    rows, m = rows_of(x), x.numel() // max(c.k, 1)
    parts = c.parts(sm)
    if not aligned(c):
        tile = replace(NARROW, split=tile.split)
    if parts or c.four:
        tile = replace(tile, bk=BLOCK, bn=min(tile.bn, BLOCK))
    blocks = -(-m // tile.bm) * -(-n // tile.bn)
    partial = torch.empty((tile.split, m, n), dtype=torch.float32, device=x.device) if tile.split > 1 else None
    whole = tuple(y.shape)
    epilogue = (None if bias is None else bias.contiguous(), rows_like(mul, whole), rows_like(residual, whole))
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


def aligned(c: Call) -> bool:
    """Whether rows of both operands begin 16 bytes apart, so that threads load so many at once."""
    rows = rows_of(c.x)
    even = rows.stride(0) % 16 == 0 and rows.storage_offset() % 16 == 0
    return even and (c.four or (c.k % 16 == 0 and c.codes.storage_offset() % 16 == 0))


def streams(c: Call, tile: Tile, sm: int) -> bool:
    """Whether the unit for bulk copies loads the operands: of calls of many rows, where they are aligned."""
    return sm >= STREAMED and tile.bm >= 128 and tile.split == 1 and not c.four and aligned(c)


def _stream(
    c: Call,
    tile: Tile,
    bias: torch.Tensor | None,
    mul: torch.Tensor | None,
    residual: torch.Tensor | None,
    act: str,
    y: torch.Tensor,
) -> torch.Tensor:
    """Launch as many blocks as there are processors, each on its share of the tiles of ``y``."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from qcompiler.backends.triton.device.codes_gemm import codes_stream_kernel

    parts = c.parts(sm_of(y.device))
    tile = replace(tile, bk=BLOCK, bn=min(tile.bn, BLOCK)) if parts else tile
    rows, whole = rows_of(c.x), tuple(y.shape)
    m = rows.shape[0]
    tiles = -(-m // tile.bm) * -(-c.n // tile.bn)
    blocks = min(tiles, processors_of(y.device))
    launch(
        codes_stream_kernel,
        (blocks,),
        TensorDescriptor(rows, [m, c.k], [rows.stride(0), 1], [tile.bm, tile.bk]),
        c.x_scale.contiguous(),
        TensorDescriptor(c.codes.contiguous(), [c.n, c.k], [c.k, 1], [tile.bn, tile.bk]),
        c.scales.contiguous(),
        None if bias is None else bias.contiguous(),
        rows_like(mul, whole),
        rows_like(residual, whole),
        y,
        m,
        c.n,
        c.k,
        c.scales.shape[-1],
        X_SCALE=2 if c.block else int(c.per_row),
        W_SCALE=_weight_scale(c),
        PARTS=parts,
        BM=tile.bm,
        BN=tile.bn,
        BK=tile.bk,
        GROUPED=tile.grouped,
        ACT=act,
        BLOCKS=processors_of(y.device),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
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


# -- claims --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """``form`` of the weight, ``code`` of the activation, M, N, K, scales of 128 x 128, groups, zero points; ``full``:
    with bias, function, factor and summand."""

    form: str
    code: str
    m: int
    n: int = 4096
    k: int = 4096
    blocks: bool = False
    group: int = 0
    asym: bool = False
    full: bool = False

    def __str__(self) -> str:
        scales = "b128" if self.blocks else f"g{self.group}" if self.group else "channel"
        more = f"{' asym' if self.asym else ''}{' silu mul residual' if self.full else ''}"
        return f"{self.code} x {self.form} {scales}{more} M={self.m} {self.n}x{self.k}"

    def call(self) -> Call:
        """Fake tensors."""
        from qcompiler.backends.triton.claims import fake

        spans = -(-self.k // BLOCK)
        x = fake((self.m, self.k), CODES[self.code])
        x_scale = fake((self.m, spans if self.blocks else 1), torch.float32)
        zeros = None
        if self.form in SHIFTS:
            codes = fake(layouts.fragment_shape(self.n, self.k, self.form), torch.int32)
            laid = (layouts.scale_rows(self.k, self.group), layouts.padded(self.n, layouts.ROWS))
            scales = fake(laid, torch.bfloat16)
            zeros = fake(laid, torch.int16) if self.asym else None
        else:
            codes = fake((self.n, self.k), CODES[self.form])
            scales = fake((-(-self.n // BLOCK), spans) if self.blocks else (self.n,), torch.float32)
        return Call(x, x_scale, codes, scales, zeros, self.n, self.group, BLOCK * self.blocks, self.form)

    def run(self) -> object:
        from qcompiler.backends.triton.claims import fake

        c = self.call()
        whole = (self.m, c.n)
        bias, mul, residual = (fake(shape, torch.bfloat16) if self.full else None for shape in ((c.n,), whole, whole))
        given = (c.x, c.x_scale, c.codes, c.scales, c.zeros, bias, mul, residual, c.n, c.group, c.block, c.form)
        return linear_cuda(*given, "silu" if self.full else "none", torch.bfloat16)


_CASES = (
    _Case("int8", "int8", 1),
    _Case("int8", "int8", 4096, full=True),
    _Case("int8", "int8", 100, n=1000, k=1037),
    _Case("f8e4m3", "f8e4m3", 1),
    _Case("f8e4m3", "f8e4m3", 4096),
    _Case("f8e4m3", "f8e4m3", 4096, k=14336),
    _Case("f8e4m3", "f8e4m3", 4096, blocks=True, full=True),
    _Case("f8e4m3", "f8e5m2", 64),
    _Case("int4", "int8", 1, group=128),
    _Case("int4", "int8", 4096, group=128, asym=True, full=True),
    _Case("int4", "f8e4m3", 4096, group=128),
    _Case("uint4", "f8e4m3", 1, asym=True),
)


def claims(sm: int) -> Iterator[Claim]:
    """What is proved of the kernels for ``sm``: decode and prefill of each row, with the tiles of its table."""
    from qcompiler.backends.triton.claims import Claim

    for case in _CASES:
        c = case.call()
        floats = case.code != "int8"
        if floats and not architecture(sm).native_f8:
            continue
        tile = tile_of(c, sm)
        # the loop of the stream holds the end of each tile too, and bytes are loaded one by one where rows are odd
        weights = 0 if streams(c, tile, sm) else tile.bn * (BLOCK if c.four or c.parts(sm) else tile.bk)
        yield Claim(
            f"torch-cuda/{c.kernel}",
            f"{case} tile {tile.bm}x{tile.bn}x{tile.bk} w{tile.warps} s{tile.stages} split {tile.split}",
            case.run,
            "f8" if floats else "i8",
            frozenset({"y_ptr", "partial_ptr"}),
            frozenset({"codes_ptr"}) if aligned(c) else frozenset(),
            89 if floats else 80,
            weights if aligned(c) else 0,
        )
