"""Stores are followed through loops, branches, calls and descriptors; loads are measured where they are unaligned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from qcompiler.backends.triton.claims import Claim, fake
from qcompiler.backends.triton.launching import launch
from qcompiler.backends.triton.proving import prove

N = 1024


@triton.jit
def carried_kernel(x_ptr, y_ptr, n, B: tl.constexpr):
    """Pointers that a loop carries on."""
    x = x_ptr + tl.arange(0, B)
    y = y_ptr + tl.arange(0, B)
    for _ in range(0, n, B):
        tl.store(y, tl.load(x) * 2)
        x += B
        y += B


@triton.jit
def chosen_kernel(x_ptr, y_ptr, z_ptr, n, B: tl.constexpr):
    """A pointer that a branch chooses."""
    at = tl.arange(0, B)
    if n > 5:
        place = y_ptr + at
    else:
        place = z_ptr + at
    tl.store(place, tl.load(x_ptr + at))


@triton.jit
def while_kernel(x_ptr, y_ptr, z_ptr, n, B: tl.constexpr):
    """Two pointers that change places in a loop."""
    at = tl.arange(0, B)
    here = y_ptr + at
    there = z_ptr + at
    left = n
    while left > 0:
        tl.store(here, tl.load(x_ptr + at))
        here, there = there, here
        left -= 1


@triton.jit(noinline=True)
def put(to_ptr, from_ptr):
    at = tl.arange(0, 64)
    tl.store(to_ptr + at, tl.load(from_ptr + at))


@triton.jit
def called_kernel(x_ptr, y_ptr, z_ptr, n, B: tl.constexpr):
    """Through a function that stays one."""
    put(z_ptr, x_ptr)


@triton.jit
def returned_kernel(x_ptr, y_ptr, z_ptr, n, B: tl.constexpr):
    """After an early return."""
    at = tl.arange(0, B)
    if n > 7:
        tl.store(z_ptr + at, tl.load(x_ptr + at))
        return
    tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def descriptor_kernel(x_ptr, y_ptr, z_ptr, n, B: tl.constexpr):
    """Through a tensor descriptor that is made on the device."""
    to = tl.make_tensor_descriptor(z_ptr, shape=[n, B], strides=[B, 1], block_shape=[16, B])
    at = tl.arange(0, 16)[:, None] * B + tl.arange(0, B)[None, :]
    to.store([0, 0], tl.load(x_ptr + at))


@triton.jit
def gathered_kernel(x_ptr, y_ptr, z_ptr, n, B: tl.constexpr):
    """Addresses that are loaded are no values that are stored, nor outputs."""
    at = tl.arange(0, B)
    place = tl.load(z_ptr + at)
    tl.store(y_ptr + at, tl.load(x_ptr + place))


def run(kernel: Any, with_z: bool = True, index: bool = False) -> Callable[[], None]:
    def call() -> None:
        x, y, z = fake((N, 64), torch.float16), fake((N, 64), torch.float16), fake((N, 64), torch.float16)
        others = [y, fake((N, 64), torch.int32) if index else z] if with_z else [y]
        launch(kernel, (1,), x, *others, N, B=64, num_warps=4)

    return call


@pytest.mark.parametrize("kernel", [chosen_kernel, while_kernel, called_kernel, returned_kernel, descriptor_kernel])
def test_a_store_to_another_argument_is_found(kernel: Any) -> None:
    (proof,) = prove([Claim("test/stores", "", run(kernel), None)], 90)
    assert any("z_ptr; its outputs are y_ptr" in fault for fault in proof.faults), proof.faults
    (proof,) = prove([Claim("test/stores", "", run(kernel), None, outputs=frozenset({"y_ptr", "z_ptr"}))], 90)
    assert proof.holds, proof.faults


def test_outputs_alone_pass() -> None:
    for call in (run(carried_kernel, with_z=False), run(gathered_kernel, index=True)):
        (proof,) = prove([Claim("test/stores", "", call, None)], 90)
        assert proof.holds, proof.faults


@pytest.mark.parametrize(("offset", "holds"), [(0, True), (8, True), (1, False)])
def test_alignment_is_that_of_the_tensor(offset: int, holds: bool) -> None:
    """A view that starts 2 bytes on cannot be read 16 bytes at a time; one that starts 16 bytes on can."""

    def call() -> None:
        x = torch.as_strided(fake((16 * N + offset,), torch.float16), (16 * N,), (1,), offset)
        launch(carried_kernel, (1,), x, fake((16 * N,), torch.float16), N, B=1024, num_warps=4)

    (proof,) = prove([Claim("test/loads", "", call, None, wide=frozenset({"x_ptr"}))], 80)
    assert proof.holds is holds, proof.faults
    assert proof.kernels[0].narrowest == (16 if holds else 2)


@triton.jit
def tiles_kernel(x_tiles, y_ptr, n, B: tl.constexpr):
    """A tile that the tensor memory accelerator loads."""
    at = tl.arange(0, 16)[:, None] * B + tl.arange(0, B)[None, :]
    tl.store(y_ptr + at, x_tiles.load([0, 0]))


def test_tiles_are_wide_loads_of_their_pointer() -> None:
    def call() -> None:
        tiles = TensorDescriptor.from_tensor(fake((N, 64), torch.float16), [16, 64])
        launch(tiles_kernel, (1,), tiles, fake((N, 64), torch.float16), N, B=64, num_warps=4)

    (proof,) = prove([Claim("test/tiles", "", call, None, wide=frozenset({"x_ptr"}))], 90)
    assert proof.holds, proof.faults
    assert proof.kernels[0].narrowest > 16
