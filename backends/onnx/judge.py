"""The static verdict on any ONNX graph: which kernel each low-bit node gets, and which dequantize is left over.

A node is turned into a request and the target's kernel rows are asked; the table of :mod:`.conditions` says what the
rows cannot. What ONNX Runtime fuses of QuantizeLinear and DequantizeLinear by itself is foretold by :mod:`.qdq`, unless
the graph is one that the runtime has optimized already.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from qcompiler.backends.onnx.conditions import Setting, broken
from qcompiler.backends.onnx.kernels import accuracy_level
from qcompiler.backends.onnx.nodes import DEFAULT, MS, LowBit, low_bit, low_bit_nodes
from qcompiler.backends.onnx.qdq import DQ, Forecast, Fusion, Q
from qcompiler.backends.onnx.qdq_linear import weight_shape
from qcompiler.backends.onnx.qdq_other import forecast, unloadable
from qcompiler.dtypes import TABLE, dtype
from qcompiler.ir import Graph, Op
from qcompiler.scheme import Scheme
from qcompiler.sites import Site
from qcompiler.target import PHASES, KernelRow, Phase, Reason, Request, Target
from qcompiler.verify.evidence import Verdict
from qcompiler.verify.findings import Finding
from qcompiler.verify.static import Rules

ROW_OPS = {MS + "MatMulNBits": "q.linear", MS + "GatherBlockQuantized": "q.embedding"}
SESSION_KEY = "qcompiler.session"
ALLOWED_KEY = "qcompiler.allowed"
NO_SITES = frozenset({"elementwise", "cache"})
"""Kinds of node that hold no weight."""


@dataclass
class NodeVerdict:
    """One low-bit node, there or foretold. ``kernels`` maps phases to kernel names; empty unless *fused*."""

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
    foretold: bool = False

    def site(self) -> Site:
        """The site of the report."""
        fused = self.verdict == "fused"
        reason = None if fused or not self.findings else f"{self.findings[0].message}: {self.findings[0].reason}"
        return Site(
            self.name,
            self.kind,
            self.n,
            self.k,
            0 if self.kind == "matmul" else self.n * self.k * 4,
            self.scheme,
            "fused" if fused else "unfused",
            reason,
            dict(self.kernels),
            bytes=dict(self.bytes),
        )


def session_of(graph: Graph) -> dict[str, str]:
    """The session keys that the artifact's metadata asks for (``key=value;key=value``)."""
    text = dict(graph.root.meta.get("model_metadata_props", ())).get(SESSION_KEY, "")
    pairs = (item.partition("=") for item in text.split(";") if item)
    return {key: value for key, _, value in pairs}


def allowed_of(graph: Graph) -> dict[str, str]:
    """Ops that the artifact's metadata names as floats between codes, with reasons (JSON: label -> reason)."""
    text = dict(graph.root.meta.get("model_metadata_props", ())).get(ALLOWED_KEY, "{}")
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


# -- one node ------------------------------------------------------------------------------------------------


def judge_node(node: LowBit, setting: Setting) -> NodeVerdict:
    """The verdict on a node of the final graph."""
    out = NodeVerdict(
        node.op.label, node.op, node.short, node.kind, "fused", node.n, node.k, node.scheme_text, bytes=node.sizes()
    )
    faults = broken(node, setting)
    for condition, reason in faults:
        _blame(out, condition.verdict, condition.code, reason, condition.fix)
    if node.op.name in ROW_OPS and out.verdict not in ("error", "dequant"):
        _ask_rows(out, node, setting)
    elif not faults:
        out.kernels = {p.name: kernel_name(node, setting.target) for p in setting.phases}
    return out


def kernel_name(node: LowBit, target: Target) -> str:
    """The row of a node that computes on codes, by the types it has; the plain op where there is no such row."""
    plain = f"{target.name}/{node.short}"
    known = f"{plain}.{node.types}"
    return known if any(r.name == known for r in target.rows) else plain


_RANK: dict[Verdict, int] = {"float": 0, "fused": 1, "dequant": 2, "wrong": 3, "error": 4}
_SAYS: dict[Verdict, str] = {
    "dequant": "expands the whole weight to float",
    "wrong": "computes wrong numbers",
    "error": "does not run",
}


