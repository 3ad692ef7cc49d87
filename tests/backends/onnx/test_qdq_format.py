"""``emit.format=qdq``: standard ONNX that says the same as the pairs of the IR, and what the runtime makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from qcompiler import api, driver
from qcompiler import recipe as recipes
from qcompiler.agreement import Gap, Rounding, differing
from qcompiler.backends import backend_of
from qcompiler.backends.onnx.emit import emit_onnx
from qcompiler.backends.onnx.evidence import verify_file
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.calibrate.data import open_data
from qcompiler.errors import InputError, RejectedError
from qcompiler.ir import Graph, Op
from qcompiler.passes.lower_qdq import LowerQdq
from qcompiler.pipeline import Context, run
from qcompiler.reader import parse
from qcompiler.report.model import Report
from tests import realmodels
from tests.acceptance.graphs import mlp, model, weights, write
from tests.checking.nets import samples, small
from tests.support import require_data

BACKEND = backend_of("ort-cpu")
TARGET = BACKEND.target("ort-cpu")
QDQ = {"emit.format": "qdq"}
STANDARD = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}


@dataclass(frozen=True)
class Case:
    """A float model, its recipe, and whether the runtime fuses all that the artifact quantizes."""

    net: str
    recipe: str
    accepted: bool = True


CASES = [
    Case("plain", "w4a16"),
    Case("plain", "w8a16"),
    Case("plain", "w2a16"),
    Case("plain", "w8a8"),
    Case("plain", "w8a8-dynamic"),
    Case("mlp", "w8a8"),
    Case("mlp", "w4a16", accepted=False),  # the runtime joins the Relu with the product first, and then fuses nothing
    Case("small", "w8a8", accepted=False),  # the runtime joins a residual with its product, as a bias
    Case("cnn", "w8a8"),
    Case("mnist", "w4a16"),
    Case("mnist", "w8a8"),
    Case("pystdlib", "w8a16"),
    Case("pystdlib", "w8a8"),
]


def plain() -> onnx.ModelProto:
    """Two matrices without anything between them but a residual, in opset 18: sites ``up`` and ``down``."""
    nodes = [
        helper.make_node("MatMul", ["x", "up.weight"], ["h"], name="up_mm"),
        helper.make_node("Tanh", ["h"], ["t"], name="tanh"),
        helper.make_node("MatMul", ["t", "down.weight"], ["y"], name="down_mm"),
    ]
    tensors = {"up.weight": weights(100, 64), "down.weight": weights(64, 48, seed=1)}
    made = model(nodes, [("x", ["b", "s", 100])], [("y", ["b", "s", 48])], tensors)
    made.opset_import[0].version = 18
    made.ir_version = 8
    return made


@cache
def source(net: str, folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The float model and two inputs for it."""
    rng = np.random.default_rng(3)
    path = folder / f"{net}.onnx"
    match net:
        case "plain":
            return write(path, plain()), [{"x": rng.standard_normal((2, 5, 100)).astype(np.float32)} for _ in range(2)]
        case "mlp":
            return write(path, mlp()), [{"x": rng.standard_normal((4, 64)).astype(np.float32)} for _ in range(2)]
        case "small":
            emit_onnx(small(), path)
            return path, samples(2)
        case "cnn":
            from qcompiler.backends.torch.to_onnx import export_onnx
            from qcompiler.models import builders

            module, args, shapes = builders.tiny_cnn_example()
            export_onnx(module, args, shapes, path)
            name = onnx.load(path).graph.input[0].name
            return path, [{name: rng.standard_normal((2, 3, 16, 16)).astype(np.float32)} for _ in range(2)]
        case "pystdlib":
            from qcompiler.backends.torch.to_onnx import export_onnx
            from qcompiler.models import pystdlib

            module, args, shapes = pystdlib.example()
            export_onnx(module, args, shapes, path)
            return path, [{"input_ids": row[None, :24]} for row in pystdlib.calibration_rows(2)]
    require_data("mnist/mnist-8.onnx")
    real = realmodels.model(net)
    return real.fetch(folder), list(real.calibration(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qdq")


@cache
def artifact(case: Case, folder: Path) -> tuple[Path, Report]:
    """The artifact, written whatever the verdict, and its report."""
    path, data = source(case.net, folder)
    out = folder / f"{case.net}-{case.recipe}.onnx"
    given = data if case.recipe == "w8a8" else None
    try:
        report = api.compile(path, recipe=case.recipe, calibration=given, settings=QDQ, out=out, force=True).report
    except RejectedError as e:
        report = e.report
    return out, report


def pair_form(case: Case, folder: Path) -> Graph:
    """The graph of the IR before anything is lowered: ``q.quantize``, ``q.dequantize`` and host ops."""
    path, data = source(case.net, folder)
    job = driver.start("ort-cpu", recipes.load(case.recipe), None, None)
    captured = driver.capture(job, path)
    if case.recipe == "w8a8":
        driver.calibrate_with(job, open_data(data))
    passes = job.recipe.passes
    stop = next(i for i, p in enumerate(passes) if p.name in driver.FUSING)
    driver.run_recipe(job, captured.graph, passes[:stop])
    return captured.graph


def outputs(path: Path, feed: Mapping[str, Any], *, optimized: bool = False) -> list[Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found: list[Any] = session.run(None, dict(feed))
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.net}-{c.recipe}")
def test_the_artifact_is_standard_onnx(case: Case, folder: Path) -> None:
    path, _ = artifact(case, folder)
    onnx.checker.check_model(str(path), full_check=True)
    made = onnx.load(path)
    assert {o.domain for o in made.opset_import if o.domain != "com.microsoft"} == {""}
    assert next(o.version for o in made.opset_import if not o.domain) >= (25 if case.recipe == "w2a16" else 21)
    assert all(not n.domain for n in made.graph.node)
    kinds = {n.op_type for n in made.graph.node}
    assert "DequantizeLinear" in kinds
    assert ("QuantizeLinear" in kinds) == (case.recipe == "w8a8")
    assert ("DynamicQuantizeLinear" in kinds) == (case.recipe == "w8a8-dynamic")


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.net}-{c.recipe}")
def test_without_the_optimizer_it_computes_what_the_pairs_mean(case: Case, folder: Path) -> None:
    path, _ = artifact(case, folder)
    graph = pair_form(case, folder)
    limits = [Rounding(graph).relative(v) for v in graph.outputs]
    _, data = source(case.net, folder)
    gaps: list[Gap] = []
    for feed in data:
        with BACKEND.runner(graph, ()) as reference:
            wanted = reference(feed)
        for value, limit, got in zip(graph.outputs, limits, outputs(path, feed), strict=True):
            gaps.append(differing(wanted[value.name], got, limit, _bias_steps(path)))
            # A sum that falls on the other side of a tie moves a code by one, and all that depends on it.
            noise = float(np.square(wanted[value.name].astype(np.float64) - got).sum())
            assert noise <= 1e-4 * float(np.square(wanted[value.name].astype(np.float64)).sum())
    close = [g.fits for g in gaps]
    assert any(close) if case.recipe == "w8a8" else all(close), [g.text for g in gaps]


def _bias_steps(path: Path) -> float:
    """Half a step of the int32 biases that the artifact holds: what rounding them may move the last layer by."""
    made = onnx.load(path)
    stored = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer if t.data_type != onnx.TensorProto.INT4}
    biases = [n.input[1] for n in made.graph.node if n.op_type == "DequantizeLinear" and _int32(stored, n.input[0])]
    return max((float(stored[scale].max()) / 2 for scale in biases), default=0.0)


