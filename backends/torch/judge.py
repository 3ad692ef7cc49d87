"""The static verdict on any aten graph: which kernel each low-bit call gets, and which dequantize is left over.

A call is turned into a request and the target's kernel rows are asked; the table of :mod:`.conditions` says what the
rows cannot. torch runs a captured program as it is written, so nothing has to be foretold.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qcompiler import dtypes
from qcompiler.backends.torch.conditions import Setting, broken
from qcompiler.backends.torch.held import INT4, INT8, LowBit
from qcompiler.backends.torch.nodes import low_bit, low_bit_nodes
from qcompiler.backends.torch.nodes_triton import request_told, row_keys
from qcompiler.ir import Graph, Op, Value
from qcompiler.scheme import Scheme
from qcompiler.sites import Site
from qcompiler.target import PHASES, KernelRow, Phase, Request, Target
from qcompiler.verify.evidence import Verdict
from qcompiler.verify.findings import Finding
from qcompiler.verify.op_kinds import base_name
from qcompiler.verify.static import Rules

ROWS: dict[str, str] = {
    INT4: "int4pack",
    INT8: "int8pack",
    "qcompiler.qlinear": "qlinear.u8s8",
    "qcompiler.qconv": "qconv.u8s8",
    "onednn.qlinear_pointwise": "qlinear.u8s8",
    "onednn.qconv_pointwise": "qconv.u8s8",
    "onednn.qconv2d_pointwise": "qconv.u8s8",
}
"""Operator -> the row of its kernel, without the target's name. A lookup of codes is ``gather``."""
ALLOWED_KEY = "qcompiler.allowed"
_CODES = re.compile(r"\b(u?int\d+|f8\w+)\[")
NO_SITES = frozenset({"matmul"})
"""Kinds of call that hold no weight."""


@dataclass
class NodeVerdict:
    """One low-bit call, or a product that reads an expanded weight. ``kernels`` maps phases to kernel names; empty
    unless *fused*."""

    name: str
    op: Op
    op_type: str
    kind: str
    verdict: Verdict
    n: int
    k: int
    scheme: str
    kernels: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)
    node: LowBit | None = None

    def site(self) -> Site:
        """The site of the report."""
        fused = self.verdict == "fused"
        reason = None if fused or not self.findings else f"{self.findings[0].message}: {self.findings[0].reason}"
        return Site(
            self.name,
            self.kind,
            self.n,
            self.k,
            self.n * self.k * 4,
            self.scheme,
            "fused" if fused else "unfused",
            reason,
            dict(self.kernels),
            bytes=dict(self.bytes),
        )


def metadata_of(graph: Graph) -> dict[str, str]:
    """What the artifact says of itself."""
    return {str(k): str(v) for k, v in dict(graph.root.meta.get("metadata", ())).items()}


def allowed_of(graph: Graph) -> dict[str, str]:
    """Ops that the artifact's metadata names as floats between codes, with reasons (JSON: label -> reason)."""
    try:
        found = json.loads(metadata_of(graph).get(ALLOWED_KEY, "{}"))
    except ValueError:
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


# -- one call ------------------------------------------------------------------------------------------------------


def judge_node(node: LowBit, setting: Setting) -> NodeVerdict:
    """The verdict on one call."""
    out = NodeVerdict(
        node.op.label,
        node.op,
        node.short,
        node.kind,
        "fused",
        node.n,
        node.k,
        node.scheme_text,
        bytes=node.sizes(),
        node=node,
    )
    faults = broken(node, setting)
    for condition, reason in faults:
        _blame(out, condition.verdict, condition.code, reason, condition.fix)
    if not faults:
        _ask_rows(out, node, setting)
    return out


_RANK: dict[Verdict, int] = {"float": 0, "fused": 1, "slow": 2, "dequant": 3, "wrong": 4, "error": 5}
_SAYS: dict[Verdict, str] = {
    "slow": "runs code that was not written for this chip",
    "dequant": "expands the whole weight",
    "wrong": "computes wrong numbers",
    "error": "does not run",
}


def said(out: NodeVerdict, verdict: Verdict) -> str:
    """``_weight_int8pack_mm 64x72 <int8 channel sym> computes wrong numbers``."""
    size = f", {out.n * out.k * 4} bytes as f32" if verdict == "dequant" and out.n else ""
    return f"{out.op_type} {out.n}x{out.k} <{out.scheme}> {_SAYS[verdict]}{size}"


def _blame(out: NodeVerdict, verdict: Verdict, code: str, reason: str, fix: str) -> None:
    if _RANK[verdict] > _RANK[out.verdict]:
        out.verdict, out.kernels = verdict, {}
    out.findings.append(Finding(code, out.name, said(out, verdict), reason, fix))


