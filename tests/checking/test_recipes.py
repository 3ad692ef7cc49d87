"""``--check`` over whole compilations: every pass of every recipe keeps its promise, and the report tells it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from qcompiler import api
from qcompiler import recipe as recipes
from qcompiler.backends import backend_of
from qcompiler.backends.onnx.emit import emit_onnx
from qcompiler.backends.onnx.running import runnable
from qcompiler.calibrate.calibrator import Calibrator
from qcompiler.calibrate.data import open_data
from qcompiler.checking import CheckHook, told
from qcompiler.cli import status
from qcompiler.errors import InputError, RecipeError, RejectedError
from qcompiler.ir import Graph
from qcompiler.passes.dce import Dce
from qcompiler.pipeline import Context, run
from qcompiler.recipe import Recipe
from qcompiler.report.model import Report
from tests import zoo
from tests.checking.nets import samples, small
from tests.support import require_data

BACKEND = backend_of("ort-cpu")
STATIC = ("w8a8", "w8a8-smooth")


def kept(report: Report) -> None:
    """The model was accepted, every pass was seen, and none was above its bound."""
    assert report.accepted, report.findings
    assert [c.name for c in report.checks] == [step.split("{")[0].strip() for step in _steps(report.recipe.text)]
    assert any(c.compared for c in report.checks)
    for c in report.checks:
        assert c.error <= c.bound, c
    assert any(n.startswith(f"check: {len(report.checks)} passes keep their promise") for n in report.notes)


def _steps(text: str) -> list[str]:
    return [recipes.show_pass(p) for p in recipes.parse_line(text).passes]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "small.onnx"
    emit_onnx(small(), path)
    return path


@pytest.mark.parametrize("recipe", ["w4a16", "w8a16", "w2a16", "w8a8", "w8a8-dynamic", "w8a8-smooth"])
def test_every_pass_of_a_recipe_keeps_its_promise(recipe: str, net: Path, tmp_path: Path) -> None:
    data = samples(2) if recipe in STATIC else None
    kept(api.compile(net, recipe=recipe, calibration=data, check=True, out=tmp_path / "o.onnx").report)


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ('"nf4 g64 sym", clip = "mse"', ""),
        ('"f4e2m1 g32 sym scale=f8e8m0"', ""),
        ('"f4e2m1 g16 sym scale=f8e4m3"', ""),
        ('"f8e4m3 b16x32 sym"', "f8e4m3 b1x16 sym dynamic"),
        ('"f8e4m3 channel sym", convs = "f8e4m3 channel sym"', "f8e4m3 tensor sym"),
        ('"f8e4m3 channel sym"', "f8e5m2 token sym dynamic"),
        ('"int4 g32 sym"', "int8 token sym dynamic"),
    ],
)
def test_float_codes_keep_the_promise_of_their_scheme(weights: str, activations: str) -> None:
    """Without a target: every product is fused, and each value stays within half a gap of its codes."""
    made = small()
    steps = f', correct-bias, insert-activation-qdq{{activations = "{activations}"}}' if activations else ""
    text = f"normalise, insert-qdq{{weights = {weights}}}{steps}, fold-constants, propagate-qdq, fold-qdq, fuse-integer"
    hook = CheckHook(BACKEND.runner, samples(2), BACKEND.kernel_error)
    ctx = Context(None, calibration=Calibrator(open_data(samples(2)), runnable))
    run(made, recipes.parse_line(f"{text}, fuse-linear, dce").passes, ctx, [hook])
    assert all(c.error <= c.bound for c in hook.results)
    lossy = [c for c in hook.results if c.name.startswith("insert")]
    assert all(c.compared for c in lossy)
    assert max(c.error for c in lossy) > 0.2  # of 0.5: the bound is no looser than it has to be
    kinds = {op.name for op in made}
    assert not kinds & {"onnx.MatMul", "onnx.Gemm"}
    assert kinds & {"q.linear", "q.linear_dyn", "q.linear_static"}


@pytest.mark.parametrize("name", ["mlp", "tiny_cnn", "tiny_llama"])
def test_on_modules_and_made_up_inputs(name: str, tmp_path: Path) -> None:
    from qcompiler.models import builders

    module, args, shapes = getattr(builders, f"{name}_example")()
    report = api.compile(
        module, args=args, dynamic_shapes=shapes, recipe="w8a8-dynamic", check=True, out=tmp_path / "o.onnx"
    ).report
    kept(report)
    assert "check: made-up inputs; give --calibration DATA to check on your own" in report.notes


@pytest.mark.parametrize("element", ["bfloat16", "float16"])
def test_on_codes_of_narrow_floats(element: str, tmp_path: Path) -> None:
    """Scales of such activations are f32, what is dequantized is as narrow again."""
    import torch

    from qcompiler.models import builders

    module, args, shapes = builders.mlp_example()
    kind = getattr(torch, element)
    args = tuple(a.to(kind) if a.is_floating_point() else a for a in args)
    report = api.compile(
        module.to(kind),
        args=args,
        dynamic_shapes=shapes,
        recipe="w8a8-dynamic",
        target="torch-cpu",
        check=True,
        out=tmp_path / "o.pt2",
    ).report
    kept(report)


@pytest.mark.slow
def test_on_a_trained_transformer(tmp_path: Path) -> None:
    require_data("text")
    from qcompiler.models import pystdlib

    module, args, shapes = pystdlib.example()
    rows = [{"input_ids": row[None, :32]} for row in pystdlib.calibration_rows(1)]
    kept(
        api.compile(
            module,
            args=args,
            dynamic_shapes=shapes,
            recipe="w8a8",
            calibration=rows,
            check=True,
            out=tmp_path / "o.onnx",
        ).report
    )


def test_what_was_checked_is_in_the_report(tmp_path: Path) -> None:
    module, args, shapes = zoo.llama_tied()
    report = api.compile(module, args=args, dynamic_shapes=shapes, check=True, out=tmp_path / "o.onnx").report
    kept(report)
    assert Report.from_json(report.to_json()) == report
    again = Report.load(tmp_path / "o.onnx.report.json")
    assert [c.name for c in again.checks] == [c.name for c in report.checks]


def test_codes_inside_a_branch_are_told_as_not_compared(tmp_path: Path) -> None:
    made = _branches()
    data = [{"x": np.random.default_rng(i).standard_normal((4, 32)).astype(np.float32)} for i in range(2)]
    hook = CheckHook(BACKEND.runner, data, BACKEND.kernel_error)
    passes = recipes.parse_line(
        'insert-qdq{weights = "int8 channel sym"}, insert-activation-qdq{activations = "uint8 tensor asym dynamic"}'
    ).passes
    run(made, passes, Context(), [hook])
    first, second = hook.results
    assert (first.compared, first.note[:2]) == (2, "2 ")
    assert second.compared == 0
    assert second.note.startswith("not compared: q.choose_qparams")
    assert "not compared: insert-activation-qdq" in told(hook.results)[0]


def _branches() -> Graph:
    """A product at the top, and one in either branch of an If."""
    from onnx import helper

    from qcompiler.backends.onnx.load import load_onnx
    from tests.acceptance.graphs import model, weights

    out = [helper.make_tensor_value_info("t", 1, None)]
    then = helper.make_graph([helper.make_node("MatMul", ["h", "in.weight"], ["t"], name="inner")], "then", [], out)
    out = [helper.make_tensor_value_info("e", 1, None)]
    other = helper.make_graph([helper.make_node("Relu", ["h"], ["e"], name="relu")], "else", [], out)
    nodes = [
        helper.make_node("MatMul", ["x", "top.weight"], ["h"], name="top"),
        helper.make_node("ReduceMax", ["h"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["y"], name="if", then_branch=then, else_branch=other),
    ]
    tensors = {
        "top.weight": weights(32, 32),
        "in.weight": weights(32, 16, seed=1),
        "zero": np.zeros((), np.float32),
    }
    return load_onnx(model(nodes, [("x", [4, 32])], [("y", None)], tensors))


def test_the_command_line_checks(net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "data.npz", x=np.concatenate([s["x"] for s in samples(2)]))
    given = ["compile", str(net), "-o", str(tmp_path / "o.onnx"), "--recipe", "w8a8", "--check", "--json"]
    assert status([*given, "--calibration", str(tmp_path / "data.npz")]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [c["name"] for c in found["checks"]]
    assert "insert-activation-qdq" in names
    assert names[-1] == "dce"
    lossy = [c for c in found["checks"] if c["kind"] == "lossy" and c["name"].startswith("insert")]
    assert len(lossy) == 2
    assert all(c["compared"] and c["bound"] == 0.5 and c["drift"] > 0 for c in lossy)


class Forgetful(Dce):
    """Drops a bias and calls that exact."""

    name: ClassVar[str] = "dce"

    def run(self, graph: Graph, ctx: Context) -> None:
        add = next(op for op in graph.walk() if op.label == "down_add")
        product = add.operands[0]
        assert product is not None
        add.set_operand(1, product)


def _forgetful() -> Recipe:
    whole = recipes.load("w4a16")
    return Recipe("forgetful", (whole.passes[0], Forgetful(), *whole.passes[1:]))


def test_a_broken_promise_rejects_and_leaves_a_repro(net: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.onnx"
    with pytest.raises(RejectedError, match="QC303 down_add: pass 2, dce") as caught:
        api.compile(net, recipe=_forgetful(), check=True, out=out)
    report: Any = caught.value.report
    assert not out.exists()
    assert Report.load(tmp_path / "o.onnx.report.json").verdict == "rejected"
    assert [f.code for f in report.findings] == ["QC303"]
    (note,) = [n for n in report.notes if n.startswith("check: what is needed")]
    repro = Path(note.rpartition(" ")[2])
    assert "qcompiler run" in repro.read_text()
    assert "down_add" in repro.read_text()
    repro.unlink()


def test_without_the_check_nobody_notices(net: Path, tmp_path: Path) -> None:
    report = api.compile(net, recipe=_forgetful(), out=tmp_path / "o.onnx").report
    assert report.accepted
    assert not report.checks


def test_made_up_inputs_that_do_not_fit_are_an_input_error(tmp_path: Path) -> None:
    from onnx import helper

    from tests.acceptance.graphs import model, weights, write

    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["y"], name="mm"),
    ]
    tensors = {"shape": np.array([7, 64], np.int64), "w": weights(64, 8)}
    path = write(tmp_path / "m.onnx", model(nodes, [("x", ["n"])], [("y", [7, 8])], tensors))
    with pytest.raises(InputError, match="found no inputs on which the model runs"):
        api.compile(path, check=True, out=tmp_path / "o.onnx")


def test_unknown_formats_are_named(net: Path) -> None:
    with pytest.raises(RecipeError, match=r"emit.format is fused or qdq, not 'onnx'"):
        api.compile(net, settings={"emit.format": "onnx"})
