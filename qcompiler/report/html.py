"""A graph and its report as one HTML page that needs nothing but itself: no script, style or font from outside.

Every text from a model goes through :func:`html.escape`; names in a model may hold anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from qcompiler.ir import Graph
from qcompiler.report.model import EXACT_DB, Report
from qcompiler.report.page_style import SCRIPT, STYLE
from qcompiler.report.terminal import headline
from qcompiler.report.words import (
    NONE,
    bytes_text,
    counted_bytes,
    decibel_text,
    finding_groups,
    human_bytes,
    kernel_or_reason,
    plural,
    quality_lines,
    site_groups,
    status_text,
    summed_bytes,
    timing_line,
    totals_lines,
)
from qcompiler.sites import Site
from qcompiler.text import show_op, show_type

BARS = 24
"""Groups of alike sites that the picture of bytes shows; the rest are one bar."""


def page(title: str, report: Report | None = None, graph: Graph | None = None) -> str:
    """The page as text. Parts for which there is nothing to show are left out."""
    body = [f"<h1>{escape(title)}</h1>"]
    if report is not None:
        body += [_summary(report), _findings(report), _bytes_picture(report.sites), _sites(report)]
    if graph is not None:
        body.append(_graph(graph))
    if report is not None and report.recipe.text:
        body.append(f"<details><summary>recipe</summary><pre>{escape(report.recipe.text)}</pre></details>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _summary(report: Report) -> str:
    lines = [headline(report), *totals_lines(report), *quality_lines(report), timing_line(report), *report.notes]
    badge = f'<p class="badge {report.verdict}">{report.verdict}</p>'
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return badge + "".join(f"<p>{escape(line)}</p>" for line in [*lines, versions] if line)


def _findings(report: Report) -> str:
    if not report.findings:
        return ""
    rows = []
    for group in finding_groups(report.findings):
        f = group[0]
        parts = [f"<b>{escape(f.code)}</b> {escape(f.op)}: {escape(f.message)}"]
        parts += [escape(f.reason)] if f.reason else []
        parts += [f"fix: {escape(f.fix)}"] if f.fix else []
        if len(group) > 1:
            names = "".join(f"<li>{escape(g.op)}</li>" for g in group[1:])
            parts.append(f"<details><summary>{len(group) - 1} more like it</summary><ul>{names}</ul></details>")
        rows.append(f'<li class="{f.severity}">{"<br>".join(parts)}</li>')
    return f'<h2>Findings</h2><ul class="findings">{"".join(rows)}</ul>'


def _bytes_picture(sites: Sequence[Site]) -> str:
    """One pair of bars a group of alike sites: bytes before and after, all to one scale."""
    if not sites:
        return ""
    rows = [(_group_label(g), *summed_bytes(g)) for g in site_groups([s for s in sites if not s.tied_to])]
    rows.sort(key=lambda row: -row[1])
    if rest := rows[BARS:]:
        rows[BARS:] = [(f"{len(rest)} smaller groups", sum(r[1] for r in rest), sum(r[2] for r in rest))]
    whole = max(max(before, after) for _, before, after in rows) or 1
    bars = "".join(
        f"<tr><th>{escape(label)}</th><td>{_bar(before / whole, 'before')}{_bar(after / whole, 'after')}</td>"
        f'<td class="n">{escape(bytes_text(before, after))}</td></tr>'
        for label, before, after in rows
    )
    return f'<h2>Bytes of the weights, before and after</h2><table class="bars"><tbody>{bars}</tbody></table>'


def _group_label(group: Sequence[Site]) -> str:
    s = group[0]
    return f"{len(group)} x {s.op} {s.n} x {s.k}, {s.scheme or s.status}"


def _bar(share: float, kind: str) -> str:
    return f'<div class="{kind}" style="width:{max(100 * share, 0.2):.2f}%"></div>'


def _sites(report: Report) -> str:
    if not report.sites:
        return ""
    columns = ("site", "op", "N", "K", "scheme", "before", "after", "status", "SQNR dB", "kernel")
    numeric = {"N", "K", "before", "after", "SQNR dB"}
    rows = (_site_row(s, report.target) for s in report.sites)
    find = '<p><input id="find" type="search" placeholder="part of a name" aria-label="show sites whose row has"></p>'
    return f"<h2>Sites</h2>{find}{_sortable('sites', columns, numeric, rows)}"


def _site_row(s: Site, target: str) -> str:
    before, after = counted_bytes(s)
    db = -2 * EXACT_DB if s.sqnr_db is None else s.sqnr_db  # what was not measured stands at one end
    cells = [
        _cell(f"{s.name} (tied to {s.tied_to})" if s.tied_to else s.name),
        _cell(s.op),
        _cell(str(s.n), s.n),
        _cell(str(s.k), s.k),
        _cell(s.scheme or NONE),
        _cell("shared" if s.tied_to else human_bytes(before), before),
        _cell("shared" if s.tied_to else human_bytes(after), after),
        _cell(status_text(s)),
        _cell(decibel_text(s.sqnr_db), db),
        _cell(kernel_or_reason(s, target)),
    ]
    return f'<tr class="{s.status}">{"".join(cells)}</tr>'


def _cell(text: str, key: float | None = None) -> str:
    """A cell; with ``key``, a number by which its column is sorted, flush right."""
    sort = "" if key is None else f' class="n" data-key="{key}"'
    return f"<td{sort}>{escape(text)}</td>"


def _sortable(name: str, columns: Iterable[str], numeric: Iterable[str], rows: Iterable[str]) -> str:
    heads = "".join(
        f'<th class="{"n" if c in numeric else "t"}"><button type="button">{escape(c)}</button></th>' for c in columns
    )
    head, body = f"<thead><tr>{heads}</tr></thead>", f"<tbody>{''.join(rows)}</tbody>"
    return f'<div class="wide"><table id="{name}">{head}{body}</table></div>'


def _graph(graph: Graph) -> str:
    counts = Counter(op.name for op in graph.walk())
    kinds = "".join(f"<tr>{_cell(n)}{_cell(str(c), c)}</tr>" for n, c in counts.most_common())
    ends = [f"<li>input <code>{escape(f'%{v.name} : {show_type(v.type)}')}</code></li>" for v in graph.inputs]
    ends += [f"<li>output <code>{escape(f'%{v.name} : {show_type(v.type)}')}</code></li>" for v in graph.outputs]
    held = sum(v.payload.nbytes for g in graph.graphs() for v in g.consts.values() if v.payload is not None)
    consts = sum(len(g.consts) for g in graph.graphs())
    ops = "\n".join(escape(show_op(op, locs=False)) for op in graph.walk())
    return (
        f"<h2>Graph</h2><p>{plural(counts.total(), 'op')}, {plural(consts, 'constant')} of {human_bytes(held)}</p>"
        f"<ul>{''.join(ends)}</ul>"
        f"<details><summary>ops by kind</summary>{_sortable('kinds', ('op', 'count'), ('count',), [kinds])}</details>"
        f"<details><summary>every op</summary><pre>{ops}</pre></details>"
    )
