"""Attention over a quantized cache, compiled: what a code costs, and how the cache reaches the tensor cores.

A Hopper GPU that reads 4.3 TB/s and issues 33e12 instructions of a thread a second has 7.8 of them for each byte; the
kernel must stay well below, since not every slot is filled.
"""

from __future__ import annotations

import pytest

from qcompiler.backends.triton import kv_cache
from qcompiler.backends.triton.claims import Claim
from qcompiler.backends.triton.proving import prove

MOST = {"int8 D=128": 4.1, "int4 D=128": 4.5, "f8e4m3 D=256": 3.7}
"""Instructions of the main loop per code; 5 % above what triton 3.6 and 3.9 give. Two codes of int4 are a byte."""


def chosen(case: str) -> Claim:
    return next(c for c in kv_cache.claims(90) if c.row == "torch-cuda/kv.attention" and c.case.startswith(case))


@pytest.mark.parametrize("case", MOST)
def test_a_code_costs_few_instructions(case: str) -> None:
    (proof,) = prove([chosen(case)], 90)
    assert proof.holds, proof.faults
    attend, combine = proof.kernels
    assert (attend.name, combine.name) == ("attend_kernel", "combine_kernel")
    assert 0 < attend.per_weight <= MOST[case]


def test_where_sequences_are_enough_there_are_no_parts() -> None:
    assert kv_cache._parts(programs=512, tokens=8192, block=128, processors=132) == 1
    assert kv_cache._parts(programs=8, tokens=8192, block=128, processors=132) == 32
    assert kv_cache._parts(programs=8, tokens=200, block=128, processors=132) == 1
