"""Static rules that know no runtime: where a dequantize is left over, how it is spelled, and which float op it feeds.

They hold for every host dialect and for ``q.*``. Whoever knows which ops a runtime will fuse says so with ``absorbed``:
those ops are passed over. A dequantize counts however it is written: by its own op, by a cast of low-bit codes followed
by arithmetic, before or behind data movement.

What is *no* fault: leaving integers for good (a dequantize of what an integer kernel made, which feeds no product and
is not quantized again), and the dequantize of rows that were looked up before they were expanded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import networkx as nx

from qcompiler.ir import Graph, Op, Value
from qcompiler.verify.findings import Finding, Severity
from qcompiler.verify.flow import Reached, describe, is_constant, movement, reached, source_of
from qcompiler.verify.op_kinds import (
    LOOKUPS,
    ORDER_KEEPERS,
    base_name,
    is_activation_slot,
    is_dequantize,
    is_factor,
    is_fake_quantize,
    is_integer_kernel,
    is_product,
    is_quantize,
)
from qcompiler.verify.spelled import root_codes, spread

FIX_WEIGHT = "let a fused kernel read the codes: compile with qcompiler, or emit the runtime's low-bit node"
FIX_ISLAND = "drop the quantize and dequantize around this op, or use an op that the runtime computes on codes"
FIX_PAIR = "remove the pair: it changes nothing but rounding"


ALLOWABLE = frozenset({"QC105", "QC107"})
"""What an op that is known to stand in float between codes may cause: a warning then, with the reason."""


@dataclass
class Rules:
    """One judgement of one graph. ``absorbed``: ops known to be fused away; ``dropped``: ops known to do nothing.

    ``allowed``: label of an op -> why it stands in float between codes.
    """

    graph: Graph
    absorbed: AbstractSet[Op] = frozenset()
    dropped: AbstractSet[Op] = frozenset()
    allowed: Mapping[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    blamed: dict[Op, Finding] = field(default_factory=dict)
    """Float op -> the finding of the weight that it reads expanded."""

    def __post_init__(self) -> None:
        self.moves = movement(self.graph, self.dropped)
        self.folds = self.graph.dialect == "onnx"
        """The runtime computes what is constant when it loads the model; torch computes it on each call."""

    def run(self) -> list[Finding]:
        """All findings: weights first, since what surrounds an unfused weight is its consequence."""
        ops = [op for op in self.graph.walk() if op not in self.absorbed and op.results]
        dequantizes = [op for op in ops if is_dequantize(op)]
        for op in dequantizes:
            if self.codes_are_constant(op):
                self.weight(op)
        for op in ops:
            if not is_dequantize(op) and (source := root_codes(op)) is not None:
                self.arithmetic(op, source)
            if is_fake_quantize(op):
                self.rounded(op)
        for op in dequantizes:
            if not self.codes_are_constant(op):
                self.activation(op)
        return self.findings

    def add(
        self,
        code: str,
        op: Op,
        message: str,
        reason: str,
        fix: str,
        severity: Severity = "error",
        about: Sequence[Op] = (),
    ) -> Finding:
        """Record a finding on ``op`` that concerns the ops ``about`` too."""
        known = next((self.allowed[o.label] for o in (op, *about) if o.label in self.allowed), None)
        if code in ALLOWABLE and known is not None:
            severity, reason = "warning", f"{reason}; allowed: {known}"
        found = Finding(code, op.label, message, reason, fix, severity)
        if found not in self.findings:
            self.findings.append(found)
        return found

    def codes_are_constant(self, op: Op) -> bool:
        codes = op.operand(0)
        if codes is None:
            return False
        source, looked_up = source_of(codes)
        if looked_up:
            return False
        if source.is_const or (source.is_input and source.payload is not None):
            return True
        return not self.folds and is_constant(source)

    # -- weights ---------------------------------------------------------------------------------------------

    def weight(self, op: Op) -> None:
        """A dequantized constant: an error, or a warning for a vector that is no factor of a product."""
        codes = op.operand(0)
        assert codes is not None
        what = describe(source_of(codes)[0])
        vector = sum(d != 1 for d in codes.tensor.shape or (0, 0)) < 2
        for r in reached(op.results[0], self.moves):
            if r.op in self.absorbed:
                continue
            small = vector and not (is_product(r.op) and r.slot < 2 and is_factor(r.op, r.slot))
            if is_quantize(r.op):
                reason = f"a constant of {what} is dequantized and quantized again"
                self.add("QC107", op, f"{base_name(op)} feeds {base_name(r.op)} '{r.op.label}'", reason, FIX_PAIR)
                continue
            through = " -> ".join(f"{base_name(m)} '{m.label}'" for m in r.path)
            lookup = next((m for m in r.path if m.name in LOOKUPS), None)
            message = f"{base_name(op)} of {what} feeds {base_name(r.op)} '{r.op.label}'"
            reason = "the whole tensor is expanded to float on each call"
            if lookup is not None:
                reason = f"the whole table is expanded before {base_name(lookup)} '{lookup.label}' picks a few rows"
            if through:
                message += f" through {through}"
            found = self.add(
                "QC102" if r.path else "QC101", op, message, reason, FIX_WEIGHT, "warning" if small else "error"
            )
            if not small:
                self.blamed.setdefault(r.op, found)
        self.exposed(op, what, vector)

    def exposed(self, op: Op, what: str, vector: bool) -> None:
        """A dequantized weight that leaves the graph."""
        values = [op.results[0], *(nx.descendants(self.moves, op.results[0]) if op.results[0] in self.moves else ())]
        if any(v.is_output for v in values):
            message = f"{base_name(op)} of {what} is an output of its graph"
            reason = "the expanded tensor must exist, so no kernel can read the codes instead"
            self.add("QC101", op, message, reason, "give out the codes, or nothing", "warning" if vector else "error")

    def arithmetic(self, op: Op, source: Value) -> None:
        """Low-bit constant -> cast -> arithmetic -> product: a dequantize in all but name. ``op`` makes the floats."""
        constant, products = spread(op)
        for r in products:
            read = r.op.operand(r.slot)
            if read is None or ((source.tensor.rank or 0) < 2 and (self.folds or (read.tensor.rank or 0) < 2)):
                continue
            steps = " -> ".join(f"{base_name(m)} '{m.label}'" for m in r.path)
            message = f"{describe(source)}, is dequantized by {steps} and feeds {base_name(r.op)} '{r.op.label}'"
            if constant and self.folds:
                reason = "all of it is constant, so the runtime folds it into a float weight when it loads the model"
                found = self.add("QC103", op, message, reason, FIX_WEIGHT)
            else:
                found = self.add("QC101", op, message, "the whole tensor is expanded to float on each call", FIX_WEIGHT)
            self.blamed.setdefault(r.op, found)

    # -- activations -----------------------------------------------------------------------------------------

    def activation(self, op: Op) -> None:
        codes = op.operand(0)
        assert codes is not None
        source, looked_up = source_of(codes)
        maker = source.owner
        fused = maker in self.absorbed
        quantized = maker is not None and is_quantize(maker) and not fused
        kernel = maker is not None and (fused or is_integer_kernel(maker) or maker.name in ORDER_KEEPERS)
        every = reached(op.results[0], self.moves)
        users = [r for r in every if r.op not in self.absorbed]
        for r in users:
            if is_quantize(r.op):
                self.requantized(op, r)
            elif r.op in self.blamed:
                continue
            elif is_product(r.op):
                if not (looked_up and source.is_const and is_activation_slot(r.op, r.slot)):  # rows of a table
                    self.product(op, r, cache=not quantized and not kernel)
            elif quantized or self.quantized_again(r.op):
                self.island(op, r.op, maker if quantized else None)
        if quantized and not every and maker is not None and not looked_up:
            message = f"{base_name(maker)} '{maker.label}' and {base_name(op)} stand behind one another"
            self.add("QC107", op, message, "nothing between them computes on the codes", FIX_PAIR, "warning")

    def product(self, op: Op, r: Reached, *, cache: bool) -> None:
        through = "".join(f" through {base_name(m)} '{m.label}'" for m in r.path)
        message = f"{base_name(op)} feeds {base_name(r.op)} '{r.op.label}'{through}"
        if cache:
            reason = "codes that the model is given (a cache, a weight) are expanded to float on each call"
            self.add("QC102" if r.path else "QC101", op, message, reason, FIX_WEIGHT)
        else:
            reason = "the product runs in float on a dequantized activation"
            self.add("QC105", op, message, reason, FIX_ISLAND, about=[r.op, *r.path])

    def island(self, op: Op, user: Op, maker: Op | None) -> None:
        first = f"{base_name(maker)} '{maker.label}' -> " if maker is not None else ""
        message = f"{first}{base_name(op)} feeds {base_name(user)} '{user.label}'"
        again = ", and its result is quantized again" if self.quantized_again(user) else ""
        reason = f"{base_name(user)} runs in float between codes{again}"
        self.add("QC105", op, message, reason, FIX_ISLAND, about=[user])

    def requantized(self, op: Op, r: Reached) -> None:
        if r.path:
            through = ", ".join(f"{base_name(m)} '{m.label}'" for m in r.path)
            message = f"{base_name(op)} and {base_name(r.op)} '{r.op.label}' stand around {through}"
            reason = "data movement runs in float between codes"
            self.add("QC105", op, message, reason, "give both the same scale", about=[r.op, *r.path])
        else:
            message = f"{base_name(op)} feeds {base_name(r.op)} '{r.op.label}'"
            self.add("QC107", op, message, "codes are turned to float and back", FIX_PAIR, about=[r.op])

    def rounded(self, op: Op) -> None:
        """Quantization that is only simulated: floats before and behind."""
        message = f"{base_name(op)} '{op.label}' rounds {describe(op.results[0])} to codes and back"
        reason = "it simulates quantization as in training: everything behind it runs in float"
        fix = "convert the trained model, or compile the float one"
        self.add("QC107", op, message, reason, fix)

    def quantized_again(self, op: Op) -> bool:
        return any(is_quantize(r.op) for v in op.results for r in reached(v, self.moves) if r.op not in self.absorbed)


def find_unfused(graph: Graph, absorbed: AbstractSet[Op] = frozenset()) -> list[Finding]:
    """Every dequantize left over in ``graph`` and its regions, as findings; ``absorbed`` ops are passed over."""
    return Rules(graph, absorbed).run()


def find_spelled_out(graph: Graph) -> list[Finding]:
    """Only the dequantizes that are written as casts and arithmetic: optimizers fold them and leave no trace."""
    rules = Rules(graph)
    for op in graph.walk():
        if op.results and not is_dequantize(op) and (source := root_codes(op)) is not None:
            rules.arithmetic(op, source)
    return rules.findings
