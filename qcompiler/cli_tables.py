"""What the command line prints besides reports: plans, graphs, targets, kernels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompiler.fileio import Staged
from qcompiler.report.html import page
from qcompiler.report.terminal import finding_text, print_report, show, site_table, table
from qcompiler.report.words import NONE, bytes_text, finding_groups, human_bytes, plural
from qcompiler.sites import Site, Status
from qcompiler.target import KernelRow
from qcompiler.text import show_type

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qcompiler.api import Inspection, TargetInfo
    from qcompiler.backends.triton.proving import KernelFigures, Proof
    from qcompiler.ir import Graph
    from qcompiler.planning import Plan, PlannedSite


def print_plan(plan: Plan) -> None:
    """The plan as a table, then why the kernels that were not chosen decline."""
    show(lambda width: plan_parts(plan, width))


def plan_parts(plan: Plan, width: int) -> list[RenderableType]:
    from rich.text import Text

    sites = list(map(_as_site, plan.sites))
    parts: list[RenderableType] = [site_table(sites, plan.target, width, noise=False)]
    before = sum(s.before for s in sites)
    after = sum(sum(s.bytes.values()) or s.before for s in sites)
    counts = Counter(s.status for s in sites)
    sums = ", ".join(f"{counts[status]} {status}" for status in ("fused", "skipped", "unfused"))
    lines = ["", f"{plural(len(sites), 'site')}: {sums}; weights {bytes_text(before, after)}"]
    lines += [f"predicted peak memory {human_bytes(plan.peak_bytes)}"]
    parts += map(Text, lines + declined_lines(plan))
    if plan.findings:
        parts += [Text(""), *(finding_text(group) for group in finding_groups(plan.findings))]
    verdict = "accepted" if plan.accepted else "rejected"
    parts.append(Text(f"\nverdict before any weight is read: {verdict}"))
    return parts


def _as_site(s: PlannedSite) -> Site:
    status: Status = "fused" if s.status == "fused" else "skipped" if s.status == "skipped" else "unfused"
    return Site(s.name, s.op, s.n, s.k, s.before, s.scheme, status, s.reason, s.kernel, "planned", s.bytes)


def declined_lines(plan: Plan) -> list[str]:
    """Each kernel that was not chosen, with its reasons and for how many sites they hold."""
    reasons: Counter[tuple[str, str]] = Counter()
    for site in plan.sites:
        for kernel, why in site.declined.items():
            reasons[kernel, "; ".join(why)] += 1
    alien: dict[str, list[str]] = {}
    for kernel, text in reasons:
        if found := _OTHER_CODES.match(text):
            alien.setdefault(found[1], []).append(kernel)
    many = {codes: dict.fromkeys(names) for codes, names in alien.items() if len(set(names)) > MANY}
    lines = []
    for (kernel, text), count in reasons.items():
        found = _OTHER_CODES.match(text)
        if found is None or found[1] not in many:
            lines.append(f"  {kernel}: {text} ({plural(count, 'site')})")
    for codes, kernels in many.items():
        short = ", ".join(kernel.partition("/")[2] for kernel in kernels)
        lines.append(f"  {len(kernels)} kernels of other codes than {codes}: {short}")
    return ["", "kernels that were not chosen:", *lines] if lines else []


_OTHER_CODES = re.compile(r"QC201: \S+ takes [\w, ]+ codes, not (\w+)")
MANY = 4
"""Kernels of other codes above which they are told in one line."""


def print_inspection(name: str, found: Inspection) -> None:
    """The graph in short, then what the kernel rows alone say of its sites."""
    show(lambda width: graph_parts(name, found.graph, width))
    if found.report.sites or found.report.findings:
        print()
        print_report(found.report)


def graph_parts(name: str, graph: Graph, width: int) -> list[RenderableType]:
    from rich.text import Text

    counts = Counter(op.name for op in graph.walk())
    held = Counter[str]()
    for g in graph.graphs():
        for v in g.consts.values():
            if v.payload is not None:
                held[v.payload.dtype.name] += v.payload.nbytes
    kinds = ", ".join(f"{dtype} {human_bytes(size)}" for dtype, size in held.most_common() if size)
    lines = [f"{name}: {plural(sum(counts.values()), 'op')}, constants of {human_bytes(sum(held.values()))} ({kinds})"]
    lines += [f"input  {v.name} : {show_type(v.type)}" for v in graph.inputs]
    lines += [f"output {v.name} : {show_type(v.type)}" for v in graph.outputs]
    rows = [(op, str(count)) for op, count in counts.most_common()]
    return [*map(Text, lines), Text(""), table(("op", "count"), rows, width=width, right=("count",))]


def write_page(out: Path, name: str, found: Inspection) -> None:
    """Write the HTML page of an inspected file, whole or not at all."""
    with Staged(out) as staged:
        staged.main.write_text(page(name, found.report, found.graph), encoding="utf-8", errors="xmlcharrefreplace")
        staged.commit()


def print_targets(found: Sequence[TargetInfo]) -> None:
    rows = [(t.name, ", ".join(t.arch), "yes" if t.available else "no", t.note) for t in found]
    show(lambda width: [table(("target", "such as", "runs here", "note"), rows, width=width, keep=("target",))])


def target_json(info: TargetInfo) -> dict[str, Any]:
    return asdict(info)


def print_kernels(rows: Sequence[KernelRow]) -> None:
    show(lambda width: kernel_parts(rows, width))


def kernel_parts(rows: Sequence[KernelRow], width: int) -> list[RenderableType]:
    from rich.text import Text

    columns = ("kernel", "op", "codes", "scales per", "groups", "zero points", "activations", "M up to", "needs")
    cells = [_kernel_cells(r) for r in rows]
    parts: list[RenderableType] = [table(columns, cells, width=width, right=("M up to",), keep=("kernel", "op"))]
    for r in rows:
        session = "".join(f"; needs the session key {key}={value}" for key, value in r.session)
        note = f"; {r.note}" if r.note else ""
        slow = "".join(f"\n    slower than the float op: {line}" for line in slower_lines(r))
        parts.append(Text(f"\n{r.name}: {r.numerics}{note}{session}{slow}\n    evidence: {r.evidence}"))
    return parts


def slower_lines(row: KernelRow) -> list[str]:
    """Where a fused kernel is slower than the float op, one line an activation: its share of that op's speed."""
    lines = []
    for name in dict.fromkeys(name for name, _, _ in row.slower):
        shares = [(m, f"{share:.2g}" if share < 1 else "as fast") for n, m, share in row.slower if n == name]
        lines.append(f"{name} activations, share of its speed: {', '.join(f'{s} from M={m}' for m, s in shares)}")
    return lines


