"""What the constants of a program hold that no low-bit weight should: broken scales, floats that were codes once."""

from __future__ import annotations

import numpy as np

from qcompiler.backends.onnx.folded import RUN, on_grid
from qcompiler.backends.torch.judge import Judgement, NodeVerdict
from qcompiler.backends.torch.nodes_triton import SLOTS, form_at, fragments, number_at
from qcompiler.backends.triton.layouts import ROWS
from qcompiler.dtypes import Array
from qcompiler.payload import ComputedPayload
from qcompiler.verify.findings import Finding
from qcompiler.verify.op_kinds import LOOKUPS, base_name, is_product


def check_stored(judged: Judgement) -> list[Finding]:
    """QC302: scales of 0 or that are no numbers. QC103: float weights that lie on a low-bit grid."""
    out = [f for v in judged.nodes if (f := _scales(v)) is not None]
    for op in judged.graph.walk():
        if not is_product(op) and op.name not in LOOKUPS:
            continue
        for value in op.operands:
            if value is not None and value.is_const and (levels := on_grid(value, op)):
                message = f"the float weight '{value.name}' of {base_name(op)} '{op.label}' holds dequantized codes"
                reason = f"runs of {RUN} values or more lie on even grids of at most {levels} steps"
                fix = "keep the codes: fold no dequantize of a weight"
                out.append(Finding("QC103", op.label, message, reason, fix))
    return out


def _unpadded(verdict: NodeVerdict, held: Array) -> Array:
    """The scales of weights that there are: those of padding are 0, and nothing is multiplied with them."""
    node = verdict.node
    slots = None if node is None else SLOTS.get(node.call)
    if node is None or slots is None:
        return held[..., 0] if held.ndim == 3 else held
    if not fragments(slots, node.call, form_at(node.op, slots)):
        return held
    group = number_at(node.op, slots.group)
    held = held[..., : -(-node.k // group) if group > 0 else 1, : node.n]
    if node.kind != "embedding" or held.shape[-1] != node.rows:
        return held
    # A table does not say how many rows it has; those at the end of its last 64 may be none.
    used = np.flatnonzero(held.any(axis=0))
    return held[:, : max(int(used[-1]) + 1 if used.size else 0, node.rows - ROWS + 1)]


def _scales(verdict: NodeVerdict) -> Finding | None:
    value = None if verdict.node is None else verdict.node.scales
    payload = None if value is None else value.payload
    if value is None or payload is None or isinstance(payload, ComputedPayload) or not payload.dtype.is_float:
        return None
    held = payload.array().astype(np.float32)
    held = _unpadded(verdict, held)
    broken = int(np.count_nonzero(~np.isfinite(held)))
    zeros = int(np.count_nonzero(held == 0))
    if not broken and not zeros:
        return None
    reason = f"'{value.name}' multiplies the codes of {verdict.n}x{verdict.k}"
    if broken:
        message = f"{broken} of {held.size} scales of '{verdict.name}' are infinite or no numbers"
        return Finding("QC302", verdict.name, message, reason, "quantize this weight again")
    message = f"{zeros} of {held.size} scales of '{verdict.name}' are 0"
    return Finding("QC302", verdict.name, message, reason, "see whether these channels are dead", "warning")
