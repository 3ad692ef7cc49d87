"""`import qcompiler` and `qcompiler --help` answer at once: they load no heavy package."""

import json
import subprocess
import sys

HEAVY = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnx_graphsurgeon",
    "onnxscript",
    "triton",
    "transformers",
    "networkx",
)

_REPORT = """
import json, sys
{body}
heavy = set(sys.argv[1].split(","))
print()
print(json.dumps(sorted(heavy.intersection(sys.modules))))
"""
_HELP = """
sys_argv, sys.argv = sys.argv, ["qcompiler", "--help"]
from qcompiler.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
sys.argv = sys_argv
"""


def _loaded(body: str, *packages: str) -> list[str]:
    """Which of `packages` a fresh interpreter has loaded after `body`."""
    command = [sys.executable, "-c", _REPORT.format(body=body), ",".join(packages)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded: list[str] = json.loads(done.stdout.splitlines()[-1])
    return loaded


def test_a_loaded_package_is_seen() -> None:
    assert _loaded("import numpy", "numpy", "torch") == ["numpy"]


def test_import_loads_nothing_heavy() -> None:
    assert _loaded("import qcompiler", "numpy", "ml_dtypes", "safetensors", "rich", "typer", *HEAVY) == []


def test_help_loads_nothing_heavy() -> None:
    assert _loaded(_HELP, *HEAVY) == []