def _blame(out: NodeVerdict, verdict: Verdict, code: str, reason: str, fix: str) -> None:
    if _RANK[verdict] > _RANK[out.verdict]:
        out.verdict, out.kernels = verdict, {}
    size = f", {out.n * out.k * 4} bytes on each call" if verdict == "dequant" and out.n else ""
    message = f"{out.op_type} {out.n}x{out.k} <{out.scheme}> {_SAYS[verdict]}{size}"
    out.findings.append(Finding(code, out.name, message, reason, fix))


def _ask_rows(out: NodeVerdict, node: LowBit, setting: Setting) -> None:
    """Ask the kernel rows of this node's configuration for each phase."""
    rows = _configured(node, setting, setting.target.rows_for(ROW_OPS[node.op.name]))
    request = node.request(ROW_OPS[node.op.name])
    if request is None:
        _blame(out, "error", *_unloadable(node, rows))
        return
    for phase in setting.phases:
        serving = next((r for r in rows if not r.why_not(request, setting.target.features, phase.m)), None)
        if serving is not None:
            out.kernels[phase.name] = serving.name
            continue
        _decline(out, node, request, rows, setting, phase)
        return


def _configured(node: LowBit, setting: Setting, rows: Iterable[KernelRow]) -> list[KernelRow]:
    """The rows whose configuration this node has: accuracy level on the CPU, session keys everywhere."""
    return [
        r
        for r in rows
        if all(setting.session.get(k) == v for k, v in r.session)
        and (
            setting.cuda or node.op.name != MS + "MatMulNBits" or accuracy_level(r) == (4 if node.accuracy == 4 else 0)
        )
    ]


def _unloadable(node: LowBit, rows: Sequence[KernelRow]) -> tuple[str, str, str]:
    """Code, reason and fix for a node whose attributes no kernel of its op takes."""
    widths = sorted({dtype(c).bits for r in rows for c in r.codes})
    if node.bits not in widths:
        known = ", ".join(map(str, widths))
        return "QC201", f"{node.short} takes {known} bits, not {node.bits}", f"quantize to {known} bits"
    if node.activation is None:
        return "QC201", "the type of its activation is unknown", "export the model with shapes and types inferred"
    groups = sorted({g for r in rows for g in r.groups})
    known = ", ".join(map(str, groups))
    return "QC202", f"{node.short} takes blocks of {known}, not {node.block}", f"quantize with groups of {known}"


def _decline(
    out: NodeVerdict, node: LowBit, request: Request, rows: Sequence[KernelRow], setting: Setting, phase: Phase
) -> None:
    """No row serves: the node does not load when no row of its op takes its type or block, else it is expanded."""
    features = setting.target.features
    every = setting.target.rows_for(ROW_OPS[node.op.name])
    loads_type = any(request.activation.name in r.activations for r in every)
    loads_block = any((request.scheme.group_size or 0) in r.groups for r in every)
    reasons = min((r.why_not(request, features, phase.m) for r in rows), key=len, default=[])
    text = "; ".join(r.message for r in reasons) or f"no kernel of this configuration is on {setting.target}"
    better = _better(request, every, setting)
    fix = better or next((r.fix for r in reasons if r.fix), "skip this site")
    if not loads_type:
        _blame(out, "error", "QC201", text, fix)
    elif not loads_block:
        _blame(out, "error", "QC202", text, fix)
    else:
        code = "QC206" if [r.code for r in reasons] == ["QC206"] else "QC104"
        _blame(out, "dequant", code, f"phase {phase.name}, M={phase.m}: {text}", fix)


def _better(request: Request, rows: Sequence[KernelRow], setting: Setting) -> str:
    """What to set so that another row of the same op serves."""
    for row in rows:
        if all(not row.why_not(request, setting.target.features, p.m) for p in setting.phases):
            if row.session:
                return f"set the session key {row.session[0][0]}={row.session[0][1]} for {row.name}"
            return f"set accuracy_level to {accuracy_level(row)} for {row.name}"
    return ""


# -- what the runtime will make ------------------------------------------------------------------------------


