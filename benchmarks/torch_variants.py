"""The ways in which the torch benchmarks run a model: float, ours, torchao's; why one may be slower than float."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Module = nn.Module
Callee = Callable[..., Any]


@dataclass(frozen=True)
class Variant:
    """``made`` turns a float module in ``dtype`` into what is called; ``bits`` are those of a weight, scales included.
    ``frozen`` asks inductor to pack the weights for oneDNN, which keeps a second copy of them."""

    name: str
    dtype: torch.dtype
    bits: float
    made: Callable[[Module], Callee]
    kernel: str
    frozen: bool = False

    def patched(self) -> Any:
        """A context in which it is called for the first time at each size."""
        if not self.frozen:
            return nullcontext()
        from torch._inductor import config

        return config.patch(freezing=True)

    def weight_bytes(self, weights: int) -> float:
        """Bytes of so many weights."""
        return weights * self.bits / 8


def eager(module: Module) -> Callee:
    return module


def inductor(module: Module) -> Callee:
    compiled: Callee = torch.compile(module, dynamic=False)
    return compiled


def ours(recipe: str) -> Callable[[Module], Callee]:
    def made(module: Module) -> Callee:
        options = {"recipe": recipe, "release_weights": True}
        compiled: Callee = torch.compile(module, dynamic=False, backend="qcompiler", options=options)
        return compiled

    return made


def torchao(config: Callable[[Any], Any]) -> Callable[[Module], Callee]:
    """torchao's ``quantize_`` in the module, inductor over it: its tensor subclasses are slow when run eagerly."""

    def made(module: Module) -> Callee:
        from torchao import quantization

        quantization.quantize_(module, config(quantization))
        if all(type(p) is nn.Parameter for p in module.parameters()):
            raise RuntimeError("torchao passed over every layer and left it in float")
        gc.collect()
        return inductor(module)

    return made


def _int4_cpu(quantization: Any) -> Any:
    """torchao's int4 for CPUs, which some releases have under one of two names and 0.15 to 0.18 have not."""
    try:
        from torchao.dtypes import Int4CPULayout
    except ImportError:
        return quantization.Int4WeightOnlyConfig(group_size=128, int4_packing_format="opaque")
    return quantization.Int4WeightOnlyConfig(group_size=128, layout=Int4CPULayout(), version=1)


F32, BF16 = torch.float32, torch.bfloat16
INT4, INT8 = 4 + 32 / 128, 8.0
"""int4 in groups of 128 keeps a scale and an offset in bf16 for each."""
PACK4, PACK8, QLINEAR = "aten._weight_int4pack_mm_for_cpu", "aten._weight_int8pack_mm", "onednn.qlinear_pointwise"
FLOATS = (
    Variant("fp32 eager", F32, 32, eager, "mkl sgemm"),
    Variant("fp32 inductor", F32, 32, inductor, "mkl sgemm"),
    Variant("bf16 eager", BF16, 16, eager, "oneDNN bf16"),
    Variant("bf16 inductor", BF16, 16, inductor, "oneDNN bf16"),
    Variant("bf16 inductor, frozen", BF16, 16, inductor, "oneDNN bf16, packed", frozen=True),
)
OURS = (
    Variant("w4a16 of fp32", F32, INT4, ours("w4a16"), PACK4),
    Variant("w4a16 of bf16", BF16, INT4, ours("w4a16"), PACK4),
    Variant("w8a16 of fp32", F32, INT8, ours("w8a16"), PACK8),
    Variant("w8a16 of bf16", BF16, INT8, ours("w8a16"), PACK8),
    Variant("w8a8-dynamic of fp32", F32, INT8, ours("w8a8-dynamic"), QLINEAR),
    Variant("w8a8-dynamic of bf16", BF16, INT8, ours("w8a8-dynamic"), QLINEAR),
)
PEERS = (
    Variant("torchao int4 weight-only", BF16, INT4, torchao(_int4_cpu), PACK4),
    Variant("torchao int8 weight-only", BF16, INT8, torchao(lambda q: q.Int8WeightOnlyConfig()), PACK8),
    Variant(
        "torchao int8 dynamic", BF16, INT8, torchao(lambda q: q.Int8DynamicActivationInt8WeightConfig()), "aten._int_mm"
    ),
)
BASES = ("fp32 eager", "bf16 inductor")
"""What the others are held to."""


def variants() -> list[Variant]:
    """All of them; torchao's where it is installed."""
    peers = PEERS if importlib.util.find_spec("torchao") else ()
    return [*FLOATS, *OURS, *peers]


def by_name(name: str) -> Variant:
    return next(v for v in [*FLOATS, *OURS, *PEERS] if v.name == name)


WHY = {
    PACK4: (
        "the kernel reads every code once for each few rows and expands it to bf16 in registers again: its time grows "
        "with the rows, while a float product reuses each weight that it has loaded for all rows"
    ),
    PACK8: (
        "the kernel widens codes and multiplies in f32 without blocks for the cache: its time grows with the rows, "
        "while a float product is blocked and, in bf16, has twice the products in an instruction"
    ),
    QLINEAR: (
        "at few rows the product is as short as finding the range of the activations, rounding them and one more call"
    ),
    "aten._int_mm": "activations are quantized and sums rescaled in passes of their own",
    "mkl sgemm": "f32 weights are twice the bytes of bf16 and its instructions do half the products",
    "oneDNN bf16": "the weight is packed anew at each call",
    "oneDNN bf16, packed": "inductor adds its own calls around the same product",
}
"""Kernel -> why a variant that runs on it may be slower than a float product."""


def released() -> None:
    """Collect what nothing refers to, and give freed pages back to the system."""
    import ctypes

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
