"""The loop over batches: what observers see, what is kept on disk, what is told when something is amiss."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.backends import backend_of
from qcompiler.calibrate import cache as caching
from qcompiler.calibrate.cache import Cache, graph_digest
from qcompiler.calibrate.calibrator import Calibrator, Planned
from qcompiler.calibrate.data import open_data
from qcompiler.calibrate.observers import ChannelObserver, Method, Observer, RangeObserver, RowSample
from qcompiler.errors import CalibrationError, InputError
from qcompiler.ir import Graph
from qcompiler.payload import constant
from qcompiler.pipeline import Context
from qcompiler.reader import parse
from qcompiler.scheme import parse_scheme

TEXT = """graph @g dialect=onnx meta {{opset_import = [["", 17]]}} {{
  input %x : f32[n, 4]
  const %w : f32[4, 5] = rand:{seed}
  const %e : f32[0] = dense()
  %h : f32[n, 5] = onnx.MatMul(%x, %w)
  %y : f32[n, 5] = onnx.{op}(%h)
  %none : f32[0] = onnx.Neg(%e)
  %r : f32[n, 5] = onnx.Reciprocal(%y)
  return %y, %none
}}
"""
X = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
U8 = parse_scheme("uint8 tensor asym")
METHODS: tuple[Method, ...] = ("minmax", "percentile", "mse", "entropy")


def model(seed: int = 3, op: str = "Relu") -> Graph:
    return parse(TEXT.format(seed=seed, op=op))


class Runs:
    """The runner of ort-cpu, which counts."""

    def __init__(self) -> None:
        self.taps: list[tuple[str, ...]] = []
        self.batches = 0

    def __call__(self, graph: Graph, taps: Any) -> Any:
        import contextlib

        self.taps.append(tuple(taps))

        @contextlib.contextmanager
        def counted() -> Iterator[Callable[[Any], Any]]:
            with backend_of("ort-cpu").runner(graph, taps) as run:

                def each(batch: Any) -> Any:
                    self.batches += 1
                    return run(batch)

                yield each

        return counted()


def calibrator(runs: Runs, cache: Cache | None = None, data: Any = None, **options: Any) -> Calibrator:
    return Calibrator(open_data({"x": X} if data is None else data), runs, cache=cache, **options)


def observers() -> dict[str, list[Observer]]:
    return {
        "x": [RangeObserver()],
        "h": [*(RangeObserver(m) for m in METHODS), ChannelObserver(), RowSample(7)],
        "y": [RangeObserver("mse")],
    }


def seen(wanted: dict[str, list[Observer]]) -> list[list[Any]]:
    return [[(k, v.tobytes()) for k, v in o.state().items()] for each in wanted.values() for o in each]


# -- observing ---------------------------------------------------------------------------------------------------


def test_observers_see_every_value_of_every_batch() -> None:
    runs, wanted, told = Runs(), observers(), []
    found = calibrator(runs, told=lambda *args: told.append(args))
    found.observe(graph := model(), wanted)
    assert runs.batches == 3  # 16, 16 and 8 samples
    assert told == [(1, 1, "batches"), (2, 2, "batches"), (3, 3, "batches")]
    weight = graph.consts["w"].payload
    assert weight is not None
    h = (X.astype(np.float64) @ weight.array()).astype(np.float32)
    lo, hi = wanted["h"][0].range(U8)  # type: ignore[attr-defined]
    assert (lo, hi) == pytest.approx((h.min(), h.max()), rel=1e-6)
    np.testing.assert_allclose(wanted["h"][4].absmax, np.abs(h).max(0), rtol=1e-6)  # type: ignore[attr-defined]
    assert wanted["y"][0].seen == h.size
    assert wanted["y"][0].lo == 0.0  # type: ignore[attr-defined]
    assert found.findings == []
    found.observe(graph, {"r": [RangeObserver()] * 0})
    assert runs.batches == 3  # nothing wanted, nothing run
    told.clear()
    found.observe(graph, {"y": [RangeObserver()]})
    assert told == [(1, 3, "batches"), (2, 3, "batches"), (3, 3, "batches")]  # the second time their number is known
    assert found.summary() == "calibration: 3 batches of the data ran through the model 2 times"


def test_what_no_data_reaches_is_a_finding() -> None:
    found = calibrator(Runs())
    observer = RangeObserver("mse")
    found.observe(model(), {"none": [observer], "y": [RangeObserver()]})
    (finding,) = found.findings
    assert (finding.code, finding.op, finding.severity) == ("QC305", "none", "warning")
    assert "no calibration data reached %none" in finding.message
    assert observer.range(U8) == (0.0, 0.0)


def test_what_is_no_number_is_refused_by_name() -> None:
    with pytest.raises(CalibrationError, match=r"%r holds 0 NaN and \d+ infinite values.*--skip"):
        calibrator(Runs()).observe(model(), {"r": [RangeObserver()]})


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ([], CalibrationError, "the data holds no samples"),
        ({"x": X[:, :3]}, InputError, "axis 1 differs"),
        ({"z": X}, InputError, "has no x"),
    ],
)
def test_data_that_does_not_fit(data: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        calibrator(Runs(), data=data).observe(model(), {"y": [RangeObserver()]})


def test_a_name_that_is_not_there() -> None:
    for each in (calibrator(Runs()), Planned()):
        with pytest.raises(CalibrationError, match="no value %q to watch"):
            each.observe(model(), {"q": [RangeObserver()]})


def test_planning_runs_nothing() -> None:
    planned, wanted = Planned(), observers()
    planned.observe(model(), wanted)
    assert not planned.measured
    assert all(o.seen for each in wanted.values() for o in each)
    assert wanted["h"][4].absmax.tolist() == [1.0] * 5  # type: ignore[attr-defined]


def test_a_pass_without_data_is_told_what_to_give() -> None:
    with pytest.raises(CalibrationError, match="a-pass measures activations and needs --calibration DATA"):
        Context().need_calibration("a-pass")
    ctx = Context(calibration=(planned := Planned()))
    assert ctx.need_calibration("a-pass") is planned


# -- the cache ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def entries(cache: Cache) -> list[Path]:
    return sorted(cache.folder.glob("*")) if cache.folder.exists() else []


def test_the_second_time_nothing_is_run(cache: Cache) -> None:
    first, second, runs = observers(), observers(), Runs()
    calibrator(runs, cache).observe(model(), first)
    assert runs.batches == 3
    again = calibrator(runs, cache)
    again.observe(model(), second)
    assert runs.batches == 3
    assert seen(first) == seen(second)
    assert "came from the cache" in again.summary()
    assert len(entries(cache)) == 1


def test_observers_share_what_is_the_same_for_them(cache: Cache) -> None:
    """Percentile, MSE and entropy read one histogram; what is new is measured, and added to the entry."""
    runs = Runs()
    calibrator(runs, cache).observe(model(), {"h": [RangeObserver("mse")]})
    calibrator(runs, cache).observe(model(), {"h": [RangeObserver("entropy"), RangeObserver("percentile", 99.0)]})
    assert runs.taps == [("h",)]
    calibrator(runs, cache).observe(model(), {"h": [RangeObserver("mse")], "y": [RangeObserver("mse")]})
    assert runs.taps == [("h",), ("y",)]
    calibrator(runs, cache).observe(model(), {"h": [RangeObserver("mse")], "y": [RangeObserver("mse")]})
    calibrator(runs, cache).observe(model(), {"h": [RangeObserver("mse", bins=64), RowSample(3), RowSample(3, 1)]})
    assert runs.taps == [("h",), ("y",), ("h",)]


@pytest.mark.parametrize(
    ("graph", "data"),
    [(model(4), X), (model(op="Abs"), X), (model(), X + 1), (model(), X[:-1])],
    ids=["weights", "ops", "values", "samples"],
)
def test_another_model_or_data_is_measured_anew(cache: Cache, graph: Graph, data: np.ndarray) -> None:
    runs = Runs()
    calibrator(runs, cache).observe(model(), {"h": [RangeObserver()]})
    calibrator(runs, cache, {"x": data}).observe(graph, {"h": [RangeObserver()]})
    assert len(runs.taps) == 2
    assert len(entries(cache)) == 2


def test_a_digest_reads_the_bytes_of_every_constant() -> None:
    one, other, third = model(), model(), model()
    for graph, values in ((one, 1.0), (other, 2.0), (third, 1.0)):
        w = graph.consts["w"]
        w.payload = constant(np.full((4, 5), values, np.float32))
    assert graph_digest(one) == graph_digest(third) != graph_digest(other)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for at in range(200, len(data), 50):
        data[at] ^= 0xFF
    path.write_bytes(bytes(data))


def _other(path: Path) -> None:
    np.savez(path.open("wb"), index=np.frombuffer(b"[1, 2]", np.uint8))


def _state(path: Path) -> None:
    """A state of another form under the right key."""
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path.open("wb"), **{k: v if k == "index" else np.zeros((2, 2)) for k, v in arrays.items()})


@pytest.mark.parametrize("damage", [_cut, _flip, _other, _state, lambda p: p.write_bytes(b"")])
def test_a_damaged_entry_is_measured_again(cache: Cache, damage: Callable[[Path], object]) -> None:
    runs, first, second = Runs(), observers(), observers()
    calibrator(runs, cache).observe(model(), first)
    (path,) = entries(cache)
    damage(path)
    calibrator(runs, cache).observe(model(), second)
    assert len(runs.taps) == 2
    assert seen(first) == seen(second)
    calibrator(runs, cache).observe(model(), observers())
    assert len(runs.taps) == 2  # it was replaced


def test_a_failed_write_leaves_the_entry_as_it_was(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs()
    calibrator(runs, cache).observe(model(), {"h": [RangeObserver()]})
    (path,) = entries(cache)
    before = path.read_bytes()

    def full(f: Any, **arrays: Any) -> None:
        f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching.np, "savez", full)
    observer = RangeObserver()
    calibrator(runs, cache).observe(model(), {"y": [observer]})
    assert observer.seen
    assert path.read_bytes() == before
    assert entries(cache) == [path]  # and nothing half-written


def test_a_folder_that_cannot_be_made_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    observer = RangeObserver()
    calibrator(Runs(), Cache(tmp_path / "file" / "cache")).observe(model(), {"y": [observer]})
    assert observer.seen


def test_the_cache_is_bounded(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs()
    calibrator(runs, cache).observe(model(), {"h": [RangeObserver("mse")]})
    (first,) = entries(cache)
    monkeypatch.setattr(caching, "FOLDER_BYTES", first.stat().st_size + 100)
    import os

    os.utime(first, (1, 1))
    left = cache.folder / ".x.npz.partial-1-ab"
    left.write_text("left by a killed process")
    os.utime(left, (1, 1))
    calibrator(runs, cache).observe(model(4), {"h": [RangeObserver("mse")]})
    assert len(entries(cache)) == 1
    assert entries(cache) != [first]
    monkeypatch.setattr(caching, "ENTRY_BYTES", 100)
    calibrator(runs, cache).observe(model(5), {"h": [RangeObserver(), RangeObserver("mse")]})
    runs.taps.clear()
    calibrator(runs, cache).observe(model(5), {"h": [RangeObserver()]})
    assert not runs.taps  # the small state was kept
    calibrator(runs, cache).observe(model(5), {"h": [RangeObserver("mse")]})
    assert runs.taps  # the big one was not


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QCOMPILER_CACHE", "off")
    assert Cache.from_environment() is None
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))
    found = Cache.from_environment()
    assert found is not None and found.folder == tmp_path / "calibration"
    monkeypatch.delenv("QCOMPILER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    found = Cache.from_environment()
    assert found is not None and found.folder == tmp_path / "xdg" / "qcompiler" / "calibration"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = Cache.from_environment()
    assert found is not None and found.folder == tmp_path / ".cache" / "qcompiler" / "calibration"
