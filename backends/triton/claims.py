"""What a row claims of its kernels, to be proved without a GPU, and tensors without memory to run launchers on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcompiler.backends.triton.architectures import Products

if TYPE_CHECKING:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode


@dataclass(frozen=True)
class Claim:
    """One case of a row.

    ``row``: ``torch-cuda/wn.gemv.int4``. ``case``: types, groups, shape and tile, for people. ``run`` calls the
    family's launcher on tensors of :func:`fake`; every kernel that it launches is compiled. ``products``: what the
    tensor cores must multiply, None for a kernel without products. ``outputs``: the pointer arguments that kernels may
    store to. ``wide``: the pointer arguments whose loads from global memory must be 16 bytes a thread; where
    ``products`` is given, nothing that is loaded from them may be stored before a product or a sum has taken it in.
    ``loop_weights``: weights that a block takes in one turn of its main loop (bn * bk), for instructions per weight; 0
    where that says nothing. ``load_bytes``: what the wide loads are where a lane's share of the weights is less than 16
    bytes.
    """

    row: str
    case: str
    run: Callable[[], object]
    products: Products | None
    outputs: frozenset[str] = frozenset({"y_ptr"})
    wide: frozenset[str] = frozenset()
    least_sm: int = 80
    loop_weights: int = 0
    load_bytes: int = 16


@functools.cache
def fake_mode() -> FakeTensorMode:
    """The mode that all fake tensors of this process belong to."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def fake(shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None) -> Any:
    """A tensor on a GPU that need not be there: shape, dtype and strides in elements, no memory."""
    import torch

    with fake_mode():
        if strides is None:
            return torch.empty(tuple(shape), dtype=dtype, device="cuda")
        return torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype, device="cuda")
