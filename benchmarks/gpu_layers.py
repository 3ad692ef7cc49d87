"""The linear layers of the models that are served most, and how each variant is checked and timed on them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_timing import Region, copies_needed, interleaved, ratio, region, spread
from gpu_variants import BASE, BASES, Tensors, Variant, another, variants, weight_bytes


@dataclass(frozen=True)
class Layer:
    """A linear layer ``[N, K]`` of ``model``."""

    model: str
    name: str
    n: int
    k: int


def _decoder(model: str, hidden: int, inner: int, kv: int, split: int = 1, heads: int = 0) -> tuple[Layer, ...]:
    """Fused QKV, output, fused gate and up, down; ``kv`` features of keys, ``split`` ways tensor-parallel."""
    wide = heads or hidden
    return (
        Layer(model, "qkv", (wide + 2 * kv) // split, hidden),
        Layer(model, "o", hidden, wide // split),
        Layer(model, "gate_up", 2 * inner // split, hidden),
        Layer(model, "down", hidden, inner // split),
    )


LAYERS: tuple[Layer, ...] = (
    *_decoder("Llama-3-8B", 4096, 14336, 1024),
    *_decoder("Qwen2.5-3B", 2048, 11008, 256),
    *_decoder("Qwen2.5-7B", 3584, 18944, 512),
    *_decoder("Llama-3-70B/4", 8192, 28672, 1024, split=4),
    Layer("square", "4096", 4096, 4096),
    Layer("large", "8192x28672", 28672, 8192),
)
TINY_LAYERS = (Layer("tiny", "ragged", 200, 384),)
ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)

TOLERANCE = {"float": 8e-3, "codes": 8e-3}
"""Largest ``||out - ref|| / ||ref||`` on bf16 results. Rounding the result to bf16 is 1.7e-3, rounding scaled weights
to bf16 as kernels for many rows do 2.2e-3 more; where activations are quantized beforehand both read the same codes."""


def random_rows(m: int, k: int, device: torch.device, g: torch.Generator) -> torch.Tensor:
    return torch.randn((m, k), device=device, generator=g).to(torch.bfloat16)


def on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cpu()
    return tuple(on_cpu(v) for v in value) if isinstance(value, tuple) else value


def check(v: Variant, layer: Layer, m: int, device: torch.device) -> dict[str, Any]:
    """``v`` against its reference on the CPU in f32; every element that is not written is NaN."""
    g = torch.Generator(device).manual_seed(m)
    tensors = v.make(layer.n, layer.k, device, g)
    x = v.prepare(random_rows(m, layer.k, device, g))
    torch.use_deterministic_algorithms(True, warn_only=True)  # has torch.empty filled with NaN
    try:
        got = v.run(tensors, x).float().cpu()
    finally:
        torch.use_deterministic_algorithms(False)
    want = v.run({k: on_cpu(t) for k, t in tensors.items()}, on_cpu(x)).float()
    off = float((got - want).norm() / want.norm())
    bound = TOLERANCE["codes" if isinstance(x, tuple) else "float"]
    return {"variant": v.name, "m": m, "n": layer.n, "k": layer.k, "off": off, "ok": off <= bound}


def check_all(chosen: Sequence[Variant], device: torch.device, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Each of ours on a ragged layer and on one of whole tiles, at each M; NaN never passes."""
    found = []
    for v in chosen:
        for layer in (Layer("check", "ragged", 200, 384), Layer("check", "whole", 512, 1024)):
            for m in rows:
                if v.ours and not v.why_not(m, layer.n, layer.k, device):
                    try:
                        found.append(check(v, layer, m, device))
                    except Exception as e:  # a kernel that fails is a line of the table
                        said = f"{type(e).__name__}: {e}"[:300]
                        found.append({"variant": v.name, "m": m, "n": layer.n, "k": layer.k, "ok": False, "said": said})
    return found


def _rotated(
    v: Variant, layer: Layer, m: int, device: torch.device, g: torch.Generator
) -> tuple[Region, int, list[Any]]:
    first: Tensors = v.make(layer.n, layer.k, device, g)
    size = weight_bytes(first)
    sets = [first]
    while len(sets) < copies_needed(size, device):
        sets.append({k: another(t) for k, t in first.items()})
    inputs = [v.prepare(random_rows(m, layer.k, device, g)) for _ in sets]
    calls = [lambda t=t, x=x: v.run(t, x) for t, x in zip(sets, inputs, strict=True)]
    return region(calls, device), size, [sets, inputs]


def measure(
    layer: Layer, m: int, chosen: Sequence[str], rounds: int, device: torch.device, limits: dict[str, float]
) -> list[dict[str, Any]]:
    """One record a variant: seconds, shares of the ceilings, how many times as fast as cuBLAS in the same rounds."""
    g = torch.Generator(device).manual_seed(7)
    regions: dict[str, Region] = {}
    sizes: dict[str, int] = {}
    alive: list[Any] = []
    records: list[dict[str, Any]] = []
    about = {"model": layer.model, "layer": layer.name, "n": layer.n, "k": layer.k, "m": m}
    for name, v in variants().items():
        if name not in chosen:
            continue
        if why := v.why_not(m, layer.n, layer.k, device):
            records.append(about | {"variant": name, "skipped": why})
            continue
        try:
            regions[name], sizes[name], kept = _rotated(v, layer, m, device, g)
            alive.append(kept)
        except Exception as e:  # what a variant cannot do is a line of the table
            records.append(about | {"variant": name, "failed": f"{type(e).__name__}: {e}"[:300]})
    times = interleaved(regions, rounds, device)
    flop = 2 * m * layer.n * layer.k
    for name, found in times.items():
        s = statistics.median(found)
        record = about | {"variant": name, "s": s, "weight_bytes": sizes[name], "rounds": found}
        record["bandwidth_share"] = sizes[name] / s / limits["copy_bytes_per_s"]
        record["read_share"] = sizes[name] / s / limits["read_bytes_per_s"]
        record["rate_share"] = flop / s / limits["bf16_flop_per_s"]
        base = BASES.get(name, BASE)
        if base in times:
            record["faster"], record["quartiles"] = ratio(times[base], found), spread(times[base], found)
        records.append(record)
    return records
