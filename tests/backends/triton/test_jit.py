"""torch.compile for torch-cuda without a GPU: sizes that come later pack nothing again, also where floats are freed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.backends.torch.jit import cache

RECIPES = ("w4a16", "w8a16", "w2a16", "f8a16", "nf4", "mxfp4", "nvfp4", "w4a8", "w8a8-dynamic", "fp8")


class Tied(nn.Module):
    """A table, a layer, and a head that is the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(96, 64)
        self.layer = nn.Linear(64, 64)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> Any:
        return self.head(torch.relu(self.layer(self.table(ids))))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_second_size_finds_the_packed_weights(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()  # sizes that an earlier case left open would need no second compilation
    torch.manual_seed(0)
    model = Tied().eval().requires_grad_(False)
    made: list[str] = []
    tensor_of = cache.tensor_of

    def counted(payload: Any) -> torch.Tensor:
        made.append(cache.fingerprint(payload))
        return tensor_of(payload)

    monkeypatch.setattr(cache, "tensor_of", counted)
    options = {"recipe": recipe, "target": "torch-cuda:sm_90", "inner": "eager", "release_weights": True}
    compiled: Any = torch.compile(model, backend="qcompiler", options=options)
    before = len(qcompiler.compiled_reports())
    with torch.no_grad():
        first = compiled(torch.arange(5)[None])
        packed = len(made)
        longer = compiled(torch.arange(9)[None])
        sizes = len(qcompiler.compiled_reports()) - before
    assert sizes == 2
    assert len(made) == packed == len(set(made))
    assert packed
    torch.testing.assert_close(longer[:, :5], first, rtol=1e-2, atol=1e-2 * float(first.abs().max()))
