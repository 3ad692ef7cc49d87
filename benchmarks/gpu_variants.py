"""Linear layers in every scheme and by every peer, made of random data right where they are timed.

``variants()`` gives them by name. A variant makes the tensors of one layer ``[N, K]``, and calls its kernel on them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from qcompiler.backends.triton.forms import form_called

Tensors = dict[str, Any]
BASE = "cublas bf16"
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Variant:
    """``make(n, k, device, generator)`` gives the tensors that hold the weights; ``run(tensors, x)`` the product.

    ``least`` and ``most`` bound M, ``multiple`` divides N and K. ``package``: what must be installed. ``ours`` runs
    kernels of this project. ``prepare`` makes of the bf16 activation what ``run`` reads, outside the time.
    """

    name: str
    make: Callable[[int, int, torch.device, torch.Generator], Tensors]
    run: Callable[[Tensors, Any], Any]
    ours: bool = False
    least: int = 1
    most: int | None = None
    multiple: int = 1
    package: str = ""
    prepare: Callable[[torch.Tensor], Any] = field(default=lambda x: x)
    cuda_only: bool = False

    def why_not(self, m: int, n: int, k: int, device: torch.device) -> str:
        """Why it does not run this problem here; empty when it does."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.cuda_only and device.type != "cuda":
            return "CUDA only"
        if m < self.least or (self.most is not None and m > self.most):
            return f"M={m} is outside {self.least}..{self.most or ''}"
        if n % self.multiple or k % self.multiple:
            return f"N={n}, K={k} are no multiples of {self.multiple}"
        return ""


def weight_bytes(tensors: Tensors) -> int:
    """Bytes that one product reads of them."""
    return sum(t.numel() * t.element_size() for t in tensors.values() if isinstance(t, torch.Tensor))


def another(value: Any) -> Any:
    """A copy in memory of its own."""
    return value.clone() if isinstance(value, torch.Tensor) else value


