"""The finder that waits for torch: it breaks nothing, whatever happens behind it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from qcompiler import operators


def _run(body: str) -> str:
    command = [sys.executable, "-c", body]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


_FAILING = """
import sys, warnings, importlib.util
import qcompiler
from qcompiler import operators
assert "torch" not in sys.modules
assert importlib.util.find_spec("torch").loader.get_filename("torch").endswith("__init__.py")
operators.HOMES = ("qcompiler.no_such_module",)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import torch
print([str(w.message) for w in seen if "qcompiler" in str(w.message)])
print(type(torch.__spec__.loader).__name__, type(torch.__loader__).__name__, torch.ones(2).sum().item())
print(any(type(f).__module__ == "qcompiler.operators" for f in sys.meta_path))
"""


def test_a_fault_of_ours_leaves_torch_alone() -> None:
    said, loaders, waiting = _run(_FAILING).splitlines()
    assert "cannot register its operators with this torch (ModuleNotFoundError" in said
    assert loaders == "SourceFileLoader SourceFileLoader 2.0"
    assert waiting == "False"


def test_other_modules_are_none_of_its_business(monkeypatch: pytest.MonkeyPatch) -> None:
    finder = operators._Finder()
    assert finder.find_spec("torchvision", None) is None
    monkeypatch.setattr(sys, "meta_path", [finder])
    assert finder.find_spec("torch", None) is None  # nobody else finds it
    monkeypatch.undo()
    assert importlib.util.find_spec("json") is not None


_FAMILY_FIRST = """
import warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import qcompiler.backends.triton.weight_only
    import torch
print([str(w.message) for w in seen if "qcompiler" in str(w.message)])
print(torch.ops.qcompiler.wn_linear.default.name(), torch.ops.qcompiler.qlinear.default.name())
"""


def test_a_module_of_operators_may_be_what_imports_torch() -> None:
    assert _run(_FAMILY_FIRST).splitlines() == ["[]", "qcompiler::wn_linear qcompiler::qlinear"]