def _kernel_cells(row: KernelRow) -> tuple[str, ...]:
    words = [row.codes, row.granularities, [str(g) for g in sorted(row.groups)], row.zeros, row.activations]
    cells = [", ".join(w if isinstance(w, list) else sorted(w)) for w in words]
    limit = "any" if row.m_max is None else str(row.m_max)
    return (row.name, row.op, *cells, limit, ", ".join(sorted(row.needs)) or NONE)


def kernel_json(row: KernelRow) -> dict[str, Any]:
    """A row as JSON values; sets become sorted lists."""
    return {k: sorted(v) if isinstance(v, frozenset) else v for k, v in asdict(row).items()}


def print_proofs(proofs: Sequence[Proof]) -> None:
    """One line a kernel that was compiled, then the faults."""
    show(lambda width: proof_parts(proofs, width))


def proof_parts(proofs: Sequence[Proof], width: int) -> list[RenderableType]:
    from rich.text import Text

    columns = ("row", "case", "kernel", "regs", "shared", "spills", "tensor cores", "load", "ins/weight", "verdict")
    cells = [cell for proof in proofs for cell in _proof_cells(proof)]
    right = ("regs", "shared", "spills", "load", "ins/weight")
    parts: list[RenderableType] = [table(columns, cells, width=width, right=right, keep=("row", "verdict"))]
    failed = [p for p in proofs if not p.holds]
    parts += [Text(f"\n{p.row} {p.case}, sm_{p.sm}: {fault}") for p in failed for fault in p.faults]
    kernels = plural(sum(len(p.kernels) for p in proofs), "kernel")
    held = f"{len(proofs) - len(failed)} of {plural(len(proofs), 'claim')} proved"
    parts.append(Text(f"\n{kernels} compiled; {held}; verdict: {'rejected' if failed else 'accepted'}"))
    return parts


def _proof_cells(proof: Proof) -> list[tuple[str, ...]]:
    verdict = "proved" if proof.holds else "failed"
    if not proof.kernels:
        return [(proof.row, proof.case, *[NONE] * 7, verdict)]
    return [
        (proof.row, proof.case, k.name, *_figure_cells(k), verdict)
        if i == 0
        else ("", "", k.name, *_figure_cells(k), "")
        for i, k in enumerate(proof.kernels)
    ]


def _figure_cells(k: KernelFigures) -> tuple[str, ...]:
    matrix = f"{k.matrix_count} {k.matrix}" if k.matrix else NONE
    load = {0: NONE, 1024: "tile"}.get(k.narrowest, f"{k.narrowest} B")
    each = f"{k.per_weight:.2f}" if k.per_weight else NONE
    return (str(k.registers), human_bytes(k.shared), str(k.spills), matrix, load, each)


def proof_json(proof: Proof) -> dict[str, Any]:
    return {**asdict(proof), "holds": proof.holds}
