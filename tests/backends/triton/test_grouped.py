"""Experts of a mixture on CPUs: their products against float64, and what compilers make of the operator."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcompiler.backends.triton import grouped  # noqa: F401  # registers the operator
from qcompiler.errors import InputError
from tests.backends.triton.weight_cases import draw

ENDS = torch.tensor([3, 3, 10], dtype=torch.int32)
N, K = 20, 150


def experts(form: str, group: int, zero: str = "none") -> tuple[list[np.ndarray], tuple[torch.Tensor | None, ...]]:
    every = [draw(form, N, K, group, zero, seed=s) for s in range(3)]
    parts = list(zip(*(w.operands for w in every), strict=True))
    stacked = [None if p[0] is None else torch.stack(p) for p in parts[:3]]
    return [w.values for w in every], (*stacked, None if parts[3][0] is None else torch.cat(parts[3]))


@pytest.mark.parametrize(
    ("form", "group", "zero"), [("uint4", 32, "int"), ("int8", 0, "none"), ("nf4", 64, "none"), ("nvfp4", 16, "none")]
)
def test_each_row_is_multiplied_by_its_experts_weight(form: str, group: int, zero: str) -> None:
    values, operands = experts(form, group, zero)
    x = torch.randn(12, K, generator=torch.Generator().manual_seed(0)).half()
    bias = torch.randn(3, N, generator=torch.Generator().manual_seed(1))
    y = torch.ops.qcompiler.wn_grouped(x, ENDS, *operands, bias, N, group, form, "silu")
    owner = [0] * 3 + [2] * 7
    for row, e in enumerate(owner):
        sums = values[e] @ x[row].double().numpy() + bias[e].double().numpy()
        want = sums / (1 + np.exp(-sums))
        np.testing.assert_allclose(y[row].double().numpy(), want, rtol=2**-10, atol=1e-5)  # half, and sums in f32
    assert not y[10:].any()


def test_the_operator_keeps_the_rules_of_torch() -> None:
    _, operands = experts("int4", 32)
    x = torch.randn(12, K)
    torch.library.opcheck(torch.ops.qcompiler.wn_grouped, (x, ENDS, *operands, None, N, 32, "int4", "none"))

    class Mixture(torch.nn.Module):
        def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.ops.qcompiler.wn_grouped(x, ends, *operands, None, N, 32, "int4", "none")
            return y + 1

    want = Mixture()(x, ENDS)
    compiled = torch.compile(Mixture(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, ENDS), want)
    program = torch.export.export(Mixture(), (x, ENDS), dynamic_shapes={"x": {0: torch.export.Dim.AUTO}, "ends": None})
    torch.testing.assert_close(program.module()(x[:11], ENDS), want[:11])


def test_what_does_not_fit_is_refused() -> None:
    _, operands = experts("int4", 32)
    x = torch.randn(12, K)
    run = torch.ops.qcompiler.wn_grouped
    for given, told in (
        ((x, ENDS.long()), "offsets int32"),
        ((x, torch.tensor([3, 2, 10], dtype=torch.int32)), r"grow up to T=12; these are \[3, 2, 10\]"),
        ((x, torch.tensor([3, 3, 13], dtype=torch.int32)), "grow up to T=12"),
        ((x.double(), ENDS), "f32, f16 or bf16"),
        ((x[:, :100], ENDS), r"codes of a weight \[20, 100\]"),
    ):
        with pytest.raises(InputError, match=told):
            run(*given, *operands, None, N, 32, "int4", "none")
    with pytest.raises(InputError, match=r"bias of 3 experts of 20 features is \[3, 20\]"):
        run(x, ENDS, *operands, torch.zeros(N), N, 32, "int4", "none")
