"""What tests share: the checkout, the external test data, golden files."""

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"

FULL = bool(os.environ.get("QCOMPILER_FULL"))
"""Every model with every recipe, which takes an hour; without it each kind of model and each recipe, in minutes."""

Golden = Callable[[str, str], None]


def data_folder() -> Path:
    """Where the test data should be: `$QCOMPILER_TEST_DATA`, else `../shared/data` beside the checkout."""
    configured = os.environ.get("QCOMPILER_TEST_DATA")
    return Path(configured) if configured else ROOT.parent / "shared" / "data"


def require_data(*paths: str) -> Path:
    """The path of the first of `paths` under the test data (of the folder itself when none is given).

    All of them must be there; otherwise the running test is skipped, and the reason says what is absent and
    how to provide it. Call it inside a test or a fixture, never at import.
    """
    folder = data_folder()
    absent = [p for p in paths or (".",) if not (folder / p).exists()]
    if absent:
        names = "the folder" if not paths else ", ".join(absent)
        pytest.skip(f"test data is absent: {names} in {folder}; set QCOMPILER_TEST_DATA to a folder that has it")
    return folder / paths[0] if paths else folder


def compare_golden(path: Path, text: str, *, update: bool) -> None:
    """Fail, with a diff, unless `path` holds `text`; with `update`, write it. A missing file fails."""
    if not text.endswith("\n"):
        text += "\n"
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        return
    again = "run pytest with --update-golden, then read the change before you commit it"
    if not path.is_file():
        pytest.fail(f"golden file {path} is missing; {again}", pytrace=False)
    expected = path.read_text(encoding="utf-8")
    if expected != text:
        diff = difflib.unified_diff(
            expected.splitlines(), text.splitlines(), f"golden/{path.name}", "this run", lineterm=""
        )
        pytest.fail("\n".join([*diff, f"differs from {path}; {again}"]), pytrace=False)
