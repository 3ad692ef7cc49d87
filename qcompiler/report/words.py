"""How the reports say things: sizes, seconds, kernels, and which sites are alike. No layout, no colour."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from qcompiler.report.model import EXACT_DB, Report
from qcompiler.sites import Site
from qcompiler.verify.findings import Finding

T = TypeVar("T")
NONE = "-"


def human_bytes(size: int) -> str:
    """``512 B``, ``1.5 KiB``, ``64.0 MiB``: powers of 1024, one decimal."""
    if abs(size) < 1024:
        return f"{size} B"
    value = float(size)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if abs(value) < 1023.95 or unit == "TiB":
            break
    return f"{value:.1f} {unit}"


def plural(count: int, noun: str) -> str:
    """``1 site``, ``2 sites``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def human_seconds(seconds: float) -> str:
    """``7 ms``, ``1.25 s``, ``3 min 20 s``."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 99.995:
        return f"{seconds:.2f} s"
    return f"{int(seconds + 0.5) // 60} min {int(seconds + 0.5) % 60} s"


def decibel_text(db: float | None) -> str:
    """``21.4``, ``exact`` where there is no error, ``-`` where nothing was measured."""
    if db is None:
        return NONE
    return "exact" if db >= EXACT_DB else f"{db:.1f}"


def short_kernel(name: str, target: str) -> str:
    """A kernel's name without the name of the target that the report is for."""
    return name.removeprefix(f"{target.partition(':')[0]}/")


def kernel_text(kernel: Mapping[str, str], target: str) -> str:
    """The kernel of each phase; named once where all phases share it, ``-`` where there is none."""
    names = {phase: short_kernel(name, target) for phase, name in kernel.items()}
    if len(set(names.values())) <= 1:
        return next(iter(names.values()), NONE)
    return ", ".join(f"{phase}: {name}" for phase, name in names.items())


def kernel_or_reason(site: Site, target: str) -> str:
    """The kernel of a site, or why it has none."""
    kernel = kernel_text(site.kernel, target)
    return kernel if kernel != NONE else site.reason or NONE


def counted_bytes(site: Site) -> tuple[int, int]:
    """Bytes before and after: the float weight, and codes, scales and zero points, or the float weight that was kept.

    Nothing for a site that is tied to another: the weight is counted there.
    """
    if site.tied_to:
        return 0, 0
    parts = [site.bytes.get(part, 0) for part in ("codes", "scales", "zeros")]
    return site.before, sum(parts) if parts[0] else site.before


def summed_bytes(sites: Iterable[Site]) -> tuple[int, int]:
    pairs = [counted_bytes(s) for s in sites]
    return sum(before for before, _ in pairs), sum(after for _, after in pairs)


def bytes_text(before: int, after: int) -> str:
    return human_bytes(before) if before == after else f"{human_bytes(before)} -> {human_bytes(after)}"


def site_bytes_text(site: Site) -> str:
    """Bytes before and after; ``shared`` where another site, already counted, stores the weight."""
    return "shared" if site.tied_to else bytes_text(*counted_bytes(site))


def status_text(site: Site) -> str:
    """The status, with what it rests on where that is not the runtime: ``fused``, ``fused, static``, ``skipped``."""
    fused_by = {"measured": "fused", "planned": "fused"}.get(site.evidence, f"fused, {site.evidence}")
    return fused_by if site.status == "fused" else site.status


def site_alike(site: Site) -> Hashable:
    """Equal for two sites that differ in nothing but their names and the noise of their weights."""
    kernel = tuple(sorted(site.kernel.items()))
    tied = site.tied_to is not None
    return (site.op, site.n, site.k, site.scheme, kernel, site.status, site.evidence, site.reason, tied, site.before)


def finding_alike(finding: Finding) -> Hashable:
    """Equal for two findings that differ in nothing but names and numbers."""
    name = rf"(?<!\w){re.escape(finding.op)}(?!\w)|" if finding.op else ""
    forms = (re.sub(rf"{name}'[^']*'|\d+", "", text) for text in (finding.message, finding.reason, finding.fix))
    return (finding.code, finding.severity, *forms)


def grouped(items: Iterable[T], alike: Sequence[Hashable]) -> list[list[T]]:
    """``items`` in groups of equal ``alike`` (one entry an item), in order of each group's first member."""
    groups: dict[Hashable, list[T]] = {}
    for item, key in zip(items, alike, strict=True):
        groups.setdefault(key, []).append(item)
    return list(groups.values())


def site_groups(sites: Sequence[Site]) -> list[list[Site]]:
    return grouped(sites, [site_alike(s) for s in sites])


def finding_groups(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Groups of alike findings, errors before warnings before notes."""
    order = {"error": 0, "warning": 1, "info": 2}
    ranked = sorted(findings, key=lambda f: order[f.severity])
    return grouped(ranked, [finding_alike(f) for f in ranked])


def totals_lines(report: Report) -> list[str]:
    """The sums in one or two sentences; what is not known is left out."""
    t = report.totals
    static = sum(s.status == "fused" and s.evidence != "measured" for s in report.sites)
    seen = f" ({f'{static} by rows alone' if static else 'measured'})" if t.fused else ""
    counts = f"{plural(t.sites, 'site')}: {t.fused} fused{seen}, {t.skipped} skipped, {t.unfused} unfused"
    if not t.sites:
        return ["no site: nothing here is quantized, and nothing could be"]
    share = f"{100 * t.fused_weight_share:.1f} % of the weight bytes fused"
    bits = "" if t.bits_per_weight is None else f" at {t.bits_per_weight:.2f} bits per weight"
    sizes = f"weights {bytes_text(t.bytes_before, t.bytes_after)}"
    metadata = f", {human_bytes(t.metadata_bytes)} of it scales and zero points" if t.metadata_bytes else ""
    return [f"{counts}; {share}{bits}", sizes + metadata]


def quality_lines(report: Report) -> list[str]:
    """The worst output against the float model, and perplexity; nothing where nothing was measured."""
    if report.quality is None:
        return []
    lines = []
    if outputs := report.quality.outputs:
        name, worst = min(outputs.items(), key=lambda item: -EXACT_DB if item[1].sqnr_db is None else item[1].sqnr_db)
        cosine = NONE if worst.cosine is None else f"{worst.cosine:.6f}"
        error = NONE if worst.max_abs is None else f"{worst.max_abs:.3g}"
        which = f"worst of {len(outputs)} outputs, '{name}'" if len(outputs) > 1 else f"output '{name}'"
        figures = f"SQNR {decibel_text(worst.sqnr_db)} dB, cosine {cosine}, largest error {error}"
        lines.append(f"against the float model, {which}: {figures}")
    if (p := report.quality.perplexity) is not None:
        lines.append(f"perplexity {p.float_model:.4g} in float, {p.compiled:.4g} compiled")
    return lines


def timing_line(report: Report) -> str:
    """Seconds of each step that took any, and the peak memory."""
    t = report.timing
    passes = sum(t.passes_s.values())
    steps = {"capture": t.capture_s, "passes": passes, "emit": t.emit_s, "evidence": t.evidence_s}
    parts = [f"{name} {human_seconds(s)}" for name, s in steps.items() if s]
    if report.peak_rss_bytes:
        parts.append(f"peak memory {human_bytes(report.peak_rss_bytes)}")
    return ", ".join(parts)
