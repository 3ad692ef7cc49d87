"""The embedding of a quantized table on CPUs: its rows, and what compilers make of the operator."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcompiler.backends.triton import embedding  # noqa: F401  # registers the operator
from qcompiler.backends.triton.forms import FORMS
from qcompiler.errors import InputError
from tests.backends.triton.weight_cases import ROUNDOFF, draw

N, K = 70, 150


def group_of(form: str) -> int:
    return {"nvfp4": 16, "mxfp4": 32}.get(form, 64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
def test_rows_asked_for_are_those_of_the_table(form: str, out: torch.dtype) -> None:
    table = draw(form, N, K, group_of(form))
    indices = torch.tensor([[0, 69], [5, 5], [33, 1]])
    y = torch.ops.qcompiler.wn_embedding(indices, *table.operands, K, group_of(form), form, out)
    want = table.values[indices.numpy()]
    assert y.shape == (3, 2, K) and y.dtype == out
    assert (np.abs(y.double().numpy() - want) <= (ROUNDOFF[out] + 2.0**-23) * np.abs(want)).all()  # two products in f32


def test_any_number_of_indices() -> None:
    table = draw("uint4", N, K, 32, "int")
    for indices in (torch.tensor(3), torch.zeros(0, dtype=torch.int32), torch.arange(70).repeat(1100)[:76543]):
        y = torch.ops.qcompiler.wn_embedding(indices, *table.operands, K, 32, "uint4", torch.float16)
        assert y.shape == (*indices.shape, K)
        if indices.numel():
            np.testing.assert_allclose(y[..., -1].double(), table.values[indices.numpy(), -1], rtol=2**-11)


def test_the_operator_keeps_the_rules_of_torch() -> None:
    table = draw("int4", N, K, 32)
    given = (torch.tensor([1, 2]), *table.operands, K, 32, "int4", torch.float32)
    torch.library.opcheck(torch.ops.qcompiler.wn_embedding, given)

    class Lookup(torch.nn.Module):
        def forward(self, indices: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = torch.ops.qcompiler.wn_embedding(indices, *given[1:])
            return y * 2

    tokens = torch.tensor([[1, 69, 0]])
    want = Lookup()(tokens)
    torch.testing.assert_close(torch.compile(Lookup(), backend="aot_eager", fullgraph=True)(tokens), want)
    program = torch.export.export(Lookup(), (tokens,), dynamic_shapes={"indices": {1: torch.export.Dim.AUTO}})
    torch.testing.assert_close(program.module()(tokens[:, :2]), want[:, :2])


def test_what_does_not_fit_is_refused() -> None:
    table = draw("int4", N, K, 32)
    run = torch.ops.qcompiler.wn_embedding
    with pytest.raises(InputError, match=r"indices 1\.\.128 for a table of 128 rows"):
        run(torch.tensor([1, 128]), *table.operands, K, 32, "int4", torch.float32)
    with pytest.raises(InputError, match=r"int32 or int64, not torch\.float32"):
        run(torch.ones(2), *table.operands, K, 32, "int4", torch.float32)
    with pytest.raises(InputError, match=r"gives f32, f16 or bf16, not torch.float64"):
        run(torch.tensor([1]), *table.operands, K, 32, "int4", torch.float64)
