"""Programs are watched op by op on any device: here on the CPU, through the references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import export

from qcompiler.backends.torch import evidence
from qcompiler.backends.torch.capture import load
from qcompiler.backends.torch.judge import examine
from qcompiler.backends.torch.kernels import target
from qcompiler.backends.torch.watching_gpu import OnDevice
from tests.backends.torch.lowered import SITES, lowered, written

HOPPER = target("torch-cuda:sm_90")


@pytest.mark.parametrize("recipe", ["w4a16", "w8a8-dynamic"])
def test_each_call_is_run_and_compared(recipe: str, tmp_path: Path) -> None:
    path = written(lowered(recipe, "torch-cuda:sm_90"), tmp_path / "net.pt2")
    watched = OnDevice.of(path, None).on("cpu")
    found = watched.measured({"ids": np.array([[1, 2, 3]])})
    assert set(found["ops"]) == set(SITES)
    for facts in found["ops"].values():
        assert facts["m"] == 3
        assert facts["off"] is None or facts["off"] < 2.0**-7
        assert any(name.startswith("qcompiler::") for name in facts["ran"])
        assert facts["temp"] == 0


def test_a_device_that_a_program_names_is_that_where_it_runs() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(3, device="cpu")

    graph = load(export(Net(), (torch.zeros(3),)))
    watched = OnDevice(graph, None).on("meta")
    made = next(op for op in graph if op.name.startswith("aten.arange"))
    assert watched._results(made, {})[0].device.type == "meta"


def test_without_a_gpu_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(lowered("w4a16", "torch-cuda:sm_90"), tmp_path / "net.pt2")
    seen = evidence.TorchEvidence(HOPPER).inspect(path)
    assert seen.result.kind == "static"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert evidence.TorchEvidence(HOPPER)._why_not_run(seen.judged.graph, run=True) == ""
    assert not examine(load(path), HOPPER).findings