def judge_fusion(fusion: Fusion, setting: Setting) -> NodeVerdict:
    """The verdict on a node that the runtime will make of Q, DQ and a float op."""
    dq = fusion.weight
    codes = None if dq is None else dq.operand(0)
    n, k = weight_shape(fusion)
    element = None if codes is None else codes.tensor.dtype
    kind = "conv" if fusion.kernel == "QLinearConv" else "linear" if dq is not None else "elementwise"
    out = NodeVerdict(fusion.op.label, fusion.op, fusion.kernel, kind, "fused", n, k, "", foretold=True)
    if dq is None or element is None:
        out.kernels = {p.name: f"{setting.target.name}/{fusion.kernel}" for p in setting.phases}
        return out
    zero = dq.operand(2) is not None and not _zero(dq)
    how = f"g{fusion.block}" if fusion.block and dq.attrs.get("block_size") else _granularity(dq)
    out.scheme = f"{element} {how} {'asym' if zero or not element.signed else 'sym'}"
    out.bytes = {
        key: 0 if v is None or v.tensor.dtype is None else v.tensor.dtype.nbytes(_size(v.tensor.static_shape))
        for key, v in (("codes", codes), ("scales", dq.operand(1)), ("zeros", dq.operand(2)))
    }
    if fusion.wrong:
        _blame(out, "wrong", "QC303", fusion.wrong, "give the weight one scale an output channel, the bias its own law")
    elif fusion.kernel == "MatMulNBits" and fusion.block is not None:
        _ask_forecast(out, dq, fusion.block, n, k, setting)
    else:
        _ask_integer(out, dq, fusion, setting)
    return out


def _size(shape: tuple[int, ...] | None) -> int:
    return 0 if shape is None else math.prod(shape)


def _zero(dq: Op) -> bool:
    value = dq.operand(2)
    payload = None if value is None else value.payload
    return payload is not None and payload.size <= 1 << 20 and not payload.array().any()


def _granularity(dq: Op) -> str:
    scale = dq.operand(1)
    return "channel" if scale is not None and _size(scale.tensor.static_shape) > 1 else "tensor"


def _ask_forecast(out: NodeVerdict, dq: Op, block: int, n: int, k: int, setting: Setting) -> None:
    """The rows for the MatMulNBits with accuracy_level 4 that the runtime makes of a weight's dequantize."""
    codes, scale = dq.operand(0), dq.operand(1)
    element = codes.tensor.dtype if codes is not None else None
    activation = scale.tensor.dtype if scale is not None else None
    if element is None or activation is None:
        return
    symmetric = dq.operand(2) is None and element.signed
    scheme = Scheme(TABLE[element.name], "group", symmetric, (block,))
    request = Request("q.linear", scheme, n, k, activation)
    rows = [r for r in setting.target.rows_for("q.linear") if setting.cuda or accuracy_level(r) == 4]
    rows = [r for r in rows if all(setting.session.get(key) == v for key, v in r.session)]
    for phase in setting.phases:
        serving = next((r for r in rows if not r.why_not(request, setting.target.features, phase.m)), None)
        if serving is not None:
            out.kernels[phase.name] = serving.name
            continue
        reasons: list[Reason] = min((r.why_not(request, setting.target.features, phase.m) for r in rows), key=len)
        code = "QC206" if [r.code for r in reasons] == ["QC206"] else "QC104"
        _blame(out, "dequant", code, "; ".join(r.message for r in reasons), reasons[0].fix)
        return


def _ask_integer(out: NodeVerdict, dq: Op, fusion: Fusion, setting: Setting) -> None:
    """An integer kernel: the chip must not saturate."""
    codes = dq.operand(0)
    element = None if codes is None else codes.tensor.dtype
    if setting.saturates and element is not None and element.name == "int8":
        reason = "pairs of uint8 x int8 products overflow 16 bits on AVX2 without VNNI"
        _blame(out, "wrong", "QC303", reason, "quantize the weight to 7 bits, or set session.x64quantprecision=1")
        return
    out.kernels = {p.name: f"{setting.target.name}/{fusion.kernel}" for p in setting.phases}


# -- the graph -----------------------------------------------------------------------------------------------


@dataclass
class Judgement:
    """Every low-bit node of a graph and everything that was found."""

    graph: Graph
    nodes: list[NodeVerdict] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        return [v.site() for v in self.nodes if v.kind not in NO_SITES]


