"""Timing in Python: turns, ratios, what applies to a model, processes of their own, refusals."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import qcompiler
from qcompiler import benching
from qcompiler.backends.base import Case, Timed
from qcompiler.benching import CaseTiming, Spread, bench
from qcompiler.errors import InputError
from qcompiler.target import Phase
from tests.backends.onnx.build import f32, model_of

DECODE = Case("decode", 1, 1, None, "tokens", 1)


def saved(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def chain(path: Path, depth: int, width: int = 128, batch: int | str = "batch") -> Path:
    """``depth`` products of ``width`` squared weights, one after the other."""
    weights = [onnx.numpy_helper.from_array(np.eye(width, dtype=np.float32), f"w{i}") for i in range(depth)]
    names = [f"y{i}" for i in range(depth)]
    nodes = [
        helper.make_node("MatMul", [a, w.name], [b]) for a, b, w in zip(["x", *names[:-1]], names, weights, strict=True)
    ]
    return saved(model_of(nodes, [f32("x", batch, width)], [f32(names[-1], batch, width)], weights), path)


def decoder(path: Path) -> Path:
    """Ids and a key/value cache in; the mask of all of them is read."""
    table = onnx.numpy_helper.from_array(np.ones((50, 8), np.float32), "table")
    head = onnx.numpy_helper.from_array(np.ones((8, 50), np.float32), "head")
    ints = [
        helper.make_tensor_value_info(n, onnx.TensorProto.INT64, s)
        for n, s in (("ids", ["batch", "seq"]), ("mask", ["batch", "past_len + seq"]))
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"]),
        helper.make_node("Concat", ["past", "e"], ["all"], axis=1),
        helper.make_node("Cast", ["mask"], ["m"], to=1),
        helper.make_node("Unsqueeze", ["m", "last"], ["mm"]),
        helper.make_node("Mul", ["all", "mm"], ["masked"]),
        helper.make_node("MatMul", ["masked", "head"], ["logits"]),
    ]
    last = onnx.numpy_helper.from_array(np.array([2]), "last")
    inputs = [*ints, f32("past", "batch", "past_len", 8)]
    return saved(model_of(nodes, inputs, [f32("logits", "batch", "all_len", 50)], [table, head, last]), path)


def test_two_files(tmp_path: Path) -> None:
    """A chain of 48 products takes longer than one of 4; sizes, ratios and memory are those of the files."""
    long, short = chain(tmp_path / "long.onnx", 48), chain(tmp_path / "short.onnx", 4)
    found = bench([long, short], batches=(1, 8), rounds=3, threads=1)
    assert [f.weight_bytes for f in found.files] == [48 << 16, 4 << 16]
    for file in found.files:
        assert file.file_bytes == Path(file.path).stat().st_size
        assert file.peak_bytes > file.before_bytes > 0
        assert [t.case.batch for t in file.timings] == [1, 8]
        assert file.left_out == (
            "decode=1, prefill=512: no input has a sequence axis that is open, so phases do not apply",
        )
        for t in file.timings:
            assert len(t.rounds) == 3
            assert t.latency.least <= t.latency.p10 <= t.latency.median <= t.latency.p90
            assert t.rate == t.case.count / t.latency.median
            assert t.bandwidth == file.weight_bytes / t.latency.median
            assert (t.case.unit, t.case.count) == ("samples", t.case.batch)
    first, second = (f.timings for f in found.files)
    assert [t.speedup for t in first] == [None, None]
    # 12 times the work in a process of its own: more than half of it shows, on however busy a machine.
    assert all(t.speedup is not None and t.speedup.median > 2 for t in second)
    assert found.settings["threads"] == 1
    assert found.settings["rounds"] == 3
    whole = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert whole["schema"] == 1
    run = whole["files"][1]["runs"][0]
    assert run["latency_ms"]["median"] == pytest.approx(np.median(np.concatenate(run["rounds_ms"])), abs=1e-5)
    assert run["rate"]["unit"] == "samples/s"


def test_phases_of_a_language_model(tmp_path: Path) -> None:
    (file,) = bench(
        [decoder(tmp_path / "d.onnx")],
        phases=(Phase("decode", 1), Phase("prefill", 16)),
        batches=(2,),
        rounds=1,
        past=32,
    ).files
    assert [t.case for t in file.timings] == [
        Case("decode", 1, 2, 32, "tokens", 2),
        Case("prefill", 16, 2, 32, "tokens", 32),
    ]
    assert file.weight_bytes == 8 * 50 * 4 + 8  # the head and an axis; of the table a few rows are read
    assert file.left_out == ()
    assert file.timings[0].case.text == "decode M=1, batch 2, 32 tokens past"


def test_seconds_instead_of_rounds(tmp_path: Path) -> None:
    (file,) = bench([chain(tmp_path / "a.onnx", 2)], seconds=0.2).files
    (timing,) = file.timings
    assert sum(map(sum, timing.rounds)) >= 0.2
    assert len(timing.rounds) >= benching.LEAST_ROUNDS


def test_what_does_not_apply_is_named(tmp_path: Path) -> None:
    fixed = chain(tmp_path / "a.onnx", 2, batch=3)
    (file,) = bench([fixed], phases=(Phase("decode", 1),), batches=(1, 3), rounds=1).files
    assert [t.case for t in file.timings] == [Case(None, None, 3, None, "samples", 3)]
    assert file.left_out == (
        "decode=1: no input has a sequence axis that is open, so phases do not apply",
        "batch 1: the model fixes the batch at 3",
    )


def test_a_file_that_lacks_the_size_has_no_ratio(tmp_path: Path) -> None:
    """The first file has batch 3 only; the second runs 1 and 3, and is held to the first at 3."""
    found = bench([chain(tmp_path / "a.onnx", 2, batch=3), chain(tmp_path / "b.onnx", 2)], batches=(1, 3), rounds=1)
    assert [(t.case.batch, t.speedup is None) for t in found.files[1].timings] == [(1, True), (3, False)]


def test_a_size_that_the_model_refuses_is_named(tmp_path: Path) -> None:
    """The symbol stands for 8 only, which nothing says."""
    w = onnx.numpy_helper.from_array(np.ones((8, 2), np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    path = saved(model_of([node], [f32("x", "batch", "seq")], [f32("y", "batch", 2)], [w]), tmp_path / "a.onnx")
    (file,) = bench([path], phases=(Phase("a", 8), Phase("b", 9)), rounds=1).files
    assert [t.case.m for t in file.timings] == [8]
    assert file.left_out[0].startswith("b M=9, batch 1: ONNX Runtime refuses made-up inputs: ")
    with pytest.raises(
        InputError, match=r"a\.onnx runs with none of the sizes asked for; b M=9, batch 1: ONNX Runtime"
    ):
        bench([path], phases=(Phase("b", 9),), rounds=1)
    assert [t.case.m for t in bench([path], dims={"seq": 8}, rounds=1).files[0].timings] == [None]


def test_what_cannot_be_timed(tmp_path: Path) -> None:
    good = chain(tmp_path / "a.onnx", 1)
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    (tmp_path / "a.pt2").write_bytes(b"x")
    node = helper.make_node("NoSuchOp", ["x"], ["y"])
    saved(model_of([node], [f32("x", 1)], [f32("y", 1)]), tmp_path / "op.onnx")
    text = helper.make_tensor_value_info("x", onnx.TensorProto.BFLOAT16, [1])
    saved(model_of([helper.make_node("Shape", ["x"], ["y"])], [text], [f32("y", 1)]), tmp_path / "type.onnx")
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("gone.onnx", {}, "there is no file"),
        ("bad.onnx", {}, "not a readable ONNX model"),
        ("a.pt2", {}, "a.pt2 is not a .pt2 archive of torch.export"),
        ("op.onnx", {}, "op.onnx does not load in ONNX Runtime: .*NoSuchOp"),
        ("type.onnx", {}, "no values are made up for the input 'x'"),
        ("a.onnx", {"rounds": 2, "seconds": 1.0}, "give one"),
        ("a.onnx", {"dims": {"height": 3}}, "--dim height names no open dimension of the inputs; there are: batch"),
    ]
    for name, options, said in cases:
        with pytest.raises(InputError, match=said):
            bench([good, tmp_path / name], **options)
    with pytest.raises(InputError, match="no file to time"):
        bench([])


def test_the_public_name() -> None:
    assert qcompiler.bench is bench


# -- turns, with no runtime --------------------------------------------------------------------------------------------


class Fake(Timed):
    """Runs that take the seconds that ``script`` gives, one after the other; every turn is written down."""

    def __init__(self, name: str, script: Sequence[float], log: list[str]) -> None:
        self.path, self.log, self.script = Path(name), log, list(script)
        self.file_bytes, self.weight_bytes, self.load_s, self.before_bytes = 10, 100, 0.5, 1
        self.cases: Mapping[Case, str] = {DECODE: "c"}
        self.first_s: Mapping[Case, float] = {}
        self.left_out: list[str] = []
        self.turns = 0

    def prepare(self, phases: Sequence[Phase], batches: Sequence[int], past: int) -> None:
        raise AssertionError("prepared already")

    def turn(self, case: Case, untimed: int, count: int) -> list[float]:
        self.log.append(self.path.name)
        self.turns += 1
        return [self.script[(self.turns - 1) % len(self.script)]] * count

    def peak_bytes(self) -> int:
        return 7

    def close(self) -> None:
        raise AssertionError("the caller closes")


def race(scripts: Mapping[str, Sequence[float]], rounds: int) -> tuple[list[benching.FileTimings], list[str]]:
    log: list[str] = []
    files = [Fake(name, script, log) for name, script in scripts.items()]
    measured = benching._race(files, rounds, None, random.Random(0), benching.Silent())
    return [benching._summed(f, m, measured[0]) for f, m in zip(files, measured, strict=True)], log


def test_every_round_has_each_file_once_in_random_order() -> None:
    _, log = race({"a": [0.01], "b": [0.01], "c": [0.01]}, 20)
    rounds = [tuple(log[i : i + 3]) for i in range(3, len(log), 3)]  # the first three turns say how long one takes
    assert len(rounds) == 20
    assert {tuple(sorted(r)) for r in rounds} == {("a", "b", "c")}
    assert len(set(rounds)) > 3


def test_a_turn_has_as_many_runs_as_fit() -> None:
    found, _ = race({"slow": [1.0], "short": [0.01], "tiny": [1e-9]}, 1)
    counts = [len(f.timings[0].rounds[0]) for f in found]
    assert counts == [1, round(benching.TURN_S / 0.01), benching.MOST_RUNS]


def test_drift_falls_on_both_sides() -> None:
    """The machine gets ten times slower and back; the second file takes half the time throughout."""
    drift = [1.0, 1.0, 2.0, 10.0, 5.0, 1.0]
    found, _ = race({"a": drift, "b": [d / 2 for d in drift]}, 5)
    speedup = found[1].timings[0].speedup
    assert speedup == Spread(2.0, 2.0, 2.0, 2.0)
    (warning,) = [w for w in benching._noise(found) if "of b at" in w]
    assert warning.startswith("noisy: the rounds of b at decode M=1, batch 1 spread over")


def test_a_quiet_machine_needs_no_warning() -> None:
    found, _ = race({"a": [1.0, 1.01, 1.02], "b": [0.5]}, 6)
    assert benching._noise(found) == []
    assert found[0].peak_bytes == 7


def test_figures_of_a_timing() -> None:
    timing = CaseTiming(Case("prefill", 8, 2, None, "tokens", 16), ((1.0, 3.0), (2.0, 2.0)), 1000)
    assert timing.latency == Spread(2.0, pytest.approx(1.3), pytest.approx(2.7), 1.0)
    assert (timing.rate, timing.bandwidth, timing.noise) == (8.0, 500.0, 0.0)


def test_cores_are_at_least_one() -> None:
    import os

    assert 1 <= benching.core_count() <= (os.cpu_count() or 1)