def rows_of(node: LowBit, target: Target) -> list[KernelRow]:
    """The rows of the kernels that ``node`` calls, where the target has any: several where M decides between them."""
    keys = row_keys(node)
    if keys:
        wanted, names = request_told(node).op, {f"{target.name}/{key}" for key in keys}
        return [r for r in target.rows if r.name in names and r.op == wanted]
    short = "gather" if node.kind == "embedding" else ROWS.get(node.call, "")
    return [r for r in target.rows if short and r.name == f"{target.name}/{short}"][:1]


def _ask_rows(out: NodeVerdict, node: LowBit, setting: Setting) -> None:
    """Ask the row of this kernel for each phase; a kernel without a row is called what torch calls it."""
    rows, ours = rows_of(node, setting.target), bool(row_keys(node))
    plain = f"{setting.target.name}/{node.short}"
    for phase in setting.phases:
        served = [r for r in rows if r.serves_rows(phase.m)]
        if not served:
            out.kernels[phase.name] = plain
            continue
        asked = [r.why_not(_request(node, r), setting.target.features, phase.m) for r in served]
        # What a row of torch's own declines here is the chip or the phase: the call is what the conditions judge. Ours
        # say what they take, and several stand for one kernel.
        reasons = min(([r for r in a if ours or r.code in ("QC206", "QC104")] for a in asked), key=len)
        if not reasons:
            out.kernels[phase.name] = served[0].name
            continue
        text = "; ".join(r.message for r in reasons)
        verdict: Verdict = "error" if ours else "dequant"
        _blame(out, verdict, reasons[0].code, f"phase {phase.name}, M={phase.m}: {text}", reasons[0].fix)
        return


def _request(node: LowBit, row: KernelRow) -> Request:
    if row_keys(node):
        return request_told(node)
    return Request(row.op, node.scheme or Scheme(dtypes.INT8), node.n, node.k, node.activation or dtypes.BF16)


# -- the graph -----------------------------------------------------------------------------------------------------


@dataclass
class Judgement:
    """Every low-bit call of a graph and everything that was found."""

    graph: Graph
    nodes: list[NodeVerdict] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        """The calls that hold a weight, those that share one tied to the first."""
        out: list[Site] = []
        first: dict[Value, str] = {}
        for verdict in self.nodes:
            if verdict.kind in NO_SITES:
                continue
            site = verdict.site()
            codes = None if verdict.node is None else verdict.node.codes
            if codes is not None and (known := first.setdefault(codes, site.name)) != site.name:
                site.tied_to = known
            out.append(site)
        return out


def examine(
    graph: Graph,
    target: Target,
    phases: Sequence[Phase] = PHASES,
    *,
    allowed: Mapping[str, str] | None = None,
) -> Judgement:
    """Judge ``graph`` call by call. ``allowed``: label -> reason of ops that may stand in float between codes; by
    default what the metadata says."""
    setting = Setting(target, tuple(phases), metadata_of(graph))
    out = Judgement(graph, [judge_node(node, setting) for node in low_bit_nodes(graph)])
    out.findings = [f for v in out.nodes for f in v.findings]
    calls = frozenset(v.op for v in out.nodes)
    rules = Rules(graph, calls, frozenset(), allowed_of(graph) if allowed is None else allowed)
    out.findings += rules.run()
    out.nodes += _unfused(rules)
    return out


def _unfused(rules: Rules) -> list[NodeVerdict]:
    """Products that read an expanded weight, as sites."""
    found = []
    for op, finding in rules.blamed.items():
        if low_bit(op) is not None or not op.results:
            continue
        name = base_name(op)
        kind = "embedding" if "embedding" in name else "conv" if "conv" in name else "linear"
        codes = _CODES.search(finding.message)
        scheme = "low-bit" if codes is None else codes[1]
        found.append(NodeVerdict(op.label, op, name, kind, "dequant", *_weight_shape(op), scheme, findings=[finding]))
    return found


def _weight_shape(op: Op) -> tuple[int, int]:
    """N and K of the largest constant-shaped matrix among the factors; zeros where there is none."""
    name = base_name(op)
    shapes = [v.tensor.static_shape for v in op.operands[:3] if v is not None]
    known = [s for s in shapes if s is not None and len(s) >= 2]
    if not known:
        return 0, 0
    shape = max(known, key=math.prod)
    if "conv" in name or name in ("linear", "embedding", "embedding_bag"):
        return shape[0], math.prod(shape[1:])
    return shape[-1], shape[-2]


def judge_graph(graph: Graph, target: Target, phases: Sequence[Phase] = PHASES) -> list[Finding]:
    """Everything that the static verdict finds in ``graph``; empty when nothing is wrong."""
    return list(dict.fromkeys(examine(graph, target, phases).findings))


def sites_of(graph: Graph) -> list[Site]:
    """The low-bit calls of ``graph`` as sites with their stored bytes; no kernel is asked."""
    out = []
    for node in low_bit_nodes(graph):
        if node.kind in NO_SITES:
            continue
        site = Site(node.op.label, node.kind, node.n, node.k, node.n * node.k * 4, node.scheme_text)
        site.bytes = node.sizes()
        out.append(site)
    return out
