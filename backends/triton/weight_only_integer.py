"""What ``qcompiler::wn_linear`` claims where codes are integers; the operator is in ``weight_only``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qcompiler.backends.triton import weight_only
from qcompiler.backends.triton.claims import Claim, fake
from qcompiler.backends.triton.forms import FORMS
from qcompiler.backends.triton.layouts import ROWS, TILE, fragment_shape, padded, scale_rows
from qcompiler.backends.triton.tiles import Tile, tile_for

ZEROS = {"sym": None, "asym": torch.int16, "asymf": torch.bfloat16}
"""Word of a scheme -> the type of laid-out zero points."""


@dataclass(frozen=True)
class Case:
    """A weight ``[n, k]`` in ``form`` times ``m`` rows of type ``element``; ``tile`` None: that of the table.

    ``fused``: with bias, activation, factor and summand.
    """

    form: str
    m: int
    group: int
    zeros: str = "sym"
    element: torch.dtype = torch.bfloat16
    n: int = 4096
    k: int = 4096
    fused: bool = False
    tile: Tile | None = None

    @property
    def kernel(self) -> str:
        return f"wn.{'gemv' if self.m <= weight_only.SMALL else 'gemm'}.{self.form}"

    def run(self) -> torch.Tensor:
        n, k, element = self.n, self.k, self.element
        laid, kind = (scale_rows(k, self.group), padded(n, ROWS)), ZEROS[self.zeros]
        stored = torch.bfloat16 if element == torch.float32 else element
        rows = fake((self.m, n), element) if self.fused else None
        return weight_only.linear_cuda(
            fake((self.m, k), element),
            fake(fragment_shape(n, k, self.form), torch.int32),
            fake(laid, stored),
            None if kind is None else fake(laid, kind),
            None,
            fake((n,), element) if self.fused else None,
            rows,
            rows,
            n,
            self.group,
            self.form,
            "silu" if self.fused else "none",
            self.tile,
        )


CASES = (
    Case("int4", 1, 128),
    Case("int4", 1, 128, element=torch.float32, n=4000, k=4032, fused=True),
    Case("uint4", 1, 128, "asym", torch.float16),
    Case("uint4", 16, 32, "asymf"),
    Case("int8", 1, 0),
    Case("uint8", 1, 32, "asym"),
    Case("int2", 1, 64),
    Case("uint2", 1, 32, "asym"),
    Case("int4", 32, 64),
    Case("int4", 64, 128, fused=True),
    Case("int4", 256, 32),
    Case("uint4", 4096, 128, "asym"),
    Case("int8", 4096, 0, element=torch.float16),
    Case("uint8", 256, 128, "asym"),
    Case("int2", 256, 32),
    Case("uint2", 64, 64, "asymf"),
)
"""Each row twice or more: every number of bits, groups below, of and above a tile, every kind of zero point."""


def claims(sm: int) -> Iterator[Claim]:
    """The cases, with the tiles that are shipped for ``sm``."""
    for case in CASES:
        yield claim(case, sm)


def claim(case: Case, sm: int) -> Claim:
    """The claim of a case: no weight is stored, codes come 16 bytes at a time (2 bits: a lane has 8 of a row), products
    run in tensor cores."""
    tile = case.tile or tile_for(case.kernel, sm, case.m, case.n, case.k)
    return Claim(
        f"torch-cuda/{case.kernel}",
        f"{str(case.element).removeprefix('torch.')} {f'g{case.group}' if case.group else 'channel'} {case.zeros} "
        f"{'fused ' if case.fused else ''}M={case.m} {case.n}x{case.k} tile {tile.bm}x{tile.bn} warps {tile.warps} "
        f"stages {tile.stages} split {tile.split}",
        case.run,
        "f16",
        outputs=frozenset({"y_ptr", "partial_ptr"}),
        wide=frozenset({"codes_ptr"} if FORMS[case.form].bits > 2 else ()),
        loop_weights=tile.bn * TILE,
    )
