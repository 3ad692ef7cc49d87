"""An artifact that was accepted, one site of it broken: every break is found, by the right code, at the right op."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest

import qcompiler
from qcompiler.backends.onnx.evidence import verify_file
from qcompiler.backends.onnx.kernels import target
from qcompiler.backends.onnx.worker import Worker
from tests.verify.mutants import MUTANTS, Mutant, broken, float_model


@dataclass
class Bench:
    """Two accepted artifacts, a probe process, and a place to put mutants."""

    artifacts: dict[int, Path]
    worker: Worker
    folder: Path

    def mutant(self, mutant: Mutant) -> Path:
        path = self.folder / "mutant.onnx"
        beside = path.with_name("mutant.onnx.report.json")
        onnx.save(broken(onnx.load(self.artifacts[mutant.bits]), mutant), path)
        beside.unlink(missing_ok=True)
        if mutant.report:
            shutil.copy(f"{self.artifacts[mutant.bits]}.report.json", beside)
        return path


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("mutation")
    onnx.save(float_model(), folder / "float.onnx")
    artifacts = {}
    for bits, recipe in ((4, "w4a16"), (8, "w8a16")):
        artifacts[bits] = folder / f"{recipe}.onnx"
        # Groups with zero points, so that there is more to break.
        settings = {"insert-qdq.weights": f"int{bits} g128 asym"}
        qcompiler.compile(
            folder / "float.onnx", target="ort-cpu", recipe=recipe, settings=settings, out=artifacts[bits]
        )
    with Worker() as worker:
        yield Bench(artifacts, worker, folder)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("run", [True, False], ids=["run", "static"])
def test_the_artifact_is_accepted(bench: Bench, bits: int, run: bool) -> None:
    sites, findings, _ = verify_file(bench.artifacts[bits], target("ort-cpu"), run=run, worker=bench.worker)
    assert not findings
    assert {s.name: s.status for s in sites} == dict.fromkeys(["emb", "w1", "w2", "w3"], "fused")
    assert {s.evidence for s in sites} == {"measured" if run else "static"}


# That the runtime does not know an op shows only when it opens the file.
JUDGED = [(m, run) for m in MUTANTS for run in (True, False) if run or m.code != "QC902"]


@pytest.mark.parametrize(("mutant", "run"), JUDGED, ids=[f"{m.name}-{'run' if r else 'static'}" for m, r in JUDGED])
def test_a_mutant_is_rejected(bench: Bench, mutant: Mutant, run: bool) -> None:
    _, findings, _ = verify_file(bench.mutant(mutant), target("ort-cpu"), run=run, worker=bench.worker)
    at_fault = [f for f in findings if f.code == mutant.code and f.op == mutant.op]
    assert at_fault, (
        f"{mutant.code} at '{mutant.op}' is missing: {'; '.join(map(str, findings)) or 'nothing was found'}"
    )
    assert {f.severity for f in at_fault} == {mutant.severity}
    assert all(f.message and f.fix for f in at_fault)
    if mutant.severity == "warning":
        assert not [f for f in findings if f.severity == "error"]
