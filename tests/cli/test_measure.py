"""The commands bench and eval: what they pass on, what they print, how they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from qcompiler import benching, evaluating
from qcompiler.backends.base import Case
from qcompiler.benching import CaseTiming, Comparison, FileTimings, Spread
from qcompiler.evaluating import KL, Evaluation, OutputFigures, Perplexities, SiteFigures, TopOne
from qcompiler.target import Phase
from tests.backends.onnx.build import f32, model_of
from tests.cli.conftest import Run
from tests.support import Golden

DECODE, PREFILL = Case("decode", 1, 1, 128, "tokens", 1), Case("prefill", 512, 1, 128, "tokens", 512)


def comparison() -> Comparison:
    def timing(case: Case, seconds: float, speedup: Spread | None = None) -> CaseTiming:
        return CaseTiming(case, ((seconds, 1.02 * seconds), (0.99 * seconds, seconds)), 100 << 20, speedup)

    faster = Spread(2.5, 2.4, 2.6, 2.4)
    files = (
        FileTimings("x/float.onnx", 200 << 20, 190 << 20, 1.5, 400 << 20, 48 << 20, (timing(DECODE, 0.02),)),
        FileTimings(
            "x/w4.onnx",
            40 << 20,
            30 << 20,
            0.25,
            120 << 20,
            48 << 20,
            (timing(DECODE, 0.008, faster), timing(PREFILL, 0.4)),
            ("batch 8: the model fixes the batch at 1",),
        ),
    )
    settings = {"threads": 2, "rounds": 10, "seconds": None}
    return Comparison(files, settings, {"onnxruntime": "1"}, ("noisy: the rounds of w4.onnx spread over 25% of it",))


def evaluation(sites: int = 2) -> Evaluation:
    return Evaluation(
        "w4.onnx",
        "float.onnx",
        "data.npz",
        12,
        {"logits": OutputFigures(0.99951, 0.98, 31.25, 0.5), "probs": OutputFigures(None, None, 999.0, 0.0)},
        TopOne("logits", 0.975, 1200, 1100, 0.9, 0.89),
        KL("logits", 0.0125, 1.5, 1200, "logits"),
        Perplexities("logits", 4.5, 4.75, 1188, 1.5041, 1.5581),
        (
            *(SiteFigures(f"layers.{i}.fc", "MatMulNBits", f"linear_{i}", 30.0 - i) for i in range(sites)),
            SiteFigures("head", "QLinearMatMul", "", None, "its result 'c' is uint8, with no constant scale"),
        ),
        {"ppl": "the model takes no token ids, so it is no language model"},
        ("outputs that are no floats are not compared: ids",),
    )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The calls of bench and evaluate, which answer with the samples above."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def answer(result: Any) -> Any:
        def call(*given: Any, **options: Any) -> Any:
            print("a model may print while it is opened")
            calls.append((given, options))
            return result

        return call

    monkeypatch.setattr(benching, "bench", answer(comparison()))
    monkeypatch.setattr(evaluating, "evaluate", answer(evaluation()))
    return calls


def test_bench(golden: Golden, run: Run, measured: list[Any]) -> None:
    status, out, err = run(
        *("bench", "float.onnx", "w4.onnx", "--phase", "decode=1", "--batch", "1,8", "--batch", "8", "--threads", "2"),
        *("--seconds", "2.5", "--past", "64", "--dim", "height=96"),
    )
    assert (status, err) == (0, "a model may print while it is opened\n")
    golden("cli/bench.txt", out)
    ((given, options),) = measured
    assert given == ([Path("float.onnx"), Path("w4.onnx")],)
    assert options == {
        "phases": (Phase("decode", 1),),
        "batches": (1, 8),
        "rounds": None,
        "seconds": 2.5,
        "threads": 2,
        "past": 64,
        "dims": {"height": 96},
        "progress": None,
    }


def test_bench_without_options(run: Run, measured: list[Any]) -> None:
    assert run("bench", "float.onnx").status == 0
    ((_, options),) = measured
    assert (options["phases"], options["batches"], options["past"], options["dims"]) == (None, (1,), 128, {})


def test_bench_json(run: Run, measured: list[Any]) -> None:
    found = json.loads(run("bench", "float.onnx", "--json").out)
    assert found == comparison().to_json()
    assert found["schema"] == 1
    run_json = found["files"][1]["runs"][0]
    assert run_json["speedup"] == {"median": 2.5, "p10": 2.4, "p90": 2.6, "least": 2.4}
    assert run_json["rounds_ms"] == [[8.0, 8.16], [7.92, 8.0]]


def test_eval(golden: Golden, run: Run, measured: list[Any]) -> None:
    status, out, err = run(
        *("eval", "w4.onnx", "--reference", "m.f:make", "--data", "d.npz", "--metric", "kl", "--metric", "ppl"),
        *("--per-site", "--output", "logits", "--limit", "100"),
    )
    assert (status, err) == (0, "a model may print while it is opened\n")
    golden("cli/eval.txt", out)
    ((given, options),) = measured
    assert given == (Path("w4.onnx"), "m.f:make", "d.npz")
    assert options == {"metrics": ["kl", "ppl"], "per_site": True, "output": "logits", "limit": 100, "progress": None}


def test_eval_json(run: Run, measured: list[Any]) -> None:
    found = json.loads(run("eval", "a.onnx", "--reference", "b.onnx", "--data", "d.npz", "--json").out)
    assert found["schema"] == 1
    assert found["outputs"]["logits"]["sqnr_db"] == 31.25
    assert (found["top1"]["accuracy"], found["kl"]["mean_nats"], found["perplexity"]["compiled"]) == (
        0.89,
        0.0125,
        4.75,
    )
    assert found["sites"][-1]["reason"] == "its result 'c' is uint8, with no constant scale"


def test_eval_of_many_sites_shows_the_worst(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluating, "evaluate", lambda *given, **options: evaluation(30))
    out = run("eval", "a.onnx", "--reference", "b.onnx", "--data", "d.npz").out
    assert "... and 6 better sites; --json lists every site" in out
    assert out.index("layers.29.fc") < out.index("layers.6.fc")
    assert "layers.5.fc" not in out


def test_files_of_one_name_are_told_apart() -> None:
    from qcompiler.cli_measure import _short_names

    assert _short_names(["a/x/m.onnx", "a/y/m.onnx"]) == ["x/m.onnx", "y/m.onnx"]
    assert _short_names(["m.onnx"]) == ["m.onnx"]
    assert _short_names(["m.onnx", "m.onnx"]) == ["m.onnx #1", "m.onnx #2"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench"], "Missing argument"),
        (["bench", "gone.onnx"], "there is no file gone.onnx"),
        (["bench", "a.onnx", "--batch", "0"], "--batch takes sizes of at least 1, such as 1,8, not '0'"),
        (["bench", "a.onnx", "--batch", "1,x"], "--batch takes sizes"),
        (["bench", "a.onnx", "--phase", "decode"], "--phase takes name=M"),
        (["bench", "a.onnx", "--dim", "height"], "--dim takes name=N"),
        (["bench", "a.onnx", "--dim", "h=0"], "--dim takes name=N"),
        (["bench", "a.onnx", "--dim", "h=1", "--dim", "h=2"], "--dim h is given twice"),
        (["bench", "a.onnx", "--rounds", "2", "--seconds", "1"], "give one"),
        (["bench", "a.onnx", "--rounds", "0"], "--rounds"),
        (["bench", "a.onnx", "--threads", "0"], "--threads"),
        (["eval", "a.onnx", "--data", "d.npz"], "'--reference'"),
        (["eval", "a.onnx", "--reference", "b.onnx"], "'--data'"),
        (["eval", "gone.onnx", "--reference", "b.onnx", "--data", "d.npz"], "there is no file gone.onnx"),
        (["eval", "gone.onnx", "--reference", "b.onnx", "--data", "d.npz", "--metric", "bleu"], "no metric 'bleu'"),
        (["eval", "gone.onnx", "--reference", "b.onnx", "--data", "d.npz", "--limit", "0"], "--limit"),
    ],
)
def test_requests_at_fault(
    run: Run, arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("qcompiler: ")
    assert err.count("\n") == 1
    assert said in err


def test_from_end_to_end(run: Run, tmp_path: Path) -> None:
    """Both commands on a model and itself in eight bits, unreplaced."""
    w = onnx.numpy_helper.from_array(np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "fc")
    a, b = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(model_of([node], [f32("x", "batch", 32)], [f32("y", "batch", 16)], [w]), a)
    assert run("compile", str(a), "-o", str(b), "--recipe", "w8a16").status == 0
    x = np.random.default_rng(1).standard_normal((20, 32)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, label=np.zeros(20, np.int64))
    ended = run("eval", str(b), "--reference", str(a), "--data", str(tmp_path / "d.npz"), "--per-site", "--json")
    assert ended.status == 0
    found = json.loads(ended.out)
    assert found["samples"] == found["top1"]["labelled"] == 20
    # Eight bits with a scale a channel: noise of half a step each way, of 255 steps over some 6 standard deviations.
    assert 35 < found["outputs"]["y"]["sqnr_db"] < 60
    assert [(s["op"], s["tensor"], s["sqnr_db"]) for s in found["sites"]] == [
        ("MatMulNBits", "y", pytest.approx(found["outputs"]["y"]["sqnr_db"], abs=1))
    ]
    ended = run("bench", str(a), str(b), "--rounds", "1", "--batch", "4", "--json")
    assert ended.status == 0
    timed = json.loads(ended.out)
    assert [f["runs"][0]["batch"] for f in timed["files"]] == [4, 4]
    ended = run("bench", str(a), "--rounds", "1")
    assert "samples/s" in ended.out
