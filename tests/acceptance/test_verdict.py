"""How the driver joins what rules, rows and the runtime say into one status a site."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from qcompiler import api, driver, recipe
from qcompiler.backends.onnx.backend import OrtBackend
from qcompiler.errors import InputError, RejectedError
from qcompiler.sites import Site
from qcompiler.verify.evidence import EvidenceResult, NodeEvidence
from tests.acceptance.graphs import mlp, model, weights, write


def test_nodes_of_one_name_keep_their_own_reasons(tmp_path: Path) -> None:
    """ONNX allows two nodes called alike: int4 g512 and a missing kernel for odd widths must not be mixed up."""
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["h"], name="same"),
        helper.make_node("MatMul", ["h", "b.weight"], ["y"], name="same"),
    ]
    tensors = {"a.weight": weights(64, 64), "b.weight": weights(64, 36, seed=1)}
    made = model(nodes, [("x", ["b", 64])], [("y", ["b", 36])], tensors)
    with pytest.raises(RejectedError) as e:
        api.compile(write(tmp_path / "m.onnx", made), target="ort-cuda:sm_90", out=tmp_path / "out.onnx")
    reasons = {s.name: s.reason for s in e.value.report.sites}
    assert "expands the whole weight above M=16" in str(reasons["a"])
    assert "N % 8 == 0" in str(reasons["b"])


def job_with(site: Site) -> driver.Job:
    job = driver.start("ort-cpu:avx2", recipe.load("w4a16"), None, None)
    job.ctx.ledger.add(site)
    return job


def test_a_site_that_the_runtime_does_not_show_is_told() -> None:
    job = job_with(Site("fc", "linear", 8, 8, 256, status="fused", kernel={"decode": "ort-cpu/MatMulNBits.int8"}))
    driver.weigh(job, EvidenceResult("measured", nodes=[NodeEvidence("other", "MatMulNBits", "fused")]))
    (site,) = job.ctx.ledger
    assert site.evidence == "static"
    (finding,) = job.ctx.findings
    assert (finding.code, finding.op, finding.severity) == ("QC106", "fc", "warning")


def test_one_bad_phase_makes_a_site_unfused() -> None:
    job = job_with(Site("fc", "linear", 8, 8, 256, status="fused"))
    seen = [NodeEvidence("fc", "MatMulNBits", "fused", phase="decode"), NodeEvidence("fc", "MatMulNBits", "dequant")]
    driver.weigh(job, EvidenceResult("measured", nodes=seen))
    assert next(iter(job.ctx.ledger)).status == "unfused"


def test_verify_leaves_nothing_behind_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def broken(self: OrtBackend, *a: object) -> None:
        raise InputError("no room")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(OrtBackend, "emit", broken)
    with pytest.raises(InputError, match="no room"):
        api.verify(torch.nn.Linear(8, 4), args=(torch.ones(2, 8),))
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith("qcompiler")]


def test_wrong_zero_points_are_far_from_the_float_model(tmp_path: Path) -> None:
    """What the cosine bounds of the model tests must tell apart: every zero point off by one code in sixteen."""
    import onnx

    source, out = write(tmp_path / "m.onnx", mlp(256, 256, 64)), tmp_path / "out.onnx"
    good = api.compile(source, out=out).report.quality
    broken = onnx.load(out)
    for t in broken.graph.initializer:
        if t.name.endswith("zeros"):
            raw = np.frombuffer(t.raw_data, np.uint8)
            t.raw_data = (((raw & 15) ^ 4) | ((raw >> 4 ^ 4) << 4)).astype(np.uint8).tobytes()
    onnx.save(broken, tmp_path / "bad.onnx")
    from qcompiler.backends.onnx.quality import compare

    bad = compare(source, tmp_path / "bad.onnx")
    assert good is not None
    assert not isinstance(bad, str)
    figures = [next(iter(q.outputs.values())).cosine for q in (good, bad)]  # type: ignore[union-attr]
    print(figures)
    assert figures[0] is not None and figures[0] > 0.95
    assert figures[1] is not None and figures[1] < 0.9
