"""Each way of being broken that a proof claims to catch is caught, with the right sentence; the good twin passes."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from qcompiler.backends.triton.claims import fake
from qcompiler.backends.triton.proving import prove
from tests.backends.triton.compiled import broken
from tests.backends.triton.compiled.broken import GOOD, claim

BROKEN = {
    "spills": (broken.SPILLING, r"spills registers: \d+ bytes of stack"),
    "shared memory": (claim(stages=10), r"asks for 417792 bytes of shared memory, over the 232448 of sm_90"),
    "CUDA cores": (claim(broken.ON_CORES, 16, 16, 16, stages=1), r"outside the tensor cores: no instruction HGMMA or"),
    "scratch": (claim(broken.SCRATCH), r"stores a tile 128x64xf16 to scratch_ptr; its outputs are y_ptr"),
    "scratch, atomically": (claim(broken.FOREIGN), r"stores a tile 128x64xf16 to scratch_ptr; its outputs are y_ptr"),
    "scratch, claimed as output": (
        replace(claim(broken.SCRATCH), outputs=frozenset({"y_ptr", "scratch_ptr"})),
        r"to scratch_ptr that holds elements of codes_ptr which no product has summed",
    ),
    "output": (claim(broken.BEFORE_THE_SUM), r"to y_ptr that holds elements of codes_ptr which no product has summed"),
    "narrow loads": (claim(broken.NARROW), r"loads codes_ptr by 1 bytes a thread, not 16"),
    "serialized": (
        claim(broken.SERIALIZED, bm=64, bn=256, bk=64, warps=8),
        r"waits after each wgmma, the assembler serialized them: .*C75\d\d",
    ),
    "not loaded": (replace(GOOD, wide=frozenset({"codes_ptr", "zeros_ptr"})), r"no kernel loads zeros_ptr"),
    "no kernel": (replace(GOOD, run=lambda: None), r"launched no kernel"),
    "does not compile": (claim(bk=96), r"does not compile for sm_90: "),
    "no integer products": (replace(GOOD, products="i8"), r"no instruction IGMMA or IMMA in the code \(found: HGMMA\)"),
}


@pytest.mark.parametrize("way", BROKEN)
def test_a_broken_kernel_is_caught(way: str) -> None:
    given, sentence = BROKEN[way]
    (proof,) = prove([given], 90)
    assert not proof.holds
    assert any(re.search(sentence, fault) for fault in proof.faults), proof.faults


def test_a_launcher_that_rewrites_the_weights_is_caught() -> None:
    """What torch computes from the weights before the launch is no part of any kernel."""

    def viewed() -> None:
        broken.launch_linear(fake((broken.K, broken.N), torch.int8).t(), 0, 128, 64, 128, 4, 3)

    def computed() -> None:
        broken.launch_linear(fake((broken.N, broken.K), torch.int8) + 0, 0, 128, 64, 128, 4, 3)

    assert prove([replace(GOOD, run=viewed)], 90)[0].holds
    (proof,) = prove([replace(GOOD, run=computed)], 90)
    assert proof.faults == ("the launcher has torch compute codes_ptr, or from it, by aten.add.Tensor at each call",)


@pytest.mark.parametrize("sm", [80, 90, 100])
def test_the_good_twin_passes(sm: int) -> None:
    (proof,) = prove([GOOD], sm)
    assert proof.holds, proof.faults
    (kernel,) = proof.kernels
    assert (kernel.stack, kernel.spills, kernel.narrowest, kernel.name) == (0, 0, 16, "linear_kernel")
    assert 0 < kernel.registers <= 255
    assert kernel.loop > 0
    assert 1 < kernel.per_weight < 25
    assert kernel.seconds > 0


def test_the_serialized_kernel_has_a_twin_that_is_not() -> None:
    """The same code with one 64-row product per group of four warps."""
    (proof,) = prove([claim(broken.SERIALIZED)], 90)
    assert not any("wgmma" in fault for fault in proof.faults)


def test_claims_of_newer_architectures_are_left_out() -> None:
    assert prove([replace(GOOD, least_sm=89)], 80) == []
