"""The sums of a report, from its sites and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qcompiler.sites import Site


@dataclass(frozen=True)
class Totals:
    """Sums over the sites. Storage that tied sites share is counted once in every figure but the counts of sites.

    ``fused_weight_share``: bytes of the float weights whose every site is fused, of those of all weights; 0 when
    there are none. ``bytes_before``: float weights; ``bytes_after``: what is stored in their place (codes, scales and
    zero points, or the float weight where it was kept). ``metadata_bytes``: the scales and zero points among that.
    ``bits_per_weight``: stored bits of the fused weights over their number; None when none is fused.
    """

    sites: int
    fused: int
    skipped: int
    unfused: int
    fused_weight_share: float
    bytes_before: int
    bytes_after: int
    metadata_bytes: int
    bits_per_weight: float | None


@dataclass(frozen=True)
class Storage:
    """One weight as it is stored, whatever the number of sites that read it. Sizes in bytes; ``weights`` is a count."""

    fused: bool
    weights: int
    before: int
    codes: int
    metadata: int

    @property
    def after(self) -> int:
        return self.codes + self.metadata if self.codes else self.before


def _storages(sites: Iterable[Site]) -> list[Storage]:
    """The storage behind ``sites``: sites that are tied, directly or through others, share one."""
    by_name = {s.name: s for s in sites}
    shared: dict[str, list[Site]] = {}
    for site in by_name.values():
        seen = {site.name}
        root = site.name
        while (tied := by_name[root].tied_to if root in by_name else None) and tied not in seen:
            seen.add(root := tied)
        # Sites that name one another in a ring have no first one; the smallest name stands for it.
        shared.setdefault(min(seen) if tied else root, []).append(site)
    return [_storage(group) for group in shared.values()]


def _storage(group: list[Site]) -> Storage:
    """Tied sites describe the same bytes; where only one of them carries the figures, they are taken from there."""
    return Storage(
        fused=all(s.status == "fused" for s in group),
        weights=max(s.n * s.k for s in group),
        before=max(s.before for s in group),
        codes=max(s.bytes.get("codes", 0) for s in group),
        metadata=max(s.bytes.get("scales", 0) + s.bytes.get("zeros", 0) for s in group),
    )


def totals(sites: Iterable[Site]) -> Totals:
    """The sums over ``sites``, whose names are distinct."""
    sites = list(sites)
    stored = _storages(sites)
    fused = [s for s in stored if s.fused]
    before = sum(s.before for s in stored)
    weights = sum(s.weights for s in fused)
    return Totals(
        sites=len(sites),
        fused=sum(s.status == "fused" for s in sites),
        skipped=sum(s.status == "skipped" for s in sites),
        unfused=sum(s.status == "unfused" for s in sites),
        fused_weight_share=sum(s.before for s in fused) / before if before else 0.0,
        bytes_before=before,
        bytes_after=sum(s.after for s in stored),
        metadata_bytes=sum(s.metadata for s in stored if s.codes),
        bits_per_weight=8 * sum(s.codes + s.metadata for s in fused) / weights if weights else None,
    )
