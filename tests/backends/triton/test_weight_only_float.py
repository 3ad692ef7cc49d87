"""``wn_linear`` on a CPU with codes that are floats or indices of NF4: its numbers, its checks, its claims."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcompiler.backends.triton import weight_only, weight_only_float
from qcompiler.errors import InputError
from tests.backends.triton.weight_cases import ROUNDOFF, Weight, draw

CASES = [
    ("nf4", 64, torch.float32),
    ("nf4", 0, torch.float16),
    ("f4e2m1", 128, torch.bfloat16),
    ("f4e2m1", 32, torch.float32),
    ("mxfp4", 32, torch.float32),
    ("nvfp4", 16, torch.float32),
    ("f8e4m3", 0, torch.float32),
    ("f8e4m3", 128, torch.float16),
    ("f8e5m2", 0, torch.bfloat16),
]


def linear(x: torch.Tensor, weight: Weight, n: int) -> torch.Tensor:
    y: torch.Tensor = torch.ops.qcompiler.wn_linear(
        x, *weight.operands, None, None, None, n, weight.group, weight.form, "none"
    )
    return y


@pytest.mark.parametrize(("form", "group", "scale"), CASES)
@pytest.mark.parametrize("element", [torch.float32, torch.bfloat16])
def test_the_reference_agrees_with_float64(form: str, group: int, scale: torch.dtype, element: torch.dtype) -> None:
    """It rounds f32 activations to bf16 and the result to its type; its sums are f32."""
    n, k = 70, 300
    weight = draw(form, n, k, group, scale=scale)
    x = torch.randn((3, k), generator=torch.Generator().manual_seed(0)).to(element)
    rounded = x.bfloat16().double().numpy()
    wanted = rounded @ weight.values.T
    size = np.abs(rounded) @ np.abs(weight.values).T
    off = np.abs(linear(x, weight, n).double().numpy() - wanted)
    assert (off <= (k + 8) * 2.0**-24 * size + ROUNDOFF[element] * np.abs(wanted)).all()


def test_the_smallest_and_the_largest_exponents_are_exact() -> None:
    """E8M0 holds 2^-127, which is subnormal in f32, to 2^127."""
    scales = torch.tensor([0, 1, 127, 254], dtype=torch.uint8)
    assert weight_only.scale_values(scales, "mxfp4").tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**127]


@pytest.mark.parametrize(("form", "group"), [("mxfp4", 16), ("mxfp4", 64), ("mxfp4", 0), ("nvfp4", 32), ("nf4", 16)])
def test_other_groups_are_refused(form: str, group: int) -> None:
    weight = draw("mxfp4", 64, 128, 32)
    with pytest.raises(InputError, match=rf"mxfp4: 32, nvfp4: 16\), not {group}"):
        torch.ops.qcompiler.wn_linear(
            torch.zeros(1, 128), weight.codes, weight.scales, None, None, None, None, None, 64, group, form, "none"
        )


@pytest.mark.parametrize("sm", [80, 89, 90, 100])
def test_every_form_has_claims_for_decoding_and_for_prefill(sm: int) -> None:
    rows = {claim.row for claim in weight_only_float.claims(sm)}
    assert rows == {f"torch-cuda/wn.{how}.{form}" for how in ("gemv", "gemm") for form in weight_only_float.GROUPS}
