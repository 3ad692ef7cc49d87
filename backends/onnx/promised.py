"""Sites that a report beside the artifact promises in few bits, against what the file holds."""

from __future__ import annotations

import json
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from qcompiler.ir import Graph, Op
from qcompiler.verify.findings import Finding
from qcompiler.verify.op_kinds import base_name, is_product


def check_promised(path: Path, graph: Graph, found: AbstractSet[str]) -> list[Finding]:
    """QC103 or QC106 for each site that ``<path>.report.json`` calls fused and that is no low-bit node of ``graph``."""
    report = path.with_name(path.name + ".report.json")
    if not report.is_file():
        return []
    try:
        sites: Any = json.loads(report.read_text(encoding="utf-8")).get("sites", [])
    except (OSError, ValueError, AttributeError):
        return []
    out = []
    ops = {op.label: op for op in graph.walk()}
    for site in sites if isinstance(sites, list) else []:
        if not isinstance(site, dict) or site.get("status") != "fused" or site.get("name") in found:
            continue
        out.append(_missing(str(site.get("name")), str(site.get("scheme", "")), ops, report.name))
    return out


def _missing(name: str, scheme: str, ops: dict[str, Op], report: str) -> Finding:
    op = ops.get(name)
    if op is not None and is_product(op):
        message = f"{base_name(op)} '{name}' runs on a float weight"
        return Finding("QC103", name, message, f"{report} promises it in {scheme}", "compile the model again")
    message = f"site '{name}' is no low-bit node of the file"
    return Finding("QC106", name, message, f"{report} promises it in {scheme}", "compile the model again")
