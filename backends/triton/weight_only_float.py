"""What ``qcompiler::wn_linear`` claims where codes are floats or indices of NF4; the operator is in ``weight_only``.

E2M1, E4M3 and E5M2 codes are exact in bf16 and fp16. So are the scales of NVFP4 and their products with codes; those
of MXFP4 are in bf16 from 2^-126 on (2^-127 counts as 0) and in fp16 from 2^-22 to 2^12. NF4's table is rounded to the
16 bits of the activations. Other scales of groups under 128, and of longer ones in tiles of more than 64 rows, are
rounded to 16 bits and so is their product with the code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from qcompiler.backends.triton import weight_only
from qcompiler.backends.triton.claims import Claim, fake
from qcompiler.backends.triton.layouts import ROWS, TILE, fragment_shape, padded, scale_rows
from qcompiler.backends.triton.tiles import Tile, tile_for

N = K = 4096
"""Of the weights that claims are made for."""

GROUPS = {"nf4": 64, "f4e2m1": 128, "mxfp4": 32, "nvfp4": 16, "f8e4m3": 0, "f8e5m2": 0}
"""Form -> the group that is claimed; 0 is one scale a row."""

STORED = {"mxfp4": torch.uint8, "nvfp4": torch.float8_e4m3fn}
"""Scales that have a type of their own."""


@dataclass(frozen=True)
class Case:
    """A weight in ``form`` times ``m`` rows of type ``element``; ``tile`` None: that of the table."""

    form: str
    m: int
    element: torch.dtype = torch.bfloat16
    group: int = -1
    tile: Tile | None = None

    def run(self) -> torch.Tensor:
        group = GROUPS[self.form] if self.group < 0 else self.group
        scales = fake((scale_rows(K, group), padded(N, ROWS)), STORED.get(self.form, self.element))
        return weight_only.linear_cuda(
            fake((self.m, K), self.element),
            fake(fragment_shape(N, K, self.form), torch.int32),
            scales,
            None,
            fake((1,), torch.float32) if self.form == "nvfp4" else None,
            None,
            None,
            None,
            N,
            group,
            self.form,
            "none",
            self.tile,
        )


def claims(sm: int) -> Iterator[Claim]:
    """Each form at one row and at 256, with the tile that is shipped for ``sm``; float16 where its decoding differs."""
    for form in GROUPS:
        for m in (1, 256):
            yield claim(Case(form, m), sm)
    yield claim(Case("nf4", 1, torch.float16), sm)
    yield claim(Case("f4e2m1", 64, group=64), sm)


def claim(case: Case, sm: int) -> Claim:
    """The claim of a case: no weight is stored, codes come 16 bytes at a time, products run in tensor cores."""
    kernel = f"wn.{'gemv' if case.m <= weight_only.SMALL else 'gemm'}.{case.form}"
    tile = case.tile or tile_for(kernel, sm, case.m, N, K)
    group = GROUPS[case.form] if case.group < 0 else case.group
    type_name = str(case.element).removeprefix("torch.")
    return Claim(
        f"torch-cuda/{kernel}",
        f"{type_name} {f'g{group}' if group else 'channel'} M={case.m} {N}x{K} tile {tile.bm}x{tile.bn} "
        f"warps {tile.warps} stages {tile.stages} split {tile.split}",
        case.run,
        "f16",
        outputs=frozenset({"y_ptr", "partial_ptr"}),
        wide=frozenset({"codes_ptr"}),
        loop_weights=tile.bn * TILE,
    )
