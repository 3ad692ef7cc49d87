"""Each finding code has a page, complete and in the same order, and there is no page without a code."""

import re

import pytest

from qcompiler.errors import InputError
from qcompiler.verify.explain import explanation
from qcompiler.verify.findings import CODES
from tests.cli.conftest import Run
from tests.support import ROOT

FOLDER = ROOT / "qcompiler" / "verify" / "explain"
HEADINGS = ["What", "Why it costs", "How to fix", "Example"]


def test_one_page_a_code() -> None:
    assert {p.name for p in FOLDER.iterdir()} == {f"{code}.md" for code in CODES}


@pytest.mark.parametrize("code", CODES)
def test_page(code: str) -> None:
    text = explanation(code)
    assert text.splitlines()[0] == f"# {code}: {CODES[code]}"
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    assert parts[1::2] == HEADINGS
    assert all(len(part.strip()) > 60 for part in parts[2::2]), "a part of this page says next to nothing"
    assert max(map(len, text.splitlines())) <= 120
    assert text.isascii()


@pytest.mark.parametrize("code", CODES)
def test_page_names_only_what_there_is(code: str) -> None:
    """Commands, options of them, and other codes that a page mentions exist."""
    text = explanation(code)
    assert set(re.findall(r"QC\d{3}", text)) <= set(CODES)
    commands = set(re.findall(r"`qcompiler (\w+)", text))
    assert commands <= {"compile", "verify", "plan", "inspect", "run", "recipes", "targets", "kernels", "explain"}
    options = set(re.findall(r"(?<![\w-])--[\w-]+", text))
    assert options <= {"--set", "--skip", "--target", "--phase", "--no-run", "--check"}


@pytest.mark.parametrize("spelled", ["QC104", "qc104", " Qc104 ", "104"])
def test_spelling(spelled: str) -> None:
    assert explanation(spelled) == explanation("QC104")


@pytest.mark.parametrize("code", ["", "QC999", "QC1", "../QC101", "lm_head"])
def test_unknown_code(code: str) -> None:
    with pytest.raises(InputError, match=r"known: QC101, QC102"):
        explanation(code)


def test_command(run: Run) -> None:
    assert run("explain", "qc101") == (0, explanation("QC101"), "")
    status, out, err = run("explain", "QC999")
    assert (status, out) == (2, "")
    assert "no finding code 'QC999'; known: QC101" in err


def test_settings_on_pages_are_settings() -> None:
    """What a page tells users to type after --set names an option of a pass and a value that it takes."""
    from qcompiler import recipe

    found = 0
    for code in CODES:
        for key, value in re.findall(r"--set ([\w.-]+)='([^']*)'", explanation(code)):
            assert recipe.adjusted(recipe.load("w4a16"), {key: value}).text
            found += 1
    assert found >= 4