# -- ours ----------------------------------------------------------------------------------------------------------


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def packed(
    form: str, group: int, n: int, k: int, device: torch.device, g: torch.Generator, *, zeros: bool = False
) -> Tensors:
    """Random weights in the fragment layout: every code as likely as any other, scales about 1 / sqrt(K)."""
    kind = form_called(form)
    rows, columns = _padded(n, 64), _padded(k, 128)
    shape = (columns // 128, rows, kind.words)
    if kind.name in ("f8e4m3", "f8e5m2"):
        element = FP8 if kind.name == "f8e4m3" else torch.float8_e5m2
        values = torch.randn((*shape[:2], 4 * shape[2]), device=device, generator=g).to(element)
        codes = values.view(torch.int32)
    else:
        codes = torch.randint(-(2**31), 2**31, shape, device=device, generator=g, dtype=torch.int64).to(torch.int32)
    count = columns // group if group else 1
    size = 2.0 ** -(kind.bits - 1) / k**0.5
    scales: torch.Tensor = (torch.rand((count, rows), device=device, generator=g) + 0.5) * size
    out: Tensors = {"codes": codes, "scales": scales.to(torch.bfloat16), "zeros": None, "outer": None}
    if form == "mxfp4":
        out["scales"] = torch.randint(115, 120, (count, rows), device=device, generator=g).to(torch.uint8)
    elif form == "nvfp4":
        out["scales"] = (scales / size).to(FP8)
        out["outer"] = torch.full((1,), size, device=device)
    if zeros:
        top = 1 << kind.bits
        out["zeros"] = torch.randint(0, top, (count, rows), device=device, generator=g).to(torch.int16)
    return out | {"n": n, "group": group, "form": form}


def run_packed(t: Tensors, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.ops.qcompiler.wn_linear(
        x, t["codes"], t["scales"], t["zeros"], t["outer"], None, None, None, t["n"], t["group"], t["form"], "none"
    )
    return y


def _weight_only(name: str, form: str, group: int, *, zeros: bool = False) -> Variant:
    return Variant(
        name, lambda n, k, device, g: packed(form, group, n, k, device, g, zeros=zeros), run_packed, ours=True
    )


def codes8(form: str, n: int, k: int, device: torch.device, g: torch.Generator) -> Tensors:
    """Weights of 8-bit codes by row, one scale a row."""
    if form == "int8":
        codes = torch.randint(-127, 128, (n, k), device=device, generator=g, dtype=torch.int64).to(torch.int8)
        size = 1 / (73 * k**0.5)
    else:
        codes, size = torch.randn((n, k), device=device, generator=g).to(FP8), k**-0.5
    scales = (torch.rand(n, device=device, generator=g) + 0.5) * size
    return {"codes": codes, "scales": scales, "n": n, "group": 0, "form": form}


def quantized(x: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    found: tuple[torch.Tensor, torch.Tensor] = torch.ops.qcompiler.quantize_rows(
        x, None, None, 0.0, torch.int8 if form == "int8" else FP8, 0
    )
    return found


def run_codes(t: Tensors, x: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    y: torch.Tensor = torch.ops.qcompiler.a8_linear(
        *(x[0], x[1], t["codes"], t["scales"], None, None, None, None),
        *(t["n"], t["group"], 0, t["form"], "none", torch.bfloat16),
    )
    return y


def _codes(name: str, form: str, how: str) -> Variant:
    """``how``: the product alone, with the activation quantized before it, or with the norm fused into that."""

    def make(n: int, k: int, device: torch.device, g: torch.Generator) -> Tensors:
        return codes8(form, n, k, device, g) | {"norm": torch.ones(k, device=device, dtype=torch.bfloat16)}

    def whole(t: Tensors, x: torch.Tensor) -> torch.Tensor:
        return run_codes(t, quantized(x, form))

    def normed(t: Tensors, x: torch.Tensor) -> torch.Tensor:
        code = torch.int8 if form == "int8" else FP8
        return run_codes(t, torch.ops.qcompiler.quantize_rows(x, None, t["norm"], 1e-6, code, 0))

    if how == "product":
        return Variant(name, make, run_codes, ours=True, prepare=lambda x: quantized(x, form))
    return Variant(name, make, whole if how == "quantized" else normed, ours=True)


def _four_by_eight(name: str, form: str) -> Variant:
    def make(n: int, k: int, device: torch.device, g: torch.Generator) -> Tensors:
        return packed("int4", 128, n, k, device, g)

    def whole(t: Tensors, x: torch.Tensor) -> torch.Tensor:
        return run_codes(t, quantized(x, form))

    return Variant(name, make, whole, ours=True)


# -- peers ---------------------------------------------------------------------------------------------------------


def _dense(n: int, k: int, device: torch.device, g: torch.Generator) -> Tensors:
    return {"w": (torch.randn((n, k), device=device, generator=g) * k**-0.5).to(torch.bfloat16)}


def _normed_dense(n: int, k: int, device: torch.device, g: torch.Generator) -> Tensors:
    return _dense(n, k, device, g) | {"norm": torch.ones(k, device=device, dtype=torch.bfloat16)}


def _run_normed(t: Tensors, x: torch.Tensor) -> torch.Tensor:
    return F.linear(F.rms_norm(x, x.shape[-1:], t["norm"], 1e-6), t["w"])


def _tinygemm(n: int, k: int, device: torch.device, g: torch.Generator) -> Tensors:
    raw = torch.randint(0, 256, (n, k // 2), device=device, generator=g).to(torch.uint8)
    both = torch.rand((k // 128, n, 2), device=device, generator=g).to(torch.bfloat16)
    return {"w": torch.ops.aten._convert_weight_to_int4pack(raw, 8), "both": both}


def _scaled(n: int, k: int, device: torch.device, g: torch.Generator) -> Tensors:
    t = codes8("f8e4m3", n, k, device, g)
    return {"w": t["codes"], "s": t["scales"][None, :].contiguous()}


def _run_scaled(t: Tensors, x: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return torch._scaled_mm(x[0], t["w"].t(), scale_a=x[1], scale_b=t["s"], out_dtype=torch.bfloat16)


def _int_mm(n: int, k: int, device: torch.device, g: torch.Generator) -> Tensors:
    return {"w": codes8("int8", n, k, device, g)["codes"]}


def _gemlite(n: int, k: int, device: torch.device, g: torch.Generator) -> Tensors:
    from gemlite.helper import A16Wn

    codes = torch.randint(0, 16, (n, k), device=device, generator=g).to(torch.uint8)
    scales = torch.rand((n * k // 128, 1), device=device, generator=g).to(torch.bfloat16)
    layer = A16Wn(device=str(device)).from_weights(codes, scales, torch.full_like(scales, 8.0), 4, 128)
    return {"layer": layer}


def _bitsandbytes(n: int, k: int, device: torch.device, g: torch.Generator) -> Tensors:
    import bitsandbytes.functional as functional

    codes, state = functional.quantize_4bit(_dense(n, k, device, g)["w"], blocksize=64, quant_type="nf4")
    return {"w": codes, "state": state}


def _run_bitsandbytes(t: Tensors, x: torch.Tensor) -> torch.Tensor:
    import bitsandbytes

    y: torch.Tensor = bitsandbytes.matmul_4bit(x, t["w"].t(), quant_state=t["state"])
    return y


def peers() -> Iterator[Variant]:
    yield Variant(BASE, _dense, lambda t, x: F.linear(x, t["w"]))
    yield Variant("norm + cublas bf16", _normed_dense, _run_normed)
    yield Variant(
        "aten int4 (tinygemm) g128",
        _tinygemm,
        lambda t, x: torch.ops.aten._weight_int4pack_mm(x, t["w"], 128, t["both"]),
        multiple=128,
        cuda_only=True,
    )
    yield Variant(
        "aten _scaled_mm rows",
        _scaled,
        _run_scaled,
        multiple=16,
        cuda_only=True,
        prepare=lambda x: quantized(x, "f8e4m3"),
    )
    yield Variant(
        "aten _int_mm",
        _int_mm,
        lambda t, x: torch._int_mm(x[0], t["w"].t()),
        least=17,
        multiple=8,
        prepare=lambda x: quantized(x, "int8"),
    )
    yield Variant(
        "gemlite int4 g128", _gemlite, lambda t, x: t["layer"](x), multiple=128, package="gemlite", cuda_only=True
    )
    yield Variant(
        "bitsandbytes nf4 g64", _bitsandbytes, _run_bitsandbytes, multiple=64, package="bitsandbytes", cuda_only=True
    )


def ours() -> Iterator[Variant]:
    yield _weight_only("w4a16 g128", "int4", 128)
    yield _weight_only("w4a16 g128 asym", "int4", 128, zeros=True)
    yield _weight_only("w4a16 g32", "int4", 32)
    yield _weight_only("w8a16", "int8", 0)
    yield _weight_only("w2a16 g64", "int2", 64, zeros=True)
    yield _weight_only("f8a16", "f8e4m3", 0)
    yield _weight_only("nf4 g64", "nf4", 64)
    yield _weight_only("mxfp4", "mxfp4", 32)
    yield _weight_only("nvfp4", "nvfp4", 16)
    for form, word in (("int8", "w8a8"), ("f8e4m3", "fp8")):
        yield _codes(f"{word} product", form, "product")
        yield _codes(f"{word}", form, "quantized")
        yield _codes(f"norm + {word}", form, "normed")
    yield _four_by_eight("w4a8 int8", "int8")
    yield _four_by_eight("w4a8 fp8", "f8e4m3")


def variants() -> dict[str, Variant]:
    """Every variant by name, the base first."""
    return {v.name: v for v in (*peers(), *ours())}


BASES = {"norm + w8a8": "norm + cublas bf16", "norm + fp8": "norm + cublas bf16"}
"""What a variant is held against, where that is not :data:`BASE`."""