def _int32(stored: Mapping[str, Any], name: str) -> bool:
    return name in stored and stored[name].dtype == np.int32


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.net}-{c.recipe}")
def test_the_verdict_is_what_was_foretold(case: Case, folder: Path) -> None:
    path, report = artifact(case, folder)
    assert report.accepted == case.accepted, [str(f) for f in report.findings]
    foretold = verify_file(path, TARGET, run=False)
    measured = verify_file(path, TARGET, run=True)
    # where an Add is joined, the node is called like the product before, like the Add after
    seen = [sorted((s.op, s.n, s.k, s.status) for s in sites) for sites, _, _ in (foretold, measured)]
    assert seen[0] == seen[1]
    for site in report.sites:
        if site.status == "skipped":
            assert site.reason
        elif site.op != "embedding":
            assert (site.status == "fused") == bool(site.kernel)
            assert site.bytes["codes"] > 0
        if site.status == "unfused":
            assert any(site.name in str(f) for f in report.findings), site.name


@pytest.mark.parametrize("case", [c for c in CASES if c.accepted], ids=lambda c: f"{c.net}-{c.recipe}")
def test_optimized_it_stays_near(case: Case, folder: Path) -> None:
    """The runtime's own kernels: int8 activations in weight-only products, one step of a code elsewhere."""
    path, _ = artifact(case, folder)
    _, data = source(case.net, folder)
    for a, b in zip(outputs(path, data[0]), outputs(path, data[0], optimized=True), strict=True):
        assert a.shape == b.shape
        cosine = float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
        assert cosine > 0.99  # a wrong zero point or transposition gives 0.1 to 0.7


