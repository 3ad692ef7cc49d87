"""What is packed is what is in the tree: every file once, with links or without, installed or editable."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from tests.house.tree import LINKS, files, packed_name
from tests.support import ROOT


def _expected() -> list[str]:
    return sorted(name for p in files() if (name := packed_name(p)) is not None)


def _copy(to: Path, *, links: bool) -> Path:
    """A clean copy of the checkout: what git knows or would know, and nothing that a build left behind."""
    for path in files():
        if path in LINKS and not links:
            continue
        target = to / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / path).is_symlink():
            target.symlink_to(os.readlink(ROOT / path))
        else:
            shutil.copyfile(ROOT / path, target)
    return to


def _run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_packages_listed_are_the_packages_in_the_tree() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    in_tree = {str(Path(name).parent).replace(os.sep, ".") for name in _expected() if name.endswith(".py")}
    assert sorted(listed) == sorted(in_tree), "[tool.setuptools] packages in pyproject.toml and the folders differ"
    bare = sorted(p for p in in_tree if f"{p.replace('.', '/')}/__init__.py" not in _expected())
    assert not bare, f"folders with modules and no __init__.py: {bare}"


def test_links_lead_to_the_folders() -> None:
    for link in LINKS:
        assert os.path.islink(ROOT / link), f"{link} is not a link: check out with symlinks enabled"
        assert os.readlink(ROOT / link) == f"../{Path(link).name}"


@pytest.mark.parametrize("links", [True, False], ids=["with links", "without links"])
def test_wheel_holds_every_file_once(tmp_path: Path, links: bool) -> None:
    source = _copy(tmp_path / "source", links=links)
    out = tmp_path / "wheel"
    _run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out), cwd=source)
    (wheel,) = out.glob("*.whl")
    members = Counter(n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n)
    expected = Counter(_expected())
    assert members == expected, (
        f"not packed: {sorted(expected - members)}; doubled or unexpected: {sorted(members - expected)}; "
        "see [tool.setuptools] packages and package-data in pyproject.toml"
    )


_EDITABLE = """
import sys
from setuptools import build_meta
print(build_meta.build_editable(sys.argv[1]))
"""
_IMPORT = """
import importlib, site, sys
site.addsitedir(sys.argv[1])
sys.path.append(sys.argv[2])
for name in sys.argv[3:]:
    print(importlib.import_module(name).__file__)
"""


@pytest.mark.parametrize("links", [True, False], ids=["with links", "without links"])
def test_editable_install_sees_a_new_file_at_once(tmp_path: Path, links: bool) -> None:
    source = _copy(tmp_path / "source", links=links)
    out = tmp_path / "wheel"
    out.mkdir()
    wheel = _run(sys.executable, "-c", _EDITABLE, str(out), cwd=source).split()[-1]
    zipfile.ZipFile(out / wheel).extractall(tmp_path / "site")
    for folder in ("passes", "backends/onnx", "qcompiler"):
        (source / folder / "just_written.py").write_text("")
    names = [f"qcompiler.{m}just_written" for m in ("passes.", "backends.onnx.", "")]
    # Isolated and without `site`: the editable install that runs this test must not answer for the copy.
    found = _run(
        *(sys.executable, "-I", "-S", "-c", _IMPORT),
        *(str(tmp_path / "site"), sysconfig.get_path("purelib"), *names),
        cwd=tmp_path,
    ).split()
    assert len(found) == len(names)
    assert all(Path(f).is_relative_to(source) for f in found), found
