"""The files of the checkout, as the house tests see them."""

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.support import ROOT

# Folder at the top of the repository -> its place in the package.
FOLDERS = {
    "passes": "qcompiler/passes",
    "backends": "qcompiler/backends",
    "models": "qcompiler/models",
    "qcompiler": "qcompiler",
}
LINKS = ("qcompiler/passes", "qcompiler/backends", "qcompiler/models")
_NOT_SOURCE = {"__pycache__", "build", "dist", "out", "node_modules"}


def files() -> list[str]:
    """Paths, relative to the checkout, of what git tracks or would track; links are listed, not followed.

    Where git cannot answer (an unpacked archive, a checkout of another user) the folders are walked instead.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        paths: Iterable[str] = _walk()
    else:
        paths = listing.split("\0")
    return sorted({p for p in paths if p and os.path.lexists(ROOT / p)})


def _walk() -> Iterable[str]:
    for folder, subfolders, names in os.walk(ROOT):
        here = Path(folder)
        links = [s for s in subfolders if (here / s).is_symlink()]
        subfolders[:] = [
            s
            for s in subfolders
            if s not in links and s not in _NOT_SOURCE and not s.startswith(".") and not s.endswith(".egg-info")
        ]
        for name in [*names, *links]:
            yield (here / name).relative_to(ROOT).as_posix()


def packed_name(path: str) -> str | None:
    """Where the file at `path` stands in the wheel; None for a link or a file outside the package."""
    folder, _, rest = path.partition("/")
    if path in LINKS or not rest or folder not in FOLDERS:
        return None
    return f"{FOLDERS[folder]}/{rest}"


def module_name(packed: str) -> str:
    """`qcompiler/passes/__init__.py` -> `qcompiler.passes`."""
    return packed.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def modules() -> dict[str, str]:
    """Import name -> path, relative to the checkout, of every module of the package."""
    return {module_name(name): p for p in files() if p.endswith(".py") and (name := packed_name(p)) is not None}
