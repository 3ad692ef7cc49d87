"""The first compile of the README runs as it stands."""

import re
from pathlib import Path

import pytest

from tests.support import ROOT


def test_the_first_compile_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.split("\n")[:2] == ["accepted 2 sites fused", "(4, 512)"]
