"""Sizes, phases and settings as they are typed."""

import os
import sys
from pathlib import Path

import pytest

from qcompiler.cli_values import check_out, parse_phases, parse_settings, parse_size, see_local_modules
from qcompiler.errors import InputError
from qcompiler.target import Phase


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("512B", 512),
        ("1k", 1024),
        ("1KB", 1000),
        ("1.5 GiB", 3 << 29),
        ("12GiB", 12 << 30),
        ("12g", 12 << 30),
        ("4GB", 4 * 10**9),
        ("2TiB", 2 << 40),
        ("800M", 800 << 20),
    ],
)
def test_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "12XB", "-1G", "1e3", "12 Gi", "0", "0.2B", "nan", "1,5G", "3iB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="--max-ram"):
        parse_size(text)


def test_phases() -> None:
    assert parse_phases([]) is None
    assert parse_phases(["decode=1", "prefill=512"]) == (Phase("decode", 1), Phase("prefill", 512))


@pytest.mark.parametrize(
    "text", ["decode", "decode=", "decode=0", "=1", "decode=-1", "decode=1.5", "a b=1", "decode=1 "]
)
def test_what_is_no_phase(text: str) -> None:
    with pytest.raises(InputError, match="--phase takes name=M"):
        parse_phases([text])


def test_phase_given_twice() -> None:
    with pytest.raises(InputError, match="decode is given twice"):
        parse_phases(["decode=1", "decode=2"])


def test_settings() -> None:
    given = ["insert-qdq.weights=int4 g64 sym", "a.b='x = y'", 'c.d="z"', "e.f=", "g.h=it's"]
    assert parse_settings(given) == {
        "insert-qdq.weights": "int4 g64 sym",
        "a.b": "x = y",
        "c.d": "z",
        "e.f": "",
        "g.h": "it's",
    }


@pytest.mark.parametrize("text", ["weights=int4", "insert-qdq.weights", ".x=1", "a.=1", "a.b.c"])
def test_what_is_no_setting(text: str) -> None:
    with pytest.raises(InputError, match=r"pass\.key=value"):
        parse_settings([text])


def test_setting_given_twice() -> None:
    with pytest.raises(InputError, match=r"a\.b is given twice"):
        parse_settings(["a.b=1", "a.b=2"])


def test_out_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        check_out(tmp_path / "no" / "x.onnx", "m.onnx")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_out_in_a_folder_that_is_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(InputError, match="cannot be written"):
        check_out(tmp_path / "x.onnx", "m.onnx")


def test_out_is_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.onnx").touch()
    monkeypatch.chdir(tmp_path)
    check_out(Path("new.onnx"), "m.onnx")
    with pytest.raises(InputError, match="is the source itself"):
        check_out(tmp_path / "m.onnx", "m.onnx")


@pytest.mark.parametrize(
    ("texts", "seen"),
    [(["pkg.mod:make"], True), (["m.onnx", None], False), (["C:\\models\\m.onnx"], False), (["a/b:c"], False)],
)
def test_local_modules(texts: list[str | None], seen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["elsewhere"])
    see_local_modules(texts)
    see_local_modules(texts)
    assert sys.path == ([str(tmp_path)] if seen else []) + ["elsewhere"]
