"""The public surface of the package: its names, that they come late, and that `verify` is one object."""

import subprocess
import sys
import tomllib

import pytest

import qcompiler
from tests.support import ROOT

PUBLIC = {
    "Artifact",
    "CalibrationError",
    "Error",
    "InputError",
    "Plan",
    "RecipeError",
    "RejectedError",
    "Report",
    "__version__",
    "bench",
    "compiled_reports",
    "compile",
    "evaluate",
    "plan",
    "verify",
}


def test_public_names() -> None:
    assert set(qcompiler.__all__) == PUBLIC
    assert set(dir(qcompiler)) >= PUBLIC
    for name in PUBLIC:
        assert getattr(qcompiler, name) is not None


def test_errors_are_errors_of_one_kind() -> None:
    for name in ("InputError", "RecipeError", "RejectedError", "CalibrationError"):
        assert issubclass(getattr(qcompiler, name), qcompiler.Error)


def test_version_is_the_package_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == qcompiler.__version__


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'comple'"):
        qcompiler.comple  # noqa: B018  # the access is what is tested


def test_functions_are_those_of_the_api() -> None:
    from qcompiler import api

    assert qcompiler.compile is api.compile
    assert qcompiler.plan is api.plan


@pytest.mark.parametrize(
    "first",
    ["", "import qcompiler.verify.findings", "from qcompiler import api", "from qcompiler.verify import evidence"],
)
def test_verify_is_callable_and_a_package_whatever_comes_first(first: str) -> None:
    """The import system binds the folder `verify` to the package; the function of that name must survive it."""
    script = f"""
{first}
import qcompiler
from qcompiler import verify
from qcompiler.verify.findings import CODES
import qcompiler.verify.findings as findings
assert verify is qcompiler.verify and findings.CODES is CODES
from qcompiler import api
api.verify = lambda *given, **options: (given, options)
assert qcompiler.verify("x.onnx", target="t") == (("x.onnx",), {{"target": "t"}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
