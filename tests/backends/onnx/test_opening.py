"""What the runtime runs when an artifact is opened: rows of tokens in every phase, pictures in the smallest alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from qcompiler.backends.onnx.load import load_onnx
from qcompiler.backends.onnx.opening import open_small
from qcompiler.backends.onnx.probe import read_arrays
from qcompiler.backends.onnx.worker import Worker
from qcompiler.target import PHASES
from tests.acceptance.graphs import model, write


class Watched(Worker):
    """Keeps the shapes of what each job feeds."""

    fed: list[tuple[int, ...]]

    def ask(self, job: dict[str, Any]) -> Any:
        self.fed = [a.shape for entry in job["feeds"] for a in read_arrays(entry["arrays"])]
        return super().ask(job)


@pytest.mark.parametrize(
    ("shape", "fed"),
    [(["m", 64], [(1, 64), (17, 64)]), (["b", 3, 224, 224], [(1, 3, 224, 224)])],
    ids=["tokens", "pictures"],
)
def test_many_pictures_are_not_run(shape: list[int | str], fed: list[tuple[int, ...]], tmp_path: Path) -> None:
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)
    made = model([helper.make_node("Neg", ["x"], ["y"], name="n")], [("x", shape)], [out], {})
    path = write(tmp_path / "m.onnx", made)
    with Watched() as worker:
        opened = open_small(path, load_onnx(path), PHASES, worker, tmp_path, {})
        assert worker.fed == fed
    assert [run["ok"] for run in opened.runs] == [True] * len(fed)
