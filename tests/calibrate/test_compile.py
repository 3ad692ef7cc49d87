"""``--calibration`` from end to end: the command line and the Python interface."""

import json
from pathlib import Path

import numpy as np
import pytest

from qcompiler import api
from qcompiler.calibrate.calibrator import Calibrator
from qcompiler.cli import status
from qcompiler.errors import CalibrationError, InputError
from tests.acceptance.graphs import mlp, write

X = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "m.onnx", mlp())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.savez(tmp_path / "d.npz", x=X)
    return tmp_path / "d.npz"


def compiled(model: Path, *more: str) -> tuple[int, dict[str, object]]:
    out = model.with_name("out.onnx")
    ended = status(["compile", str(model), "-o", str(out), *more, "--json"])
    report = out.with_name("out.onnx.report.json")
    return ended, json.loads(report.read_text()) if report.is_file() else {}


def notes(report: dict[str, object]) -> list[str]:
    found = report["notes"]
    assert isinstance(found, list)
    return [n for n in found if n.startswith("calibration")]


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "entropy"])
def test_static_ranges_come_from_the_data(model: Path, data: Path, observer: str) -> None:
    ended, report = compiled(
        model, "-r", "w8a8", "--calibration", str(data), "--set", f"insert-activation-qdq.observer={observer}"
    )
    assert ended == 0
    assert report["totals"]["fused"] == 2  # type: ignore[index]
    assert notes(report) == [f"calibration: 3 batches of {data} ran through the model once"]
    assert report["quality"]["outputs"]["y"]["sqnr_db"] > 25  # type: ignore[index]


def test_data_that_the_recipe_does_not_use_is_told(model: Path, data: Path) -> None:
    ended, report = compiled(model, "-r", "w8a16", "--calibration", str(data))
    assert ended == 0
    (note,) = notes(report)
    assert "the recipe measures no activations" in note
    assert str(data) in note


def test_static_without_data_is_one_sentence(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compiled(model, "-r", "w8a8")[0] == 2
    err = capsys.readouterr().err
    assert "needs --calibration DATA" in err
    assert len(err.strip().splitlines()) == 1
    assert not model.with_name("out.onnx").exists()
    with pytest.raises(CalibrationError):
        api.compile(model, recipe="w8a8")


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-smooth"])
def test_planning_needs_no_data(model: Path, recipe: str) -> None:
    plan = api.plan(model, recipe=recipe)
    assert plan.accepted
    assert [s.status for s in plan.sites] == ["fused", "fused"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"y": X}, r"has no x and has y, which the model does not take; the inputs are x f32\[batch, 64\]"),
        ({"x": X[:, :3]}, "axis 1 differs"),
        ("absent.npz", "there is no file absent.npz"),
        ([{"x": X}, {"x": X * np.inf}], "NaN"),
        ([], "holds no samples"),
    ],
)
def test_data_at_fault(model: Path, given: object, words: str, tmp_path: Path) -> None:
    with pytest.raises((InputError, CalibrationError), match=words):
        api.compile(model, recipe="w8a8", calibration=given, out=tmp_path / "o.onnx")
    assert not (tmp_path / "o.onnx").exists()


def test_text_says_what_to_give_instead(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("words")
    assert compiled(model, "-r", "w8a8", "--calibration", str(tmp_path / "t.txt"))[0] == 2
    assert "give an .npz with input_ids" in capsys.readouterr().err


def test_a_generator_will_do(model: Path) -> None:
    artifact = api.compile(model, recipe="w8a8", calibration=({"x": row} for row in X))
    assert artifact.report.accepted


def test_progress_counts_batches(model: Path) -> None:
    class Listener:
        def __init__(self) -> None:
            self.told: list[tuple[int, int, str]] = []

        def stage(self, text: str) -> None:
            self.told.clear() if text == "pass insert-activation-qdq" else None

        def advance(self, done: int, total: int, unit: str) -> None:
            self.told.append((done, total, unit))

    listener = Listener()
    api.compile(model, recipe="w8a8", calibration={"x": X}, progress=listener)
    assert [t for t in listener.told if t[2] == "batches"][-1] == (3, 3, "batches")


def test_the_cache_spares_the_second_run(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "cache"))
    ran = []
    real = Calibrator._run

    def spied(self, graph, wanted):  # type: ignore[no-untyped-def]
        ran.append(list(wanted))
        real(self, graph, wanted)

    monkeypatch.setattr(Calibrator, "_run", spied)
    first = compiled(model, "-r", "w8a8", "--calibration", str(data))
    bytes_of_first = model.with_name("out.onnx").read_bytes()
    assert len(ran) == 1
    second = compiled(model, "-r", "w8a8", "--calibration", str(data))
    assert len(ran) == 1
    assert (first[0], second[0]) == (0, 0)
    assert model.with_name("out.onnx").read_bytes() == bytes_of_first
    assert notes(second[1]) == [f"calibration: all that {data} gives was measured before and came from the cache"]
