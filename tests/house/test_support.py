"""The helpers of the tests: golden files fail when they should, absent data skips and says so."""

from pathlib import Path

import pytest

from tests.support import compare_golden, require_data

_FAILED = pytest.fail.Exception
_SKIPPED = pytest.skip.Exception


def test_golden_writes_compares_and_fails(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "x.txt"
    with pytest.raises(_FAILED, match="is missing"):
        compare_golden(file, "a", update=False)
    assert not file.exists()
    compare_golden(file, "a", update=True)
    compare_golden(file, "a\n", update=False)
    with pytest.raises(_FAILED, match=r"(?s)-a\n\+b\n.*--update-golden"):
        compare_golden(file, "b", update=False)


def test_require_data_skips_with_the_name_of_what_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILER_TEST_DATA", str(tmp_path))
    (tmp_path / "here").touch()
    assert require_data("here") == tmp_path / "here"
    assert require_data() == tmp_path
    with pytest.raises(_SKIPPED, match=r"absent: lm/none in .*QCOMPILER_TEST_DATA"):
        require_data("here", "lm/none")
    monkeypatch.setenv("QCOMPILER_TEST_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(_SKIPPED, match="the folder"):
        require_data()
