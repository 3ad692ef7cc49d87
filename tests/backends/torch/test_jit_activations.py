"""torch.compile with activations in codes: measured on data, or at run time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler.report.model import Report
from tests.backends.torch.test_jit import BOUND, compiled, distance, fresh, statuses

__all__ = ["fresh"]  # the fixture of every test of torch.compile, used by itself


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = self.down(torch.relu(self.up(x))) * scale
        return out


def test_static_activations_are_measured_on_data_by_the_names_of_the_arguments() -> None:
    model, reports = Mlp().eval(), list[Report]()
    x, one = torch.randn(16, 64), torch.ones(1)
    data = [{"x": x.numpy(), "scale": one.numpy()}]
    out = compiled(model, recipe="w8a8", calibration=data, report=reports)(x, one)
    assert statuses(reports[0]) == {"up": "fused", "down": "fused"}
    # Codes of 8 bits on both sides, two layers.
    assert distance(out, model(x, one)) < 2 * BOUND
    torch.compiler.reset()
    with pytest.raises(qcompiler.CalibrationError, match="needs --calibration DATA"):
        compiled(model, recipe="w8a8")(x, one)


def test_data_serves_graphs_with_open_sizes() -> None:
    model, reports, one = Mlp().eval(), list[Report](), torch.ones(1)
    data = {"x": torch.randn(64, 64).numpy(), "scale": one.numpy()}
    run = torch.compile(
        model,
        backend="qcompiler",
        dynamic=True,
        options={"inner": "eager", "recipe": "w8a8", "calibration": [data], "report": reports},
    )
    for rows in (5, 9):
        x = torch.randn(rows, 64)
        # Codes of 8 bits on both sides, two layers.
        assert distance(run(x, one), model(x, one)) < 2 * BOUND
    assert len(reports) == 1


def test_dynamic_activations_need_no_data() -> None:
    model, reports = Mlp().eval(), list[Report]()
    run = compiled(model, recipe="w8a8-dynamic", report=reports)
    for rows in (4, 7, 9):
        x = torch.randn(rows, 64)
        assert distance(run(x, torch.ones(1)), model(x, torch.ones(1))) < 2 * BOUND
    assert len(reports) == 2
    assert statuses(reports[1]) == {"up": "fused", "down": "fused"}
