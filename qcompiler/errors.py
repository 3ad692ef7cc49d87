"""What qcompiler raises. The command line maps these to exit statuses: 2 for the caller's faults, 1 for a rejection."""

from __future__ import annotations

from typing import Any


class Error(Exception):
    """Base of everything qcompiler raises on purpose; its text is one sentence that says what to do."""


class InputError(Error):
    """The model, file or argument is at fault (exit status 2)."""


class BadWeights(InputError):
    """Weights hold NaN or infinity, ``count`` of them; the Python interface reports it as finding QC301."""

    def __init__(self, count: int, total: int, where: str = "the weights") -> None:
        super().__init__(
            f"{where}: {count} of {total} values are NaN or infinite and have no code; "
            "repair the model, or skip this site"
        )
        self.count, self.total = count, total


class RecipeError(Error):
    """The recipe is at fault: unknown pass, unknown key, a glob that matched nothing (exit status 2)."""


class CalibrationError(Error):
    """Calibration data is missing, malformed or insufficient (exit status 2)."""


class StructureError(Error):
    """A graph broke the rules of the IR: a bug of the pass that ran last (exit status 3)."""


class RejectedError(Error):
    """The verifier refused the result (exit status 1). ``report`` is the full report."""

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report
