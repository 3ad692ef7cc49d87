"""Floors: a module imports lower floors or its own folder; floors 0-3 know no runtime. The offender is named.

Imports are read with `ast`, also those inside functions and under `TYPE_CHECKING`: a pass that imports torch
lazily is still a pass that knows torch.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import networkx as nx
import pytest

from tests.house.tree import modules
from tests.support import ROOT

# Module -> floor. "x.*" stands for everything inside the folder x that has no line of its own.
FLOORS: dict[str, int] = {
    "qcompiler.dtypes": 0,
    "qcompiler.errors": 0,
    "qcompiler.fileio": 1,
    "qcompiler.ir": 0,
    "qcompiler.operators": 0,
    "qcompiler.reader": 0,
    "qcompiler.payload": 0,
    "qcompiler.scheme": 0,
    "qcompiler.text": 0,
    "qcompiler.types": 0,
    "qcompiler.numerics": 1,
    "qcompiler.integer_numerics": 1,
    "qcompiler.tiling": 1,
    "qcompiler.rtn": 1,
    "qcompiler.smoothing": 1,
    "qcompiler.migration": 1,
    "qcompiler.clipping": 1,
    "qcompiler.float_codes": 1,
    "qcompiler.rewrite": 1,
    "qcompiler.sites": 1,
    "qcompiler.spec": 1,
    "qcompiler.op_spec": 1,
    "qcompiler.integer_spec": 1,
    "qcompiler.target": 1,
    "qcompiler.speeds": 1,
    "qcompiler.requests": 1,
    "qcompiler.movement": 1,
    "qcompiler.functional": 1,
    "qcompiler.pairs": 1,
    "qcompiler.placement": 1,
    "qcompiler.products": 1,
    "qcompiler.shape_values": 1,
    "qcompiler.views": 1,
    "qcompiler.conv_views": 1,
    "qcompiler.norm_views": 1,
    "qcompiler.weights": 1,
    "qcompiler.scale_floor": 1,
    "qcompiler.canonical": 1,
    "qcompiler.channels": 1,
    "qcompiler.balancing": 1,
    "qcompiler.bias_correction": 1,
    "qcompiler.memory": 1,
    "qcompiler.subgraph": 1,
    "qcompiler.metrics": 1,
    "qcompiler.agreement": 1,
    "qcompiler.standard_places": 1,
    "qcompiler.replay": 2,
    "qcompiler.pair_bounds": 2,
    "qcompiler.comparing": 2,
    "qcompiler.checking": 2,
    "qcompiler.debug": 2,
    "qcompiler.pipeline": 2,
    "qcompiler.spellings": 2,
    "qcompiler.spellings.*": 2,
    # A folder that spans floors: its __init__ has the lowest, since importing any module of it runs that.
    # Findings are records: the pipeline collects them, so they stand below it.
    "qcompiler.verify": 1,
    "qcompiler.verify.findings": 1,
    "qcompiler.verify.op_kinds": 1,
    "qcompiler.verify.torch_words": 1,
    "qcompiler.verify.flow": 3,
    "qcompiler.verify.spelled": 3,
    "qcompiler.verify.evidence": 2,
    "qcompiler.verify.explain": 2,
    "qcompiler.verify.static": 3,
    "qcompiler.verify.runtime": 4,
    "qcompiler.calibrate": 2,
    "qcompiler.calibrate.histogram": 2,
    "qcompiler.calibrate.ranges": 2,
    "qcompiler.calibrate.observers": 2,
    "qcompiler.calibrate.holdback": 2,
    "qcompiler.calibrate.data": 2,
    "qcompiler.calibrate.batching": 2,
    "qcompiler.calibrate.forms": 2,
    "qcompiler.calibrate.objects": 2,
    "qcompiler.calibrate.cache": 2,
    "qcompiler.calibrate.calibrator": 2,
    "qcompiler.calibrate.tokens": 4,
    "qcompiler.passes": 3,
    "qcompiler.passes.*": 3,
    "qcompiler.backends": 4,
    "qcompiler.backends.*": 4,
    # What torch calls: a way in, as the command line is.
    "qcompiler.backends.torch.jit.entry": 6,
    "qcompiler.backends.torch.jit.compiling": 6,
    "qcompiler.backends.torch.jit.running": 6,
    "qcompiler.backends.torch.jit.growing": 6,
    "qcompiler.backends.torch.jit.options": 5,
    # A recipe names passes, so it stands above them.
    "qcompiler.recipe": 4,
    "qcompiler.checkpoints": 4,
    "qcompiler.checkpoints.*": 4,
    # The report is a record that backends fill; how it is shown stands above them.
    "qcompiler.report": 3,
    "qcompiler.report.model": 3,
    "qcompiler.report.sums": 3,
    "qcompiler.report.*": 4,
    "qcompiler.models": 5,
    "qcompiler.models.*": 5,
    "qcompiler": 5,
    "qcompiler.__main__": 5,
    "qcompiler.api": 5,
    "qcompiler.benching": 5,
    "qcompiler.evaluating": 5,
    "qcompiler.readings": 5,
    "qcompiler.cli": 5,
    "qcompiler.cli_measure": 5,
    "qcompiler.cli_options": 5,
    "qcompiler.cli_session": 5,
    "qcompiler.cli_tables": 5,
    "qcompiler.cli_values": 5,
    "qcompiler.driver": 5,
    "qcompiler.planning": 5,
    # The demo shows the whole house, the models beside it too.
    "qcompiler.demo": 6,
}
CORE_FLOOR = 3
CORE_PACKAGES = frozenset({"numpy", "networkx", "ml_dtypes"})
MODELS_PACKAGES = frozenset({"torch", "numpy", "safetensors"})
STDLIB = sys.stdlib_module_names


@dataclass(frozen=True)
class Import:
    """One imported name: where it stands, what it asks for, and whether only a type checker sees it."""

    module: str
    line: int
    target: str
    level: int = 0
    typing_only: bool = False


def floor_of(module: str) -> int | None:
    """The floor of a module, from its own line or that of the nearest folder; None when there is none."""
    if module in FLOORS:
        return FLOORS[module]
    folder = module
    while "." in folder:
        folder = folder.rpartition(".")[0]
        if f"{folder}.*" in FLOORS:
            return FLOORS[f"{folder}.*"]
    return None


def room_of(module: str) -> str:
    """The folder under `qcompiler` that a module stands in; modules at the top share one."""
    parts = module.split(".")
    is_folder = len(parts) == 2 and (f"{module}.*" in FLOORS or any(m.startswith(f"{module}.") for m in FLOORS))
    return parts[1] if len(parts) > 2 or is_folder else ""


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports_of(module: str, source: str, known: Mapping[str, object]) -> Iterator[Import]:
    """Every import in `source`; `from a import b` asks for the module a.b where there is one, else for a."""
    tree = ast.parse(source)
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and _is_type_checking(node.test)
        for branch in node.body
        for inner in ast.walk(branch)
    }
    for node in ast.walk(tree):
        hidden = id(node) in typing_only
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, node.lineno, alias.name, 0, hidden)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            for target in {n if (n := f"{base}.{a.name}") in known else base for a in node.names}:
                yield Import(module, node.lineno, target, node.level, hidden)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield Import(module, node.lineno, node.args[0].value, 0, hidden)


def why_not(imported: Import) -> str | None:
    """The reason for which an import is refused; None when it may stand."""
    if imported.level:
        return "relative import: write it from `qcompiler` on"
    package = imported.target.partition(".")[0]
    if package in {"passes", "backends", "models"}:
        return f"write `qcompiler.{imported.target}`: the folder's own name would load the module twice"
    floor = floor_of(imported.module)
    if floor is None:
        return None  # reported once, by test_every_module_has_a_floor
    in_models = room_of(imported.module) == "models"
    if package != "qcompiler":
        allowed = MODELS_PACKAGES if in_models else CORE_PACKAGES
        if package in STDLIB or package in allowed or (floor > CORE_FLOOR and not in_models):
            return None
        who = "models" if in_models else f"floor {floor}"
        return f"{who} may not import {package}, only {', '.join(sorted(allowed))}"
    same_room = room_of(imported.target) == room_of(imported.module)
    if in_models:
        return None if same_room else f"models stand alone and may not import {imported.target}"
    target_floor = floor_of(imported.target)
    if target_floor is None or target_floor < floor or (target_floor == floor and same_room):
        return None
    where = "another folder on its own floor" if target_floor == floor else f"floor {target_floor}"
    return f"floor {floor} may not import {imported.target} ({where})"


def offences(sources: Mapping[str, str], paths: Mapping[str, str]) -> list[str]:
    """`file:line: reason` for each import that breaks a floor."""
    found = (i for module, text in sources.items() for i in imports_of(module, text, sources))
    return sorted({f"{paths[i.module]}:{i.line}: {reason}" for i in found if (reason := why_not(i)) is not None})


def cycles(sources: Mapping[str, str], paths: Mapping[str, str]) -> list[str]:
    """Each group of modules that import one another, with the lines; typing-only imports do not count."""
    lines: dict[tuple[str, str], int] = {}
    for module, text in sources.items():
        for i in imports_of(module, text, sources):
            if i.target in sources and i.target != module and not i.typing_only:
                lines.setdefault((module, i.target), i.line)
    graph = nx.DiGraph(list(lines))
    return sorted(
        "; ".join(sorted(f"{paths[a]}:{n} imports {b}" for (a, b), n in lines.items() if {a, b} <= group))
        for group in nx.strongly_connected_components(graph)
        if len(group) > 1
    )


PATHS = modules()
TABLE = "tests/house/test_floors.py"


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {module: (ROOT / path).read_text(encoding="utf-8") for module, path in PATHS.items()}


def test_every_module_has_a_floor() -> None:
    unknown = [f"{path}: give this module a floor in {TABLE}" for m, path in PATHS.items() if floor_of(m) is None]
    assert not unknown, "\n".join(unknown)


def test_imports_stay_on_their_floor(sources: dict[str, str]) -> None:
    assert not (bad := offences(sources, PATHS)), "\n" + "\n".join(bad)


def test_imports_are_acyclic(sources: dict[str, str]) -> None:
    assert not (bad := cycles(sources, PATHS)), "\n" + "\n".join(bad)


PLANTED = [
    ("qcompiler.ir", "def f():\n    import torch", 2, "floor 0 may not import torch"),
    ("qcompiler.passes.x", "import onnx_graphsurgeon as gs", 1, "floor 3 may not import onnx_graphsurgeon"),
    ("qcompiler.target", "import importlib\nimportlib.import_module('triton')", 2, "may not import triton"),
    ("qcompiler.ir", "from qcompiler import spec", 1, "may not import qcompiler.spec (floor 1)"),
    (
        "qcompiler.passes.x",
        "from qcompiler.backends.onnx import emit",
        1,
        "may not import qcompiler.backends",
    ),
    ("qcompiler.report.html", "import qcompiler.checkpoints.gptq", 1, "another folder on its own floor"),
    ("qcompiler.text", "from . import ir", 1, "relative import"),
    ("qcompiler.api", "from passes import x", 1, "write `qcompiler.passes`"),
    ("qcompiler.models.net", "from qcompiler import ir", 1, "models stand alone"),
    ("qcompiler.models.net", "import onnx", 1, "models may not import onnx"),
    ("qcompiler.pipeline", "from qcompiler import Error", 1, "may not import qcompiler (floor 5)"),
]


@pytest.mark.parametrize(("module", "text", "line", "reason"), PLANTED)
def test_an_offender_is_named(module: str, text: str, line: int, reason: str) -> None:
    known = {"qcompiler.spec": "", "qcompiler.ir": "", module: text}
    (found,) = offences(known, {m: f"{m}.py" for m in known})
    assert found.startswith(f"{module}.py:{line}: ")
    assert reason in found


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("qcompiler.text", "from qcompiler.ir import Graph"),
        ("qcompiler.passes.x", "from qcompiler.passes.y import z\nimport numpy as np\nimport dataclasses"),
        ("qcompiler.backends.torch.emit", "import torch\nfrom qcompiler.backends.triton import kernels"),
        ("qcompiler.models.net", "from qcompiler.models.decoder import Decoder\nimport torch"),
        ("qcompiler.cli", "import rich, typer\nfrom qcompiler import api"),
    ],
)
def test_what_is_allowed_passes(module: str, text: str) -> None:
    assert offences({module: text, "qcompiler.api": ""}, {module: "x.py"}) == []


def test_a_cycle_is_named() -> None:
    texts = {
        "qcompiler.ir": "def f():\n    from qcompiler.text import show",
        "qcompiler.text": "from qcompiler import ir",
        "qcompiler.scheme": "if TYPE_CHECKING:\n    from qcompiler.dtypes import D",
        "qcompiler.dtypes": "from qcompiler import scheme",
    }
    found = cycles(texts, {m: f"{m.rpartition('.')[2]}.py" for m in texts})
    assert found == ["ir.py:2 imports qcompiler.text; text.py:1 imports qcompiler.ir"]
