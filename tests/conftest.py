"""Options and fixtures for every test."""

import os
from pathlib import Path

import pytest

from tests.support import GOLDEN, Golden, compare_golden, require_data

os.environ["QCOMPILER_CACHE"] = "off"  # also of the processes that tests start: no test reads what another run left


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden files instead of comparing with them"
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """`golden(name, text)`: compare `text` with tests/golden/<name>; `--update-golden` rewrites the file."""
    update = bool(request.config.getoption("--update-golden"))
    return lambda name, text: compare_golden(GOLDEN / name, text, update=update)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of the external test data; where it is absent, the test is skipped with the reason."""
    return require_data()
