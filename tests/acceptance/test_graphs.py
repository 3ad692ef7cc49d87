"""Models that differ from a plain chain: branches, half precision, tied and unusual weights, static targets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler import api
from qcompiler.cli import status
from qcompiler.errors import RecipeError, RejectedError
from qcompiler.numerics import q_linear
from qcompiler.rtn import quantize_weight
from qcompiler.scheme import parse_scheme
from tests.acceptance.graphs import F, mlp, model, weights, write


def run(path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:  # type: ignore[type-arg]
    return np.asarray(ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feed)[0])


def test_the_artifact_computes_the_reference_semantics(tmp_path: Path) -> None:
    """x @ W by the exact kernel equals float64 arithmetic on the codes that the recipe gives the weight."""
    k, n = 200, 48
    w = weights(k, n)
    made = model(
        [helper.make_node("MatMul", ["x", "fc.weight"], ["y"], name="fc")],
        [("x", ["b", k])],
        [("y", ["b", n])],
        {"fc.weight": w},
    )
    settings = {"choose-layout.kernel": "ort-cpu/MatMulNBits.fp32", "insert-qdq.weights": "int4 g32 asym"}
    out = tmp_path / "out.onnx"
    api.compile(write(tmp_path / "m.onnx", made), out=out, settings=settings)
    x = np.random.default_rng(3).standard_normal((5, k)).astype(np.float32)
    scheme = parse_scheme("int4 g32 asym axis=1")
    r = quantize_weight(np.ascontiguousarray(w.T), scheme)
    want = q_linear(x.astype(np.float64), r.codes, r.scale.astype(np.float64), r.zero, None, scheme)
    # float32 sums of 200 products of numbers near 1 and 0.07: 200 * 2^-24 of the sum of magnitudes, about 1e-4.
    np.testing.assert_allclose(run(out, {"x": x}), want, atol=1e-4, rtol=0)


def test_layers_in_branches_are_fused(tmp_path: Path) -> None:
    def branch(name: str, weight: str) -> onnx.GraphProto:
        node = helper.make_node("MatMul", ["x", weight], [f"{name}_y"], name=f"{name}_mm")
        out = helper.make_tensor_value_info(f"{name}_y", F, ["b", 32])
        local = [] if weight == "shared.weight" else [numpy_helper.from_array(weights(64, 32, seed=2), weight)]
        return helper.make_graph([node], name, [], [out], initializer=local)

    node = helper.make_node(
        "If", ["c"], ["y"], name="if", then_branch=branch("a", "shared.weight"), else_branch=branch("b", "own.weight")
    )
    c = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    made = model([node], [c, ("x", ["b", 64])], [("y", ["b", 32])], {"shared.weight": weights(64, 32)})
    source, out = write(tmp_path / "m.onnx", made), tmp_path / "out.onnx"
    report = api.compile(source, out=out, recipe="w8a16").report
    assert {s.name: s.status for s in report.sites} == {"shared": "fused", "own": "fused"}
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    for flag in (True, False):
        feed = {"c": np.array(flag), "x": x}
        want, got = run(source, feed), run(out, feed)
        # int8 weights and int8 activations: about 1 % of the result's spread each.
        assert np.abs(want - got).max() < 0.05 * want.std()


def test_one_weight_used_by_two_layers_is_stored_once(tmp_path: Path) -> None:
    w = weights(64, 64)
    nodes = [
        helper.make_node("MatMul", ["x", "shared.weight"], ["h"], name="first"),
        helper.make_node("MatMul", ["h", "shared.weight"], ["y"], name="second"),
    ]
    made = model(nodes, [("x", ["b", 64])], [("y", ["b", 64])], {"shared.weight": w})
    artifact = api.compile(write(tmp_path / "m.onnx", made), out=tmp_path / "out.onnx", recipe="w8a16")
    assert [s.tied_to for s in artifact.report.sites] == [None, artifact.report.sites[0].name]
    stored = [t for t in onnx.load(artifact.path).graph.initializer if t.name.endswith("weight_q8")]
    assert len(stored) == 1


@pytest.mark.parametrize("recipe", ["w4a16", "w8a16", "w2a16"])
def test_half_precision_models(recipe: str, tmp_path: Path) -> None:
    half = TensorProto.FLOAT16
    node = helper.make_node("MatMul", ["x", "fc.weight"], ["y"], name="fc")
    ends = [helper.make_tensor_value_info(n, half, ["b", d]) for n, d in (("x", 64), ("y", 32))]
    made = model([node], ends[:1], ends[1:], {"fc.weight": weights(64, 32).astype(np.float16)})
    report = api.compile(write(tmp_path / "m.onnx", made), out=tmp_path / "out.onnx", recipe=recipe).report
    (site,) = report.sites
    assert (site.status, site.evidence) == ("fused", "measured")
    scales = next(t for t in onnx.load(tmp_path / "out.onnx").graph.initializer if "scales" in t.name)
    assert scales.data_type == half


def test_bfloat16_has_no_kernel_on_cpu(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "fc.weight"], ["y"], name="fc")
    ends = [helper.make_tensor_value_info(n, TensorProto.BFLOAT16, ["b", d]) for n, d in (("x", 64), ("y", 32))]
    made = model([node], ends[:1], ends[1:], {})
    raw = (weights(64, 32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    made.graph.initializer.append(helper.make_tensor("fc.weight", TensorProto.BFLOAT16, [64, 32], raw, raw=True))
    with pytest.raises(RejectedError) as e:
        api.compile(write(tmp_path / "m.onnx", made), out=tmp_path / "out.onnx")
    codes = {f.code for f in e.value.report.findings}
    assert codes == {"QC201"}
    assert "bf16" in str(e.value)


def test_a_chip_without_avx2_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "m.onnx", mlp())
    assert status(["compile", str(source), "-o", str(tmp_path / "out.onnx"), "--target", "ort-cpu:sse", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert {f["code"] for f in report["findings"]} == {"QC206"}
    assert report["totals"]["unfused"] == 2


def test_a_device_that_is_not_here_gets_static_evidence(tmp_path: Path) -> None:
    """fpA_intB serves every M: f16, groups of 32, symmetric, no bias."""
    half = TensorProto.FLOAT16
    node = helper.make_node("MatMul", ["x", "fc.weight"], ["y"], name="fc")
    ends = [helper.make_tensor_value_info(n, half, ["b", d]) for n, d in (("x", 128), ("y", 128))]
    made = model([node], ends[:1], ends[1:], {"fc.weight": weights(128, 128).astype(np.float16)})
    source = write(tmp_path / "m.onnx", made)
    settings = {"insert-qdq.weights": "int4 g32 sym"}
    report = api.compile(source, target="ort-cuda:sm_90", out=tmp_path / "out.onnx", settings=settings).report
    (site,) = report.sites
    assert (site.status, site.evidence) == ("fused", "static")
    assert set(site.kernel.values()) == {"ort-cuda/MatMulNBits.fpA_intB4.f16"}
    assert any("ep.cuda.fpa_intb_gemm=1" in note for note in report.notes)
    with pytest.raises(RejectedError, match="QC104"):  # with zero points prefill would expand the weight
        api.compile(source, target="ort-cuda:sm_90", out=tmp_path / "other.onnx", recipe="w4a16")


def test_the_recipe_travels_inside_the_artifact(tmp_path: Path) -> None:
    artifact = api.compile(write(tmp_path / "m.onnx", mlp()), out=tmp_path / "out.onnx", skip=["down"])
    notes = {p.key: p.value for p in onnx.load(artifact.path).metadata_props}
    assert notes["qcompiler.recipe"] == artifact.report.recipe.text
    assert 'skip = ["down"]' in notes["qcompiler.recipe"]
    (skipped,) = [s for s in artifact.report.sites if s.status == "skipped"]
    assert skipped.reason == "skipped by the recipe (skip = 'down')"


def test_verify_accepts_what_compile_made_and_never_changes_it(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    api.compile(write(tmp_path / "m.onnx", mlp()), out=out)
    before = out.read_bytes()
    for again in (True, False):
        report = api.verify(out, run=again)
        assert report.accepted
        assert report.totals.fused == 2
        assert {s.evidence for s in report.sites} == {"measured" if again else "static"}
    assert out.read_bytes() == before


def test_progress_runs_to_the_end(tmp_path: Path) -> None:
    class Listener:
        def __init__(self) -> None:
            self.stages: list[str] = []
            self.seen: list[tuple[int, int]] = []

        def stage(self, text: str) -> None:
            self.stages.append(text)

        def advance(self, done: int, total: int, unit: str) -> None:
            assert unit == "bytes"
            self.seen.append((done, total))

    listener = Listener()
    api.compile(write(tmp_path / "m.onnx", mlp()), out=tmp_path / "out.onnx", progress=listener)
    assert listener.stages[0] == "capture"
    assert "quantize and write" in listener.stages
    assert listener.seen == sorted(listener.seen)
    assert listener.seen[-1][0] == listener.seen[-1][1] > 0


def test_weights_go_beside_the_model_when_asked(tmp_path: Path) -> None:
    artifact = api.compile(
        write(tmp_path / "m.onnx", mlp()), out=tmp_path / "out.onnx", settings={"emit.external": "true"}
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "out.onnx", "out.onnx.data", "out.onnx.report.json"]
    assert artifact.report.artifact is not None
    assert artifact.report.artifact.files == ("out.onnx", "out.onnx.data")
    assert api.verify(artifact.path).accepted
    assert artifact(np.ones((2, 64), np.float32))[0].shape == (2, 32)
    with pytest.raises(RecipeError, match="the emission has no option 'colour'"):
        api.compile(tmp_path / "m.onnx", out=tmp_path / "out.onnx", settings={"emit.colour": "red"})


def test_a_float_model_and_a_module_can_be_judged(tmp_path: Path) -> None:
    import torch

    report = api.verify(write(tmp_path / "m.onnx", mlp()))
    assert report.accepted
    assert report.totals.sites == 0
    assert any("nothing quantized" in note for note in report.notes)
    assert api.verify(torch.nn.Linear(8, 4), args=(torch.ones(2, 8),)).accepted


def test_an_exported_archive_compiles(tmp_path: Path) -> None:
    import torch

    program = torch.export.export(torch.nn.Linear(64, 32), (torch.ones(2, 64),))
    torch.export.save(program, tmp_path / "m.pt2")
    report = api.compile(tmp_path / "m.pt2", out=tmp_path / "out.onnx", recipe="w8a16").report
    assert report.accepted
    assert report.source.kind == "pt2"
    assert [s.status for s in report.sites] == ["fused"]
