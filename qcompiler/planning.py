"""What a compilation would do, before any weight is read: kernels, why others decline, bytes, predicted memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qcompiler.backends.base import Captured
from qcompiler.driver import Job, account, run_recipe, settle
from qcompiler.memory import predicted_peak
from qcompiler.passes.choose_layout import asked
from qcompiler.target import Reason, Request, Target
from qcompiler.verify.findings import Finding


@dataclass
class PlannedSite:
    """One site: the kernel of each phase, why every other row declines, bytes before and after."""

    name: str
    op: str
    n: int
    k: int
    scheme: str
    status: str
    kernel: dict[str, str]
    declined: dict[str, list[str]]
    before: int
    bytes: dict[str, int]
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        sizes = {"codes": 0, "scales": 0, "zeros": 0} | self.bytes | {"before": self.before}
        return {
            "name": self.name,
            "op": self.op,
            "n": self.n,
            "k": self.k,
            "scheme": self.scheme,
            "status": self.status,
            "kernel": dict(self.kernel),
            "declined": {k: list(v) for k, v in self.declined.items()},
            "bytes": sizes,
            "reason": self.reason,
        }


@dataclass
class Plan:
    """Every site with its kernels, the findings so far, and the peak of private memory that compiling will need."""

    target: str
    recipe: str
    sites: list[PlannedSite]
    findings: list[Finding]
    peak_bytes: int
    phases: Mapping[str, int] = field(default_factory=dict)

    @property
    def accepted(self) -> bool:
        """True when nothing that is known before the weights are read rejects the model."""
        return not any(f.severity == "error" for f in self.findings) and all(s.status != "unfused" for s in self.sites)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "target": self.target,
            "recipe": self.recipe,
            "verdict": "accepted" if self.accepted else "rejected",
            "phases": dict(self.phases),
            "predicted_peak_bytes": self.peak_bytes,
            "findings": [f.to_json() for f in self.findings],
            "sites": [s.to_json() for s in self.sites],
        }


def make_plan(job: Job, captured: Captured) -> Plan:
    """Run the recipe without reading a weight and write down what would happen to each site."""
    graph = captured.graph
    peak = predicted_peak(graph)
    requests: dict[str, Request] = {}
    passes = job.recipe.passes
    before_layout = [p for p in passes if p.name != "choose-layout"]
    run_recipe(job, graph, before_layout)
    for op in graph.walk():
        if op.name in ("q.linear", "q.embedding"):
            requests[op.attrs["site"]] = asked(op)
    run_recipe(job, graph, [p for p in passes if p.name == "choose-layout"])
    settle(job)
    account(job, graph)
    sites = [
        PlannedSite(
            s.name,
            s.op,
            s.n,
            s.k,
            s.scheme,
            s.status,
            s.kernel,
            _declined(job.target, requests.get(s.name), job, set(s.kernel.values())),
            s.before,
            s.bytes,
            s.reason,
        )
        for s in job.ctx.ledger
    ]
    phases = {p.name: p.m for p in job.phases}
    return Plan(str(job.target), job.recipe.text, sites, list(job.ctx.findings), peak, phases)


def _declined(target: Target, request: Request | None, job: Job, chosen: set[str]) -> dict[str, list[str]]:
    if request is None:
        return {}
    found = {name: _texts(r) for name, r in target.declined(request, job.phases).items()}
    for row in target.rows_for(request.op):
        if row.name not in found and row.name not in chosen:
            found[row.name] = ["serves too, but another row comes before it"]
    return found


def _texts(reasons: list[Reason]) -> list[str]:
    return [f"{r.code}: {r.message}" for r in reasons]