def examine(
    graph: Graph,
    target: Target,
    phases: Sequence[Phase] = PHASES,
    *,
    final: bool = False,
    allowed: Mapping[str, str] | None = None,
) -> Judgement:
    """Judge ``graph`` node by node. ``final``: the runtime has optimized it, so what is left unfused stays so.

    ``allowed``: label -> reason of ops that may stand in float between codes; by default what the metadata says.
    """
    setting = Setting(target, tuple(phases), session_of(graph))
    seen = Forecast() if final else forecast(graph)
    if setting.cuda:  # its provider has no integer kernels: every other quantize and dequantize stays
        seen = Forecast([f for f in seen.fusions if f.kernel == "MatMulNBits"], seen.reasons)
    out = Judgement(graph, [judge_node(node, setting) for node in low_bit_nodes(graph)])
    out.nodes += [judge_fusion(f, setting) for f in seen.fusions]
    out.findings = [f for v in out.nodes for f in v.findings]
    if target.name == "ort-cpu":
        out.findings += _scale_types(graph) + ([] if final else _broken_by_optimizer(graph))
    rules = Rules(graph, seen.absorbed, seen.dropped, allowed_of(graph) if allowed is None else allowed)
    for found in rules.run():
        out.findings.append(_explain(found, rules, seen.reasons))
    out.nodes += _unfused(rules, out)
    return out


def _scale_types(graph: Graph) -> list[Finding]:
    """Quantizing ops whose scales are of a type that the CPU provider has no kernel for."""
    out = []
    for op in graph.walk():
        scale = op.operand(1) if op.name in DQ | Q else None
        kind = None if scale is None else scale.tensor.dtype
        if kind is not None and kind.name not in ("f32", "f16"):
            short = op.name.rpartition(".")[2]
            reason = f"its scales are {kind}, and the CPU provider has kernels for f32 and f16"
            out.append(Finding("QC201", op.label, f"{short} does not run", reason, "export the model in f32 or f16"))
    return out


def _broken_by_optimizer(graph: Graph) -> list[Finding]:
    """Models that the runtime's own optimizer makes invalid."""
    out = []
    for dq, op in unloadable(graph):
        message = f"ONNX Runtime does not load the model: it moves '{dq.label}' past '{op.label}'"
        reason = "its optimizer turns a moved int8 quantize into uint8 and leaves the stated type int8"
        out.append(Finding("QC902", dq.label, message, reason, "quantize activations to uint8, or use opset 13 to 20"))
    return out


def _explain(found: Finding, rules: Rules, reasons: Mapping[Op, str]) -> Finding:
    """Add why the runtime does not fuse the op that the finding is about."""
    for op, reason in reasons.items():
        if f"'{op.label}'" in found.message:
            return replace(found, reason=f"{found.reason}; ONNX Runtime does not fuse '{op.label}': {reason}")
    return found


def _unfused(rules: Rules, out: Judgement) -> list[NodeVerdict]:
    """Products that read an expanded weight, as sites."""
    found = []
    for op, finding in rules.blamed.items():
        if low_bit(op) is not None:
            continue
        kind = "embedding" if op.name.endswith("Gather") else "conv" if "Conv" in op.name else "linear"
        shape = _weight_shape(op)
        scheme = finding.message.partition(" of ")[2].partition("[")[0] or "low-bit"
        found.append(
            NodeVerdict(op.label, op, op.name.rpartition(".")[2], kind, "dequant", *shape, scheme, findings=[finding])
        )
    return found


def _weight_shape(op: Op) -> tuple[int, int]:
    value = op.operand(0 if op.name == DEFAULT + "Gather" else 1)
    shape = None if value is None else value.tensor.static_shape
    if shape is None or len(shape) < 2:
        return 0, 0
    if op.name == DEFAULT + "Gather" or "Conv" in op.name or op.attrs.get("transB"):
        return shape[0], _size(shape[1:])
    return shape[-1], shape[-2]


def judge_graph(graph: Graph, target: Target, phases: Sequence[Phase] = PHASES) -> list[Finding]:
    """Everything that the static verdict finds in ``graph``; empty when nothing is wrong."""
    return list(dict.fromkeys(examine(graph, target, phases).findings))


def sites_of(graph: Graph) -> list[Site]:
    """The low-bit nodes of ``graph`` as sites with their stored bytes; no kernel is asked."""
    out = []
    for node in low_bit_nodes(graph):
        if node.kind in NO_SITES:
            continue
        before = 0 if node.kind == "matmul" else node.n * node.k * 4
        site = Site(node.op.label, node.kind, node.n, node.k, before, node.scheme_text)
        site.bytes = node.sizes()
        out.append(site)
    return out
