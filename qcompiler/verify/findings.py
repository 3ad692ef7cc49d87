"""What the verifier says: finding codes, stable for ever, and one finding."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from qcompiler.errors import InputError

Severity = Literal["error", "warning", "info"]

CODES: dict[str, str] = {
    "QC101": "a dequantize feeds a float op",
    "QC102": "a dequantize reaches a float op through data movement",
    "QC103": "a dequantize of a constant was folded back to float",
    "QC104": "the node looks fused but its kernel materialises the weight",
    "QC105": "an activation Q/DQ island around a float op",
    "QC106": "the runtime split or replaced the fused node",
    "QC107": "a redundant Q/DQ pair is left",
    "QC201": "no kernel: data type",
    "QC202": "no kernel: group size",
    "QC203": "no kernel: shape",
    "QC204": "no kernel: zero points",
    "QC205": "no kernel: layout",
    "QC206": "no kernel: architecture",
    "QC207": "no kernel: runtime version",
    "QC301": "NaN or infinity in the weights",
    "QC302": "a zero or non-finite scale",
    "QC303": "a numerical bound is exceeded",
    "QC304": "all scales are the same constant",
    "QC305": "a calibration range was never seen",
    "QC401": "matched by the recipe but not quantized",
    "QC402": "a recipe key matched nothing",
    "QC403": "the share of quantized weight bytes is under the gate",
    "QC501": "the checkpoint's config and tensors disagree",
    "QC502": "an unknown checkpoint format",
    "QC503": "a tensor-parallel shard is misaligned",
    "QC504": "the zero-point version is wrong",
    "QC901": "the graph breaks the rules of the IR",
    "QC902": "the runtime cannot load the model",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing the verifier found. ``op`` is the node's name; an ``error`` rejects the artifact."""

    code: str
    op: str
    message: str
    reason: str = ""
    fix: str = ""
    severity: Severity = "error"

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise InputError(f"no finding code {self.code}; known: {', '.join(CODES)}")

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{self.code} {self.op}: {self.message}"]
        if self.reason:
            parts.append(self.reason)
        if self.fix:
            parts.append(f"fix: {self.fix}")
        return "; ".join(parts)
