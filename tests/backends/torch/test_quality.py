"""Comparing two .pt2 files: the figures, where inputs come from, and what cannot be compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompiler.backends.torch.quality import compare
from qcompiler.calibrate.data import open_data
from qcompiler.report.model import EXACT_DB, Quality
from qcompiler.verify.findings import Finding
from tests.backends.torch.measured import K, net, written

X = np.random.default_rng(3).standard_normal((5, K), np.float32)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A program, and one whose result is three quarters of it."""
    other = net()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.75)
    return written(net(), tmp_path / "float.pt2"), written(other, tmp_path / "compiled.pt2")


def test_figures_on_data_and_on_made_up_inputs(pair: tuple[Path, Path]) -> None:
    found = compare(*pair, open_data({"x": X}))
    assert isinstance(found, Quality)
    assert list(found.outputs) == ["scores"]  # named by its key; the other result is no float
    scores = found.outputs["scores"]
    with torch.no_grad():
        want = net()(torch.from_numpy(X))["scores"].numpy()
    # an error of a quarter of the signal: 20 log10(4), by hand
    assert scores.sqnr_db == pytest.approx(12.0412, abs=1e-3)
    assert scores.cosine == pytest.approx(1.0, abs=1e-6)
    assert scores.max_abs == pytest.approx(0.25 * np.abs(want).max(), rel=1e-5)
    made = compare(*pair)
    assert isinstance(made, Quality)
    assert made.outputs["scores"].sqnr_db == pytest.approx(12.0412, abs=1e-3)


def test_the_same_file_is_exact(pair: tuple[Path, Path]) -> None:
    found = compare(pair[0], pair[0])
    assert isinstance(found, Quality)
    assert found.outputs["scores"].sqnr_db == EXACT_DB


def test_what_is_not_compared(pair: tuple[Path, Path], tmp_path: Path) -> None:
    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(-1)

    class Other(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": x[:, :6].reshape(-1, 3, 2), "best": x.argmax(-1)}

    (tmp_path / "bad.pt2").write_bytes(b"no archive")
    assert compare(tmp_path / "bad.pt2", pair[1]) == (
        "not compared: the float model does not load in torch (bad.pt2 is not a .pt2 archive of torch.export)"
    )
    whole = written(Whole(), tmp_path / "whole.pt2")
    assert compare(whole, whole) == "not compared: the model has no float output"
    broken = compare(pair[0], tmp_path / "bad.pt2")
    assert isinstance(broken, Finding)
    assert broken.code == "QC902"
    assert "the artifact does not run on inputs that the float model takes" in broken.message
    shaped = compare(pair[0], written(Other(), tmp_path / "other.pt2"))
    assert isinstance(shaped, Quality)
    assert shaped.outputs["scores"].sqnr_db is None
