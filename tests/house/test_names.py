"""Names that would hide one another: a definition its module, a module a package, a public name a folder."""

import ast
import sys
import tomllib
from pathlib import PurePath

from tests.house.tree import FOLDERS, files, modules
from tests.support import ROOT

MODULES = modules()


def _body(module: str) -> list[ast.stmt]:
    return ast.parse((ROOT / MODULES[module]).read_text(encoding="utf-8")).body


def test_no_definition_is_named_like_its_module() -> None:
    """A re-export of `qcompiler.passes.awq.awq` would hide the module from `import qcompiler.passes.awq`."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    bad = [
        f"{MODULES[module]}:{node.lineno}: `{node.name}` is named like its module"
        for module in MODULES
        for node in _body(module)
        if isinstance(node, definitions) and node.name == module.rpartition(".")[2]
    ]
    assert not bad, "\n".join(bad)


def test_no_module_hides_a_module() -> None:
    """`x.py` beside `x/`, two files with one import name, or names that differ in case only."""
    spelled: dict[str, list[str]] = {}
    for path in files():
        folder, _, rest = path.partition("/")
        if folder in FOLDERS and rest.endswith(".py"):
            name = f"{FOLDERS[folder]}/{rest}".removesuffix(".py").removesuffix("/__init__")
            spelled.setdefault(name.casefold(), []).append(path)
    assert not (bad := {n: p for n, p in spelled.items() if len(p) > 1}), bad


# `qcompiler.verify` is one object that is both, whatever was imported before: see tests/cli/test_public.py.
BOTH = {("qcompiler", "verify")}


def test_no_public_name_of_a_package_is_also_its_module() -> None:
    """`package.name` would be one thing or the other, depending on what was imported before."""
    bad = []
    for package, path in MODULES.items():
        if not path.endswith("__init__.py"):
            continue
        own = {m.rpartition(".")[2] for m in MODULES if m.rpartition(".")[0] == package}
        own -= {name for owner, name in BOTH if owner == package}
        for node in _body(package):
            targets = node.targets if isinstance(node, ast.Assign) else []
            if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets) and isinstance(node, ast.Assign):
                bad += [f"{path}:{node.lineno}: {n}" for n in sorted(own & set(ast.literal_eval(node.value)))]
    assert not bad, f"public names that are also modules: {bad}"


def test_nothing_at_the_top_hides_an_installed_package() -> None:
    """Tests and scripts run with the checkout first on the path."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for e in project["optional-dependencies"].values() for r in e)]
    installed = {r.split(";")[0].split(">")[0].strip().lower().replace("-", "_") for r in wanted}
    top = {PurePath(p.partition("/")[0]).stem.lower() for p in files() if p.endswith(".py")}
    assert not (top & (installed | {m.lower() for m in sys.stdlib_module_names}))
