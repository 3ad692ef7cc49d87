"""What a low-bit call of torch must satisfy beyond its kernel rows, as one table: types, shapes, layout, constness.

Rows say which kernel serves a weight; these conditions say when torch's CPU operator does something else than its name
promises: scalar code, wrong numbers, a crash, a whole weight expanded. Each was measured on torch 2.13 (x86-64 with
AVX-512); the numbers in the reasons are microseconds or ratios of that measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qcompiler.backends.torch import conditions_triton as triton
from qcompiler.backends.torch.held import INT4, INT8, LowBit, argument
from qcompiler.backends.torch.nodes_triton import SLOTS
from qcompiler.dtypes import BF16
from qcompiler.ir import Value
from qcompiler.target import Phase, Target
from qcompiler.verify.evidence import Verdict
from qcompiler.verify.flow import is_constant

WIDTH = "qcompiler.int4pack"
"""Key of the metadata that says for which vector width the int4 weights of a program are packed."""


@dataclass(frozen=True)
class Setting:
    """Where a call is judged: the target, the phases, what the artifact's metadata says."""

    target: Target
    phases: tuple[Phase, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.target.name == "torch-cuda"

    @property
    def width(self) -> str:
        """The vector width for which the target's int4 row packs; empty where it has no such row."""
        return next((r.layout.rpartition("_")[2] for r in self.target.rows if r.name.endswith("/int4pack")), "")


Test = Callable[[LowBit, Setting], str | None]
"""The reason, with its numbers, when the condition is broken."""


@dataclass(frozen=True)
class Condition:
    """``verdict`` of a call of one of ``ops`` (without overload; empty: all) for which ``test`` gives a reason."""

    code: str
    verdict: Verdict
    ops: frozenset[str]
    test: Test
    fix: str
    targets: frozenset[str] = frozenset({"torch-cpu"})


def _changes(value: Value | None) -> str | None:
    """Why ``value`` may change from call to call; None for a constant or an absent one."""
    if value is None or value.payload is not None or is_constant(value):
        return None
    how = "an input" if value.is_input or value.owner is None else f"computed by {value.owner.name}"
    return f"'{value.name}' is {how}"


def _codes_change(n: LowBit, s: Setting) -> str | None:
    why = None if n.kind == "matmul" else _changes(n.codes)
    return None if why is None else f"its codes {why}, so no weight is stored in few bits"


def _packed_each_time(n: LowBit, s: Setting) -> str | None:
    maker = None if n.codes is None else n.codes.owner
    if maker is None or "prepack" not in maker.name:
        return None
    return f"{maker.name} '{maker.label}' packs the weight on each call, 100 times the work of the product at M=1"


def _scalar(op: str) -> Test:
    def test(n: LowBit, s: Setting) -> str | None:
        kind = n.activation
        if kind is None or kind == BF16:
            return None
        return f"it has vector code for bf16 activations only; with {kind} ones {op}"

    return test


def _int4_group(n: LowBit, s: Setting) -> str | None:
    group = argument(n.op, 2)
    return None if group in (32, 64, 128, 256) else f"its group is {group}; the kernel takes 32, 64, 128 and 256"


def _int4_shape(n: LowBit, s: Setting) -> str | None:
    group = argument(n.op, 2)
    if n.rows % 16:
        return f"N={n.rows} is no multiple of 16"
    if isinstance(group, int) and group > 0 and n.columns % group:
        return f"K={n.columns} is no multiple of the group {group}"
    return None


def _int4_width(n: LowBit, s: Setting) -> str | None:
    have = s.metadata.get(WIDTH, "")
    if not have or not s.width or have == s.width:
        return None
    return f"its weight is packed for {have}, and {s.target} reads it as packed for {s.width}"


def _int8_columns(n: LowBit, s: Setting) -> str | None:
    if n.activation is not None and n.activation != BF16:
        return None
    return None if n.columns % 16 == 0 else f"K={n.columns} is no multiple of 16: its bf16 kernel reads past the rows"


def _signed(n: LowBit, s: Setting) -> str | None:
    kind = n.activation
    return "int8 activations take oneDNN's reference code, 270 times slower" if kind and kind.name == "int8" else None


def _not_packed(n: LowBit, s: Setting) -> str | None:
    codes = argument(n.op, 3)
    plain = isinstance(codes, Value) and (codes.payload is not None or codes.is_input)
    return f"its weight '{codes.name}' is a plain tensor that was not prepacked: the process dies" if plain else None


def _fp8(n: LowBit, s: Setting) -> str | None:
    kind = n.activation
    return f"{kind} activations take oneDNN's reference code" if kind is not None and kind.is_float else None


def _always(reason: str) -> Test:
    return lambda n, s: reason


def _unknown(n: LowBit, s: Setting) -> str | None:
    return None if n.known else "nothing is known of its kernel: it was never seen to leave the weight in few bits"


def _absent(n: LowBit, s: Setting) -> str | None:
    if n.call in SLOTS or n.kind == "matmul":
        return None
    return f"torch-cuda has no row for {n.call}, so nothing says that its kernel leaves the weight in few bits"


def _alone(test: Callable[[LowBit], str | None]) -> Test:
    return lambda n, s: test(n)


_QLINEAR = frozenset({"onednn.qlinear_pointwise"})
_ONEDNN = _QLINEAR | {f"onednn.qconv{d}_pointwise" for d in ("", "1d", "2d", "3d")}
_OURS = frozenset({"qcompiler.qlinear", "qcompiler.qconv"})
_CUDA_ONLY = frozenset(
    {"aten._weight_int4pack_mm", "aten._weight_int4pack_mm_with_scales_and_zeros", "quantized.int4mm_packed_weight_cpu"}
)
_TRITON = frozenset(SLOTS)
CUDA, BOTH = frozenset({"torch-cuda"}), frozenset({"torch-cpu", "torch-cuda"})
_AGAIN = "compile the float model again; the call was changed by hand"
_BF16_FIX = "cast the activation to bf16, or compile with qcompiler"
_TO_ROWS = "compile the float model with qcompiler: 'w4a16', 'w8a16' or 'w8a8-dynamic'"
FP8 = frozenset({"aten._scaled_mm", "aten._scaled_mm_v2"})

CONDITIONS: tuple[Condition, ...] = (
    Condition(
        "QC201", "error", _CUDA_ONLY - {"quantized.int4mm_packed_weight_cpu"}, _always("it has no CPU kernel"), _TO_ROWS
    ),
    Condition("QC205", "error", _QLINEAR | _ONEDNN, _not_packed, "call qcompiler::qlinear, which packs once"),
    Condition("QC203", "wrong", frozenset({INT8}), _int8_columns, "pad K to a multiple of 16 with codes of 0"),
    Condition("QC202", "error", frozenset({INT4}), _int4_group, "quantize with groups of 32, 64, 128 or 256"),
    Condition("QC203", "error", frozenset({INT4}), _int4_shape, "pad the weight with rows, or columns, of zeros"),
    Condition("QC205", "wrong", frozenset({INT4}), _int4_width, "compile for the chip that runs it"),
    Condition(
        "QC104", "dequant", FP8, _always("its CPU code expands activation and weight to f32 on each call"), _TO_ROWS
    ),
    Condition(
        "QC104",
        "dequant",
        frozenset({"quantized.linear_dynamic_fp16_unpacked_weight"}),
        _always("it packs the weight on each call"),
        _TO_ROWS,
    ),
    Condition("QC205", "dequant", _ONEDNN | _OURS, _packed_each_time, "pack the weight once"),
    Condition("QC104", "dequant", frozenset(), _codes_change, "store the codes as a buffer of the model", BOTH),
    Condition("QC104", "dequant", frozenset(), _unknown, _TO_ROWS),
    Condition(
        "QC201",
        "slow",
        frozenset({INT4}),
        _scalar("scalar code is 15 to 60 times slower than the float product"),
        _BF16_FIX,
    ),
    Condition(
        "QC201",
        "slow",
        frozenset({INT8}),
        _scalar("scalar code is 8 to 70 times slower than the float product"),
        _BF16_FIX,
    ),
    Condition("QC201", "slow", _ONEDNN | _OURS, _signed, "shift activations to uint8: add 128 to codes and zero point"),
    Condition("QC206", "slow", _ONEDNN, _fp8, _TO_ROWS),
    Condition(
        "QC206",
        "slow",
        frozenset({"aten._dyn_quant_matmul_4bit"}),
        _always("its kernels are for Arm; on x86 it is 30 times slower than int4pack"),
        _TO_ROWS,
    ),
    Condition("QC206", "dequant", frozenset(), _absent, "compile the float model for torch-cuda", CUDA),
    Condition("QC201", "error", _TRITON, _alone(triton.form_unknown), _AGAIN, BOTH),
    Condition("QC202", "error", _TRITON, _alone(triton.group_wrong), _AGAIN, BOTH),
    Condition("QC205", "error", _TRITON, _alone(triton.codes_wrong), _AGAIN, BOTH),
    Condition("QC203", "error", _TRITON, _alone(triton.parameters_wrong), _AGAIN, BOTH),
    Condition("QC104", "dequant", _TRITON, _alone(triton.parameters_change), "store them as buffers", BOTH),
    Condition(
        "QC206",
        "dequant",
        _TRITON,
        _always("its kernel is for GPUs; on a CPU a reference expands the weight piece by piece"),
        "compile for torch-cpu",
    ),
)


def broken(node: LowBit, setting: Setting) -> list[tuple[Condition, str]]:
    """The conditions that ``node`` breaks, with reasons: the first of each verdict, one alone if it does not run."""
    out: list[tuple[Condition, str]] = []
    for condition in CONDITIONS:
        if (condition.ops and node.call not in condition.ops) or setting.target.name not in condition.targets:
            continue
        reason = condition.test(node, setting)
        if reason is not None and not any(c.verdict == condition.verdict for c, _ in out):
            out.append((condition, reason))
    return [b for b in out if b[0].verdict == "error"] or out
