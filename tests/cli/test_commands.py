"""Commands: what they pass on, what they print where, and how they end. The work itself is replaced here."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qcompiler.errors import CalibrationError, Error, InputError, RecipeError, RejectedError, StructureError
from qcompiler.report.model import Report
from qcompiler.target import Phase
from tests.cli.conftest import Run
from tests.report.samples import decoder, rejected, small
from tests.support import Golden

COMMANDS = ("compile", "verify", "plan", "inspect", "run", "bench", "eval", "recipes", "targets", "kernels", "explain")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(golden: Golden, run: Run, command: str) -> None:
    status, out, err = run(*command.split(), "--help")
    assert (status, err) == (0, "")
    golden(f"cli/help{'-' if command else ''}{command}.txt", out)


def test_help_lists_the_commands_and_no_others(run: Run) -> None:
    lines = run("--help").out.partition("Commands:\n")[2].splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("   ")]
    assert tuple(listed[: len(COMMANDS)]) == COMMANDS
    assert all(len(line) <= 100 for line in lines)


def test_no_command_is_help(run: Run) -> None:
    assert run() == run("--help")


def test_version(run: Run) -> None:
    assert run("--version") == (0, "qcompiler 0.1.0\n", "")


def test_verify_passes_on_what_was_asked(run: Run, api: Any) -> None:
    api.replace("verify", small())
    status, out, err = run(
        "verify", "m.onnx", "-t", "ort-cpu:avx2", "--phase", "decode=1", "--phase", "wide=64", "--no-run"
    )
    assert (status, err) == (0, "")
    ((name, given, options),) = api.calls
    assert (name, given) == ("verify", ("m.onnx",))
    assert options.pop("progress") is None  # standard error is no terminal here
    assert options == {"target": "ort-cpu:avx2", "phases": (Phase("decode", 1), Phase("wide", 64)), "run": False}
    assert out.splitlines()[-1] == "verdict: accepted"


def test_compile_passes_on_what_was_asked(run: Run, api: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    api.replace("compile", SimpleNamespace(report=small(), path=out))
    ended = run(
        *("compile", "m.onnx", "-o", str(out), "--recipe", "w8a16", "--calibration", "d.npz", "--max-ram", "2GiB"),
        *("--set", "insert-qdq.weights=int4 g64 sym", "--skip", "head", "--skip", "*.3.*", "--check", "--force"),
    )
    assert (ended.status, ended.err) == (0, "")
    ((name, given, options),) = api.calls
    assert (name, given) == ("compile", ("m.onnx",))
    assert options == {
        "target": "ort-cpu",
        "recipe": "w8a16",
        "calibration": "d.npz",
        "out": out,
        "settings": {"insert-qdq.weights": "int4 g64 sym"},
        "skip": ["head", "*.3.*"],
        "phases": None,
        "max_ram": 2 << 30,
        "check": True,
        "force": True,
        "progress": None,
    }


def test_options_of_one_call_do_not_reach_the_next(run: Run, api: Any, tmp_path: Path) -> None:
    api.replace("compile", SimpleNamespace(report=small()))
    out = str(tmp_path / "out.onnx")
    run("compile", "m.onnx", "-o", out, "--skip", "head")
    run("compile", "m.onnx", "-o", out)
    assert [options["skip"] for _, _, options in api.calls] == [["head"], []]


@pytest.mark.parametrize(("report", "status"), [(small(), 0), (decoder(), 0), (rejected(), 1)])
def test_json_is_the_report_and_nothing_else(run: Run, api: Any, report: Report, status: int) -> None:
    def chatty(*given: Any, **options: Any) -> Report:
        print("a model may print while it is built")
        return report

    api.replace("verify", chatty)
    ended = run("verify", "m.onnx", "--json")
    assert ended.status == status
    assert Report.from_json(json.loads(ended.out)) == report
    assert ended.err == "a model may print while it is built\n"


def test_rejected_compilation_shows_its_report(run: Run, api: Any, tmp_path: Path) -> None:
    api.replace("compile", RejectedError("rejected for ort-cpu", rejected()))
    arguments = ("compile", "m.onnx", "-o", str(tmp_path / "out.onnx"))
    status, out, err = run(*arguments)
    assert (status, err) == (1, "")
    assert "QC101 layers.0.fc" in out
    assert out.splitlines()[-1] == "verdict: rejected, 3 errors"
    ended = run(*arguments, "--json")
    assert ended.status == 1
    assert json.loads(ended.out)["verdict"] == "rejected"


def test_forced_artifact_is_still_rejected(run: Run, api: Any, tmp_path: Path) -> None:
    api.replace("compile", SimpleNamespace(report=rejected()))
    assert run("compile", "m.onnx", "-o", str(tmp_path / "o.onnx"), "--force").status == 1


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (InputError("m.onnx is no\nONNX file; give one"), 2, "m.onnx is no ONNX file; give one"),
        (RecipeError("no pass 'x'"), 2, "no pass 'x'"),
        (CalibrationError("no data"), 2, "no data"),
        (Error("needs a target"), 2, "needs a target"),
        (RejectedError("rejected, and no report"), 1, "rejected, and no report"),
        (FileNotFoundError(2, "No such file or directory", "w.data"), 2, "w.data: No such file or directory"),
        (PermissionError(13, "Permission denied", b"w.data"), 2, "w.data: Permission denied"),
        (MemoryError(), 2, "the memory is used up"),
        (ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime"), 2, "pip install 'qcompiler[cpu]'"),
        (ModuleNotFoundError("No module named 'triton.x'", name="triton.x"), 2, "pip install 'qcompiler[gpu]'"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_faults_are_one_sentence(run: Run, api: Any, error: BaseException, status: int, said: str) -> None:
    api.replace("verify", error)
    ended = run("verify", "m.onnx", "--json")
    assert (ended.status, ended.out) == (status, "")
    assert ended.err.startswith("qcompiler: ")
    assert ended.err.count("\n") == 1
    assert said in ended.err


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        StructureError("pass 3 (dce): %x is used before it exists"),
        OSError(5, "Input/output error"),
        ModuleNotFoundError("No module named 'qcompiler.gone'", name="qcompiler.gone"),
    ],
)
def test_internal_error_leaves_a_repro(
    run: Run, api: Any, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    api.replace("verify", error)
    status, out, err = run("verify", "m.onnx")
    assert (status, out) == (3, "")
    (path,) = tmp_path.iterdir()
    assert str(path) in err
    assert err.startswith(f"qcompiler: internal error: {type(error).__name__}: ")
    assert err.count("\n") == 1
    story = path.read_text()
    assert "Traceback" in story
    assert type(error).__name__ in story
    assert "arguments:" in story


def test_internal_error_names_the_repro_that_was_written(run: Run, api: Any) -> None:
    error = StructureError("pass 3 (dce): broken")
    error.repro = Path("made-earlier.qir")  # type: ignore[attr-defined]
    api.replace("verify", error)
    ended = run("verify", "m.onnx")
    assert ended.status == 3
    assert "made-earlier.qir" in ended.err


def test_internal_error_without_a_place_to_write(
    run: Run, api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    api.replace("verify", KeyError("x"))
    status, _, err = run("verify", "m.onnx")
    assert status == 3
    assert "no repro file could be written" in err
    assert "Traceback (most recent call last)" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "No such command 'nothing'; see 'qcompiler --help'"),
        (["compile"], "Missing argument 'SOURCE'; see 'qcompiler compile --help'"),
        (["compile", "m.onnx"], "'--out'"),
        (["verify", "m.onnx", "--no-such-option"], "--no-such-option"),
        (["verify", "a", "b"], "b"),
        (["plan", "m.onnx", "--tp", "many"], "--tp"),
        (["plan", "m.onnx", "--tp", "0"], "--tp"),
        (["verify", "m.onnx", "--phase", "decode"], "--phase takes name=M"),
        (["plan", "m.onnx", "--set", "x"], "--set takes pass.key=value"),
        (["compile", "m.onnx", "-o", "gone/o.onnx"], "the folder gone does not exist"),
        (["compile", "m.onnx", "-o", "o.onnx", "--max-ram", "much"], "--max-ram takes a size"),
        (["inspect", "m.onnx", "--json", "--text"], "choose one"),
        (["run", "gone.qir", "dce"], "gone.qir cannot be read"),
        (["recipes", "no-such-recipe"], "no-such-recipe"),
        (["kernels", "--target", "abacus"], "abacus"),
    ],
)
def test_requests_at_fault(run: Run, arguments: list[str], said: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("qcompiler: ")
    assert err.count("\n") == 1
    assert said in err


def _plan() -> Any:
    from qcompiler.planning import Plan, PlannedSite
    from qcompiler.verify.findings import Finding

    kernel = dict.fromkeys(("decode", "prefill"), "ort-cpu/MatMulNBits.int8")
    declined = {"ort-cpu/MatMulNBits.fp32": ["serves too, but another row comes before it"]}
    sizes = {"codes": 32768, "scales": 2048, "zeros": 256}
    sites = [
        PlannedSite(f"layer.{i}", "linear", 256, 256, "int4 g128 asym", "fused", kernel, declined, 262144, sizes)
        for i in range(30)
    ]
    why = "ort-cpu/MatMulNBits.int8 takes f16, f32 activations, not bf16"
    left = PlannedSite("head", "linear", 100, 256, "int4 g128 asym", "unfused", {}, {}, 102400, {}, why)
    finding = Finding("QC201", "head", "linear 100x256 is left unfused", why, "export the model in one of f16, f32")
    return Plan("ort-cpu", "w4a16", [*sites, left], [finding], 760 << 20, {"decode": 1, "prefill": 512})


def test_plan(golden: Golden, run: Run, api: Any) -> None:
    api.replace("plan", _plan())
    status, out, err = run("plan", "m.onnx", "--tp", "4", "--set", "a.b=1")
    assert (status, err) == (1, "")
    golden("cli/plan.txt", out)
    ((_, given, options),) = api.calls
    assert given == ("m.onnx",)
    assert (options["tp"], options["settings"], options["recipe"]) == (4, {"a.b": "1"}, "w4a16")


def test_plan_that_is_accepted(run: Run, api: Any) -> None:
    api.replace("plan", replace(_plan(), sites=_plan().sites[:-1], findings=[]))
    status, out, _ = run("plan", "m.onnx", "--json")
    assert status == 0
    assert json.loads(out)["predicted_peak_bytes"] == 760 << 20


QIR = """graph @main dialect=onnx {
  input %x : f32[batch, 8]
  const %w : f32[8, 8] = rand:1
  %y : f32[batch, 8] = onnx.MatMul(%x, %w)
  return %y
}
"""


@pytest.fixture
def qir(tmp_path: Path) -> Path:
    path = tmp_path / "g.qir"
    path.write_text(QIR)
    return path


def test_inspect(run: Run, qir: Path) -> None:
    status, out, err = run("inspect", str(qir))
    assert (status, err) == (0, "")
    assert f"{qir}: 1 op, constants of 256 B (f32 256 B)" in out
    assert "input  x : f32[batch, 8]" in out
    assert "onnx.MatMul      1" in out


def test_inspect_text_is_the_graph(run: Run, qir: Path) -> None:
    assert run("inspect", str(qir), "--text") == (0, QIR, "")


def test_inspect_html(run: Run, qir: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run("inspect", str(qir), "--html", str(page)) == (0, "", "")
    assert "onnx.MatMul(%x, %w)" in page.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.qir", "page.html"]


def test_inspect_json(run: Run, qir: Path) -> None:
    assert json.loads(run("inspect", str(qir), "--json").out)["ops"] == 1


def test_run_passes(run: Run, qir: Path) -> None:
    assert run("run", str(qir), "dce") == (0, QIR, "")


def test_run_passes_of_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(QIR))
    assert run("run", "-", "dce") == (0, QIR, "")


def test_run_with_a_pass_that_is_not_there(run: Run, qir: Path) -> None:
    status, out, err = run("run", str(qir), "no-such-pass{}")
    assert (status, out) == (2, "")
    assert "no-such-pass" in err


def test_recipes(run: Run) -> None:
    from qcompiler import recipe

    lines = run("recipes").out.splitlines()
    assert [line.split()[0] for line in lines] == recipe.names()
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines), "each recipe says in one line what it does"
    for name in recipe.names():
        assert recipe.parse_toml(run("recipes", name).out, name) == recipe.load(name)


def test_targets(run: Run) -> None:
    status, out, _ = run("targets")
    assert status == 0
    names = [t["name"] for t in json.loads(run("targets", "--json").out)]
    assert "ort-cpu" in names
    assert all(name in out for name in names)


@pytest.mark.parametrize("target", ["ort-cpu", "ort-cuda:sm_90"])
def test_kernels(run: Run, target: str) -> None:
    status, out, _ = run("kernels", "--target", target)
    assert status == 0
    rows = json.loads(run("kernels", "--target", target, "--json").out)
    assert rows
    assert all(row["name"] in out and row["evidence"] for row in rows)
