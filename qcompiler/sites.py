"""Sites: the places of a model that a recipe may quantize, and the ledger that says how each one ended."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["pending", "fused", "skipped", "unfused"]


@dataclass
class Site:
    """One linear, embedding or convolution. ``before`` is the bytes of its float weight; ``status`` how it ended.

    A site whose weight an earlier site stores too is ``tied_to`` that one; sums count the bytes of both once.
    ``wish`` is the last part of the name of the kernel to take, where it serves; empty leaves it to the ranks.
    ``weight`` is the float constant in the graph, while there is one; ``stats`` fills when its codes are computed.
    """

    name: str
    op: str
    n: int
    k: int
    before: int
    scheme: str = ""
    status: Status = "pending"
    reason: str | None = None
    kernel: dict[str, str] = field(default_factory=dict)
    evidence: str = "static"
    bytes: dict[str, int] = field(default_factory=dict)
    sqnr_db: float | None = None
    tied_to: str | None = None
    wish: str = ""
    weight: Any = field(default=None, repr=False, compare=False)
    stats: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The ``sites`` entry of the report (see the contract)."""
        sizes = {"codes": 0, "scales": 0, "zeros": 0} | self.bytes | {"before": self.before}
        out: dict[str, Any] = {"name": self.name, "op": self.op, "n": self.n, "k": self.k, "scheme": self.scheme}
        out |= {"status": self.status, "kernel": dict(self.kernel), "evidence": self.evidence, "bytes": sizes}
        out |= {"sqnr_db": self.sqnr_db, "reason": self.reason}
        return out | ({"tied_to": self.tied_to} if self.tied_to else {})


class Ledger:
    """Every site of one compilation by name, in graph order. Nothing leaves it silently."""

    def __init__(self) -> None:
        self._sites: dict[str, Site] = {}
        self._by_weight: dict[Any, Site] = {}

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites.values())

    def __len__(self) -> int:
        return len(self._sites)

    def __contains__(self, name: str) -> bool:
        return name in self._sites

    def __getitem__(self, name: str) -> Site:
        return self._sites[name]

    def add(self, site: Site) -> Site:
        """Record a site under its name, made unique with ``#2`` where two sites share one, tied to an earlier site
        that has the same weight."""
        name, n = site.name, 1
        while site.name in self._sites:
            site.name = f"{name}#{(n := n + 1)}"
        self._sites[site.name] = site
        if site.weight is not None:
            first = self._by_weight.setdefault(site.weight, site)
            site.tied_to = None if first is site else first.name
        return site

    def skip(self, name: str, reason: str) -> None:
        self._sites[name].status, self._sites[name].reason = "skipped", reason


def matches(name: str, globs: Sequence[str]) -> str | None:
    """The first of ``globs`` that the site name matches, whole or as a dotted or slashed suffix, else None."""
    for glob in globs:
        if fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name, f"*[./]{glob}"):
            return glob
    return None
