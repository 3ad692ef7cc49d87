"""What can be wrong with a request or its input: one sentence each, the right exit status, nothing at OUT."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from qcompiler import fileio
from qcompiler.cli import status
from tests.acceptance.graphs import mlp, model, weights, write

Case = Callable[[Path], list[str]]


def compile_args(source: Path | str, tmp: Path, *more: str) -> list[str]:
    return ["compile", str(source), "-o", str(tmp / "out.onnx"), "--target", "ort-cpu", *more]


def damaged(tmp: Path, keep: float) -> Path:
    path = write(tmp / "cut.onnx", mlp())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def no_external(tmp: Path) -> list[str]:
    path = write(tmp / "m.onnx", mlp(), external=True)
    (tmp / "m.onnx.data").unlink()
    return compile_args(path, tmp)


def short_external(tmp: Path) -> list[str]:
    path = write(tmp / "m.onnx", mlp(), external=True)
    data = tmp / "m.onnx.data"
    data.write_bytes(data.read_bytes()[:100])
    return compile_args(path, tmp)


def escaping_external(location: str) -> Case:
    def made(tmp: Path) -> list[str]:
        folder = tmp / "inner"
        folder.mkdir()
        path = write(folder / "m.onnx", mlp(), external=True)
        os.replace(folder / "m.onnx.data", tmp / "elsewhere.data")
        proto = onnx.load(path, load_external_data=False)
        for t in proto.graph.initializer:
            for entry in t.external_data:
                if entry.key == "location":
                    entry.value = location if location != "ABSOLUTE" else str(tmp / "elsewhere.data")
        path.write_bytes(proto.SerializeToString())
        if location == "link.data":
            (folder / "link.data").symlink_to(tmp / "elsewhere.data")
        return compile_args(path, tmp)

    return made


def zero_size(tmp: Path) -> list[str]:
    node = helper.make_node("MatMul", ["x", "w.weight"], ["y"], name="empty")
    made = model([node], [("x", ["batch", 0])], [("y", ["batch", 8])], {"w.weight": np.zeros((0, 8), np.float32)})
    return compile_args(write(tmp / "m.onnx", made), tmp)


def duplicated_names(tmp: Path) -> list[str]:
    made = mlp()
    made.graph.node.append(helper.make_node("Neg", ["x"], ["h"], name="again"))
    return compile_args(write(tmp / "m.onnx", made), tmp)


def already_quantized(tmp: Path) -> list[str]:
    nodes = [
        helper.make_node("DequantizeLinear", ["c", "s"], ["w"], name="dq"),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="mm"),
    ]
    tensors = {"c": np.ones((64, 32), np.int8), "s": np.float32(0.1)}
    made = model(nodes, [("x", ["batch", 64])], [("y", ["batch", 32])], tensors)
    return compile_args(write(tmp / "m.onnx", made), tmp)


def no_sites(tmp: Path) -> list[str]:
    made = model([helper.make_node("Neg", ["x"], ["y"], name="n")], [("x", [4])], [("y", [4])], {})
    return compile_args(write(tmp / "m.onnx", made), tmp)


def toml_recipe(text: str) -> Case:
    def made(tmp: Path) -> list[str]:
        (tmp / "r.toml").write_text(text)
        return compile_args(write(tmp / "m.onnx", mlp()), tmp, "--recipe", str(tmp / "r.toml"))

    return made


def plain(*more: str) -> Case:
    return lambda tmp: compile_args(write(tmp / "m.onnx", mlp()), tmp, *more)


def out_is(make: Callable[[Path], Path]) -> Case:
    def made(tmp: Path) -> list[str]:
        source = write(tmp / "m.onnx", mlp())
        return ["compile", str(source), "-o", str(make(tmp)), "--target", "ort-cpu"]

    return made


def folder_out(tmp: Path) -> Path:
    (tmp / "out.onnx").mkdir()
    return tmp / "out.onnx"


FAULTS: dict[str, tuple[Case, str]] = {
    "no such file": (lambda t: compile_args(t / "none.onnx", t), "there is no file"),
    "no such source": (lambda t: compile_args("nonsense", t), "is no source"),
    "truncated protobuf": (lambda t: compile_args(damaged(t, 0.5), t), "not a readable ONNX model"),
    "empty file": (lambda t: compile_args(damaged(t, 0), t), "not a readable ONNX model"),
    "missing external data": (no_external, "m.onnx.data"),
    "short external data": (short_external, "m.onnx.data"),
    "external data by ..": (escaping_external("../elsewhere.data"), "elsewhere.data"),
    "external data by absolute path": (escaping_external("ABSOLUTE"), "elsewhere.data"),
    "external data by a link that leaves": (escaping_external("link.data"), "link.data"),
    "duplicated names": (duplicated_names, "'h'"),
    "already quantized": (already_quantized, "already quantized: 'dq' is a"),
    "nothing to quantize": (no_sites, "QC402"),
    "unknown recipe": (plain("--recipe", "w5a16"), "unknown recipe 'w5a16'"),
    "unknown pass": (plain("--recipe", "normalise, nonsense"), "unknown pass 'nonsense'"),
    "unknown recipe key": (plain("--set", "insert-qdq.colour=red"), "no option 'colour'"),
    "unknown recipe pass in --set": (plain("--set", "nonsense.key=1"), "no pass 'nonsense'"),
    "unknown TOML key": (toml_recipe('[[pass]]\npass = "dce"\nspeed = 3\n'), "no option 'speed'"),
    "unknown TOML table": (toml_recipe('colour = 1\n[[pass]]\npass = "dce"\n'), "unknown key 'colour'"),
    "broken TOML": (toml_recipe("[[pass]\n"), "recipe r"),
    "broken scheme": (plain("--set", 'insert-qdq.weights="int4 g100"'), "a group size is a power of two"),
    "glob that matches nothing": (plain("--skip", "lm_head"), "'lm_head' matched nothing"),
    "unknown target": (lambda t: [*compile_args(write(t / "m.onnx", mlp()), t)[:-1], "abacus"], "unknown target"),
    "OUT is a folder": (out_is(folder_out), "is a folder"),
    "OUT in no folder": (out_is(lambda t: t / "none" / "out.onnx"), "none"),
    "OUT of another kind": (out_is(lambda t: t / "out.pt2"), ".onnx"),
    "too little memory": (plain("--max-ram", "1MiB"), "raise --max-ram"),
    "calibration data that is not there": (plain("--calibration", "data.npz"), "there is no file data.npz"),
}


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """What stands on standard error: one line, no traceback."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    return err


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_sentence_and_exit_2(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, words = FAULTS[name]
    arguments = make(tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    assert status(arguments) == 2
    assert words in sentence(capsys)
    assert {p.name for p in tmp_path.iterdir()} == before


def test_an_unwritable_out(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write anywhere, so the refusal of the file system is played.
    source = write(tmp_path / "m.onnx", mlp())
    real = Path.mkdir

    def refuse(self: Path, *a: object, **k: object) -> None:
        if ".partial-" in self.name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        real(self, *a, **k)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert status(compile_args(source, tmp_path)) == 2
    assert "cannot be written" in sentence(capsys)


def test_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "m.onnx", mlp())

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(fileio, "_sync", full)
    assert status(compile_args(source, tmp_path)) == 2
    assert "the disk is full" in sentence(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


# -- rejections: exit 1, a finding, a report, no artifact ----------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_weights_are_a_finding(bad: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = mlp()
    w = weights(64, 96)
    w[3, 5] = bad
    made.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(w, "up.weight"))
    source = write(tmp_path / "m.onnx", made)
    assert status(compile_args(source, tmp_path)) == 1
    assert "QC301 up" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "out.onnx.report.json"]


def test_a_scheme_without_a_kernel_is_a_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "m.onnx", mlp())
    assert status(compile_args(source, tmp_path, "--set", 'insert-qdq.weights="int4 g512 asym"')) == 1
    out = capsys.readouterr().out
    assert "QC202 up" in out
    assert "takes groups of 16, 32, 64, 128, 256, not 512" in out
    assert not (tmp_path / "out.onnx").exists()


def test_zero_sized_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(zero_size(tmp_path)) in (1, 2)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "empty" in captured.out + captured.err or "w" in captured.out
    assert not (tmp_path / "out.onnx").exists()
