"""The shape of runtime evidence: what a backend must show after it opened an artifact in its runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qcompiler.target import Phase, Target
from qcompiler.verify.findings import Finding

Verdict = Literal["fused", "slow", "dequant", "wrong", "error", "float"]


@dataclass(frozen=True)
class NodeEvidence:
    """What the runtime did with one node.

    ``verdict``: *fused* (the weight was never expanded), *slow* (nor was it, but scalar or reference code runs),
    *dequant* (it was), *wrong* (the numbers differ from the reference), *error* (it did not load or run), *float*
    (nothing quantized about it). ``facts`` holds the measurements that the verdict rests on: temporary bytes, bytes of
    the expanded weight, fallback log lines, relative error.
    """

    node: str
    op_type: str
    verdict: Verdict
    kernel: str = ""
    phase: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class EvidenceResult:
    """All that was seen. ``kind`` is *measured* when the runtime ran the nodes, *static* when only rows were read."""

    kind: Literal["measured", "static"]
    nodes: list[NodeEvidence] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def of(self, node: str) -> list[NodeEvidence]:
        return [n for n in self.nodes if n.node == node]


class EvidenceCollector(ABC):
    """Opens an artifact in its runtime and reports which kernel ran, node by node."""

    def __init__(self, target: Target, phases: Sequence[Phase]) -> None:
        self.target, self.phases = target, tuple(phases)

    @abstractmethod
    def collect(self, path: Path) -> EvidenceResult:
        """Evidence for the artifact at ``path``, which is never changed. A model that does not load is a finding."""
