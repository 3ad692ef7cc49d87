"""The reports of what torch.compile compiled in this process."""

from __future__ import annotations

from collections import deque

from qcompiler.report.model import Report

_reports: deque[Report] = deque(maxlen=256)


def compiled_reports() -> list[Report]:
    """One report for each graph that ``torch.compile(backend="qcompiler")`` found weights in, in order, the last 256.

    A recompilation adds a report. A graph without weights (what a graph break leaves between layers) has none.
    """
    return list(_reports)


def keep(report: Report) -> None:
    """Add ``report`` to those that :func:`compiled_reports` gives."""
    _reports.append(report)
