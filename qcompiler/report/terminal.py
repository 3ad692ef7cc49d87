"""The report in a terminal: a table of sites, the sums, the findings, the verdict. Rich is imported when needed."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from qcompiler.report.model import Report
from qcompiler.report.words import (
    NONE,
    bytes_text,
    decibel_text,
    finding_groups,
    kernel_or_reason,
    plural,
    quality_lines,
    site_bytes_text,
    site_groups,
    status_text,
    summed_bytes,
    timing_line,
    totals_lines,
)
from qcompiler.sites import Site
from qcompiler.verify.findings import Finding

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

ROWS = 24
"""Tables with more rows than this show one row for each group of alike sites."""
WIDE = 110
"""Columns from which a table keeps its short cells on one line."""
PLAIN_WIDTH = 140
"""Columns where the output is no terminal: nothing there has to fit a screen."""

STYLES = {"fused": "green", "skipped": "yellow", "unfused": "bold red", "accepted": "bold green"}
STYLES |= {"rejected": "bold red", "error": "bold red", "warning": "yellow", "info": "cyan"}


Parts = Callable[[int], Sequence["RenderableType"]]
"""What to print, for a number of columns."""


def console() -> Console:
    """A console on standard output that takes text as it is: no markup, no emoji, no guessed highlights."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def show(parts: Parts) -> None:
    """Print on standard output: in colour and as wide as the terminal is, or as plain text where it is none."""
    to = console()
    if not to.is_terminal:
        sys.stdout.write(plain(*parts(PLAIN_WIDTH)))
        return
    for part in parts(to.width):
        to.print(part)


