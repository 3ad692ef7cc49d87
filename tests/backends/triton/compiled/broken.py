"""Small kernels, each broken in one way that a proof must catch, and a good twin for each.

All multiply ``x`` [M, K] by weights in 8-bit codes [N, K] with a scale per group of ``BK`` along K: y = x @ (q * s)^T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import triton
import triton.language as tl

from qcompiler.backends.triton.claims import Claim, fake
from qcompiler.backends.triton.launching import launch

M, N, K = 128, 1024, 1024
ON_CORES, SCRATCH, BEFORE_THE_SUM, NARROW, SERIALIZED, FOREIGN = 1, 2, 3, 4, 5, 6


@triton.jit
def linear_kernel(
    x_ptr, codes_ptr, scales_ptr, scratch_ptr, y_ptr, m, n, k,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BROKEN: tl.constexpr,
):  # fmt: skip
    """Right with ``BROKEN`` 0; 1: products on CUDA cores; 2: the dequantized tile goes through memory; 3: it is stored
    to the output before the sum; 4: the order of codes makes their loads narrow; 5: each product is scaled as it
    arrives, so that the next cannot start; 6: 2 by an atomic."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    turned = tl.zeros((BN, BM), tl.float32)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, tl.cdiv(k, BK)):
        at = step * BK + rk
        x = tl.load(x_ptr + rm[:, None] * k + at[None, :])
        place = rn[None, :] * k + at[:, None]
        if BROKEN == 4:
            place = at[:, None] * n * 3 + rn[None, :] * 3
        w = tl.load(codes_ptr + place).to(tl.float16)
        scales = tl.load(scales_ptr + step * n + rn)[None, :]
        if BROKEN == 2:
            tl.store(scratch_ptr + rn[None, :] * k + at[:, None], w * scales)
        if BROKEN == 3:
            tl.store(y_ptr + rn[None, :] * k + at[:, None], w * scales)
        if BROKEN == 6:
            tl.atomic_add(scratch_ptr + rn[None, :] * k + at[:, None], w * scales)
        if BROKEN == 1:
            acc += tl.sum(x[:, :, None].to(tl.float32) * (w * scales)[None, :, :].to(tl.float32), axis=1)
        elif BROKEN == 5:
            turned = tl.dot(tl.trans(w * scales), tl.trans(x), turned)
        else:
            acc = tl.dot(x, w * scales, acc)
    if BROKEN == 5:
        acc = tl.trans(turned)
    tl.store(y_ptr + rm[:, None] * n + rn[None, :], acc.to(tl.float16))


def launch_linear(codes: torch.Tensor, broken: int, bm: int, bn: int, bk: int, warps: int, stages: int) -> None:
    x = fake((M, K), torch.float16)
    scales = fake((K // bk, N), torch.float16)
    scratch, y = fake((N, K), torch.float16), fake((M, N), torch.float16)
    launch(
        linear_kernel, (max(1, M // bm), N // bn), x, codes, scales, scratch, y, M, N, K,
        BM=bm, BN=bn, BK=bk, BROKEN=broken, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def linear(*options: int) -> Callable[[], None]:
    """A launcher on fake tensors."""
    return lambda: launch_linear(fake((N, K), torch.int8), *options)


def claim(broken: int = 0, bm: int = 128, bn: int = 64, bk: int = 128, warps: int = 4, stages: int = 3) -> Claim:
    """What the good twin claims, of a kernel that may be broken."""
    case = f"broken={broken} {bm}x{bn}x{bk} w{warps} s{stages}"
    run = linear(broken, bm, bn, bk, warps, stages)
    return Claim("test/linear", case, run, "f16", wide=frozenset({"codes_ptr"}), loop_weights=bn * bk)


GOOD = claim()
FORGOTTEN = replace(GOOD, wide=frozenset({"codes_ptr", "zeros_ptr"}))
SPILLING = claim(bm=64, bn=256, bk=16, warps=2, stages=2)
