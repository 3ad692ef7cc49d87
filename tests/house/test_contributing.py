"""The pass that CONTRIBUTING.md writes in 10 minutes works as it says."""

import doctest

from tests.support import ROOT


def test_the_page_runs() -> None:
    result = doctest.testfile(str(ROOT / "CONTRIBUTING.md"), module_relative=False)
    assert result.attempted > 8
    assert result.failed == 0