def plain(*parts: RenderableType, width: int = PLAIN_WIDTH) -> str:
    """``parts`` as text without colour, ``width`` columns wide, without spaces at the ends of lines."""
    from rich.console import Console

    out = io.StringIO()
    to = Console(file=out, width=width, color_system=None, highlight=False, markup=False, emoji=False)
    for part in parts:
        to.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    width: int,
    right: Sequence[str] = (),
    keep: Sequence[str] = (),
) -> RenderableType:
    """A table of plain cells for ``width`` columns. Columns in ``right`` are flush right; those in ``keep`` do not wrap
    and the first one has room for a name, where the width allows. No cell is ever cut."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for i, name in enumerate(columns):
        side: Literal["left", "right"] = "right" if name in right else "left"
        least = min(26, max((len(row[0]) for row in rows), default=0)) if i == 0 and width >= WIDE else None
        whole = name in keep and width >= WIDE
        out.add_column(name, justify=side, no_wrap=whole, overflow="fold", min_width=least)
    for row in rows:
        out.add_row(*(Text(cell, style=STYLES.get(cell.partition(",")[0], "")) for cell in row))
    return out


def _row(site: Site, target: str) -> tuple[str, ...]:
    name = f"{site.name} (tied to {site.tied_to})" if site.tied_to else site.name
    sizes, status, db = site_bytes_text(site), status_text(site), decibel_text(site.sqnr_db)
    return (name, kernel_or_reason(site, target), site.scheme or NONE, sizes, status, db)


def _more(sites: Sequence[Site]) -> tuple[str, ...]:
    """One row for those of a group that are not shown: how many, their bytes, the range of their noise."""
    sizes = bytes_text(*summed_bytes(sites))
    noise = sorted(s.sqnr_db for s in sites if s.sqnr_db is not None)
    ends = list(dict.fromkeys(map(decibel_text, noise[:1] + noise[-1:])))
    return (f"... and {len(sites)} more like it", "", "", sizes, "", " to ".join(ends))


def _importance(group: Sequence[Site]) -> tuple[int, int]:
    rank = {"unfused": 0, "skipped": 1}.get(group[0].status, 2)
    return rank, -sum(s.before for s in group)


def site_rows(sites: Sequence[Site], target: str, limit: int = ROWS) -> list[tuple[str, ...]]:
    """The rows of the table. Past ``limit`` sites, one row a group and a line for the rest of it; past ``limit``
    groups, those that did not fuse and the largest."""
    if len(sites) <= limit:
        return [_row(s, target) for s in sites]
    groups = site_groups(sites)
    kept = sorted(groups, key=_importance)[:limit]
    rows = []
    for group in groups:
        if not any(group is k for k in kept):
            continue
        rows.append(_row(group[0], target))
        rows += [_row(group[1], target)] if len(group) == 2 else [_more(group[1:])] if len(group) > 2 else []
    if left := len(sites) - sum(map(len, kept)):
        rest = f"... and {left} more in {len(groups) - len(kept)} smaller groups; --json lists every site"
        rows.append((rest, "", "", "", "", ""))
    return rows


def site_table(sites: Sequence[Site], target: str, width: int, *, noise: bool = True) -> RenderableType:
    """The table of sites; ``noise=False`` leaves out the column that is known only once weights were quantized."""
    columns = ("site", "kernel", "scheme", "weight bytes", "status", "SQNR dB")[: 6 if noise else 5]
    rows = [row[: len(columns)] for row in site_rows(sites, target)]
    return table(columns, rows, width=width, right=("weight bytes", "SQNR dB"), keep=columns[2:])


def finding_text(group: Sequence[Finding]) -> RenderableType:
    """One finding with its reason and fix, and how many more are like it."""
    from rich.text import Text

    f = group[0]
    out = Text.assemble((f.severity, STYLES[f.severity]), f" {f.code} {f.op}: {f.message}")
    out.append(f"\n    {f.reason}" if f.reason else "")
    out.append(f"\n    fix: {f.fix}" if f.fix else "")
    if len(group) > 1:
        out.append(f"\n    ... and {len(group) - 1} more like it: {_some([g.op for g in group[1:]])}")
    return out


def _some(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def headline(report: Report) -> str:
    """``model.onnx -> out.onnx  w4a16 for ort-cpu (decode M=1, prefill M=512)``; what is not known is left out."""
    source = report.source.path or report.source.kind
    files = f"{source} -> {report.artifact.path}" if report.artifact else source
    recipe = f"{report.recipe.name or 'a recipe'} for " if report.recipe.text or report.recipe.name else ""
    phases = ", ".join(f"{name} M={m}" for name, m in report.phases.items())
    return f"{files}: {recipe}{report.target}" + (f" ({phases})" if phases else "")


def report_parts(report: Report, width: int = PLAIN_WIDTH) -> list[RenderableType]:
    """Everything that is printed for a report, in order; the verdict is the last line."""
    from rich.text import Text

    parts: list[RenderableType] = [Text(headline(report)), Text("")]
    if report.sites:
        parts += [site_table(report.sites, report.target, width), Text("")]
    parts += [Text(line) for line in totals_lines(report) + quality_lines(report)]
    parts += [Text(line) for line in [timing_line(report)] if line]
    parts += [Text(f"note: {note}") for note in report.notes]
    if report.findings:
        parts.append(Text(""))
        parts += [finding_text(group) for group in finding_groups(report.findings)]
        codes = sorted({f.code for f in report.findings})
        parts.append(Text(f"more about a finding: qcompiler explain {codes[0]}", style="dim"))
    errors = sum(f.severity == "error" for f in report.findings)
    why = f", {plural(errors, 'error')}" if errors else ""
    parts.append(Text(""))
    parts.append(Text.assemble("verdict: ", (report.verdict, STYLES[report.verdict]), why))
    return parts


def report_text(report: Report, *, width: int = PLAIN_WIDTH) -> str:
    """The report as plain text, ``width`` columns wide."""
    return plain(*report_parts(report, width), width=width)


def print_report(report: Report) -> None:
    """Print the report on standard output."""
    show(lambda width: report_parts(report, width))
