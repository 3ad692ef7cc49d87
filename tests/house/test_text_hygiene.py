"""No tracked file names a folder of one machine or the host of a package registry."""

import re

import pytest

from tests.house.tree import files
from tests.support import ROOT

# Written so that this file does not name them either.
MACHINE_PATH = re.compile(r"(?<![\w.~*}])/(?:work|root|opt|home)/(?=[\w.])")
REGISTRY = re.compile(
    "|".join(
        [
            r"\bpypi\.(?:org|python|nvidia)",
            r"\bpythonhosted\.org",
            r"download\.pytorch\.org",
            r"\banaconda\.org",
        ]
    )
    + r"|\w-index-url\b|--index-url\b"
)
# Data made from the text of other projects; what it says is not ours to change.
DATA = ("models/pystdlib/",)


def offences(text: str) -> list[int]:
    """The numbers of the lines that name a machine's folder or a registry's host."""
    lines = enumerate(text.splitlines(), start=1)
    return [n for n, line in lines if MACHINE_PATH.search(line) or REGISTRY.search(line)]


def test_text_is_free_of_machines_and_registries() -> None:
    bad = []
    for path in files():
        full = ROOT / path
        if path.startswith(DATA) or path == "tests/house/test_text_hygiene.py" or full.is_symlink():
            continue
        try:
            text = full.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a binary file
        bad += [f"{path}:{n}: names a machine's folder or a registry" for n in offences(text)]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "line",
    ["data = '/work/x'", "see /root/.cache", "/opt/wheels", "https://pypi.org/simple", "--index-url x"],
)
def test_an_offender_is_seen(line: str) -> None:
    assert offences(line) == [1]


@pytest.mark.parametrize("line", ["https://example.com/work/x", "a work/root/opt b", "PyPI", "$HOME/work/x"])
def test_ordinary_text_is_not(line: str) -> None:
    assert offences(line) == []
