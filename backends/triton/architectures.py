"""NVIDIA architectures, as far as kernels and their proofs ask: shared memory and tensor-core instructions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Products = Literal["f16", "i8", "f8"]
"""What the tensor cores multiply: 16-bit floats, int8, 8-bit floats."""


@dataclass(frozen=True)
class Architecture:
    """One compute capability. ``shared``: bytes of shared memory that a block may ask for (CUDA C++ Programming Guide,
    table of technical specifications). ``matrix``: for each kind of product the prefixes of the tensor-core
    instructions, as ``nvdisasm`` prints them, of which one must be there; a kind that is absent has no such unit.
    ``processors`` of the largest chip, for the choice of a grid where no chip is at hand.
    """

    sm: int
    shared: int
    processors: int
    matrix: dict[Products, tuple[str, ...]]

    @property
    def native_f8(self) -> bool:
        return "f8" in self.matrix


_HMMA, _IMMA, _QMMA = ("HMMA",), ("IMMA",), ("QMMA",)

ARCHITECTURES: dict[int, Architecture] = {
    a.sm: a
    for a in (
        Architecture(80, 166912, 108, {"f16": _HMMA, "i8": _IMMA}),
        Architecture(86, 101376, 84, {"f16": _HMMA, "i8": _IMMA}),
        Architecture(89, 101376, 142, {"f16": _HMMA, "i8": _IMMA, "f8": _QMMA}),
        Architecture(90, 232448, 132, {"f16": ("HGMMA", "HMMA"), "i8": ("IGMMA", "IMMA"), "f8": ("QGMMA", "QMMA")}),
        Architecture(
            100,
            232448,
            148,
            {"f16": ("UTCHMMA", "HMMA"), "i8": ("UTCIMMA", "IMMA"), "f8": ("UTCQMMA", "QMMA")},
        ),
        Architecture(120, 101376, 188, {"f16": _HMMA, "i8": _IMMA, "f8": _QMMA}),
    )
}


def architecture(sm: int) -> Architecture:
    """That of ``sm``, else the nearest older one; the oldest for what is older than all."""
    known = [a for a in sorted(ARCHITECTURES) if a <= sm]
    return ARCHITECTURES[known[-1] if known else min(ARCHITECTURES)]