@pytest.mark.parametrize("recipe", ["w4a16", "w8a16", "w2a16", "w8a8"])
def test_the_codes_are_those_of_the_fused_artifact(recipe: str, folder: Path) -> None:
    """One set of bits (law L8), in another layout."""
    case = Case("plain", recipe)
    path, _ = artifact(case, folder)
    job = driver.start("ort-cpu", recipes.load(recipe), None, None)
    source_path, data = source("plain", folder)
    captured = driver.capture(job, source_path)
    if recipe == "w8a8":
        driver.calibrate_with(job, open_data(data))
    passes = [p for p in job.recipe.passes if p.name not in ("choose-layout", "dce")]
    driver.run_recipe(job, captured.graph, passes)
    fused = [op for op in captured.graph if op.name in ("q.linear", "q.linear_static")]
    made = load_onnx(path)
    written = [op for op in made if op.name == "onnx.MatMul"]
    assert len(fused) == len(written) == 2
    for ours, theirs in zip(fused, written, strict=True):
        first = 1 if ours.name == "q.linear" else 3
        dq = theirs.operands[1].owner  # type: ignore[union-attr]
        for slot, value in enumerate(dq.operands):  # type: ignore[union-attr]
            want = ours.operand(first + slot)
            if want is None:  # zeros that standard ops want stated
                assert not value.payload.array().any()  # type: ignore[union-attr]
                continue
            array = want.payload.array()  # type: ignore[union-attr]
            found = value.payload.array()  # type: ignore[union-attr]
            np.testing.assert_array_equal(array.T.reshape(found.shape), found)


@pytest.mark.parametrize("recipe", ["w4a16", "w8a16", "w8a8", "w8a8-dynamic"])
def test_the_artifact_reads_back_as_the_pairs_it_was_made_of(recipe: str, folder: Path) -> None:
    """``lift-quantized`` gives the same codes, scales and zero points, and the same outputs."""
    case = Case("plain", recipe)
    path, _ = artifact(case, folder)
    made, lifted = load_onnx(path), load_onnx(path)
    run(lifted, recipes.parse_line("lift-quantized").passes, Context())
    assert not any("QuantizeLinear" in op.name or "DequantizeLinear" in op.name for op in lifted)
    written = [op.operands for op in made if op.name == "onnx.DequantizeLinear" and _stored(op)]
    read = [op.operands for op in lifted if op.name == "q.dequantize" and _stored(op)]
    assert len(written) == len(read) == 2
    for theirs, ours in zip(written, read, strict=True):
        for a, b in zip(theirs, ours, strict=False):
            np.testing.assert_array_equal(a.payload.array().reshape(-1), b.payload.array().reshape(-1))  # type: ignore[union-attr]
    feed = source("plain", folder)[1][0]
    with BACKEND.runner(lifted, ()) as reference:
        wanted = reference(feed)
    for value, got in zip(lifted.outputs, outputs(path, feed), strict=True):
        gap = differing(wanted[value.name], got, Rounding(lifted).relative(value))
        assert gap.fits, gap.text


def _stored(op: Op) -> bool:
    return all(v is None or v.is_const for v in op.operands)


# -- tables ----------------------------------------------------------------------------------------------------


def looked_up(*, between: bool = True) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Gather", ["table.weight", "ids"], ["e"], name="table_gather"),
        helper.make_node("Tanh" if between else "Identity", ["e"], ["t"], name="between"),
        helper.make_node("MatMul", ["t", "head.weight"], ["y"], name="head_mm"),
    ]
    ids = helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["b", "s"])
    tensors = {"table.weight": weights(40, 100), "head.weight": weights(100, 16, seed=1)}
    return model(nodes, [ids], [("y", ["b", "s", 16])], tensors)


@pytest.mark.parametrize("scheme", ["int8 g32 asym", "int8 channel sym", "int8 tensor sym", "uint8 g16 asym"])
def test_only_the_rows_of_a_table_that_are_looked_up_are_expanded(scheme: str, tmp_path: Path) -> None:
    path = write(tmp_path / "table.onnx", looked_up())
    settings = QDQ | {"insert-qdq.embeddings": scheme}
    report = api.compile(path, recipe="w8a16", settings=settings, out=tmp_path / "o.onnx", check=True).report
    assert report.accepted
    (site,) = [s for s in report.sites if s.op == "embedding"]
    assert site.status == "fused"
    onnx.checker.check_model(str(tmp_path / "o.onnx"), full_check=True)
    made = onnx.load(tmp_path / "o.onnx")
    gathers = [n for n in made.graph.node if n.op_type == "Gather"]
    assert len(gathers) == (1 if "tensor" in scheme else 3 if "asym" in scheme else 2)
    dequantizes = [n for n in made.graph.node if n.op_type == "DequantizeLinear"]
    assert any(n.input[0] == gathers[0].output[0] for n in dequantizes)


def test_rows_that_go_straight_into_a_product_of_blocks_are_rejected(tmp_path: Path) -> None:
    """The runtime takes the looked-up rows for a quantized activation and computes wrong numbers: never accepted."""
    path = write(tmp_path / "table.onnx", looked_up(between=False))
    settings = QDQ | {"insert-qdq.weights": "int8 g32 asym", "insert-qdq.embeddings": "int8 g32 asym"}
    with pytest.raises(RejectedError, match=r"QC303 head: MatMulIntegerToFloat .* computes wrong numbers"):
        api.compile(path, recipe="w8a16", settings=settings, out=tmp_path / "o.onnx")


def test_a_table_in_four_bits_is_left_to_the_verdict(tmp_path: Path) -> None:
    path = write(tmp_path / "table.onnx", looked_up())
    settings = QDQ | {"insert-qdq.embeddings": "int4 g32 asym"}
    with pytest.raises(RejectedError, match=r"QC10[12]") as caught:
        api.compile(path, recipe="w8a16", settings=settings, out=tmp_path / "o.onnx")
    assert any("table" in str(f) for f in caught.value.report.findings)


# -- refusals --------------------------------------------------------------------------------------------------

GRAPH = """\
graph @main dialect=onnx meta {{opset_import = [["", {opset}]]}} {{
  input %x : f32[4, 64]
  const %s : {s} = rand:1
  const %z : {z} = rand:2
  %q : {codes}[4, 64] = q.quantize(%x, %s, %z) {{scheme = <{scheme}>}}
  %y : f32[4, 64] = q.dequantize(%q, %s, %z) {{scheme = <{scheme}>}}
  return %y
}}
"""


@pytest.mark.parametrize(
    ("opset", "scheme", "why"),
    [
        (21, "int4 g32 asymf axis=1", "cannot say"),
        (13, "int4 g32 asym axis=1", "needs opset 21; the model has 13"),
        (21, "int2 g32 asym axis=1", "needs opset 25; the model has 21"),
    ],
)
def test_what_has_no_standard_form_is_refused(opset: int, scheme: str, why: str) -> None:
    codes = scheme.split()[0]
    zero = "f32[4, 2]" if "asymf" in scheme else f"{codes}[4, 2]"
    text = GRAPH.format(opset=opset, s="f32[4, 2]", z=zero, codes=codes, scheme=scheme)
    with pytest.raises(InputError, match=why):
        run(parse(text), [LowerQdq()], Context())


def test_other_dynamic_schemes_are_refused(tmp_path: Path) -> None:
    text = """\
graph @main dialect=onnx meta {opset_import = [["", 21]]} {
  input %x : f32[4, 64]
  %s : f32[] = q.choose_qparams(%x) {scheme = <int8 tensor sym dynamic>}
  %q : int8[4, 64] = q.quantize(%x, %s) {scheme = <int8 tensor sym dynamic>}
  %y : f32[4, 64] = q.dequantize(%q, %s) {scheme = <int8 tensor sym dynamic>}
  return %y
}
"""
    with pytest.raises(InputError, match="DynamicQuantizeLinear, gives 'uint8 tensor asym dynamic'"):
        run(parse(text), [LowerQdq()], Context())
