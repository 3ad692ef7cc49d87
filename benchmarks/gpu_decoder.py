"""A whole decoder on a GPU, compiled by ``torch.compile``: tokens a second of decode and prefill, peak memory.

Weights are random and of bf16. A step is one CUDA graph over a static cache. All variants of a size are resident at a
time and take turns, round by round; what does not fit fails by itself and is told.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_timing import Region, interleaved, ratio, region, synchronize
from torch import Tensor, nn

from qcompiler.models.decoder import Decoder, DecoderConfig


@dataclass(frozen=True)
class Size:
    """Sizes of a decoder; ``cache`` positions are allocated."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    cache: int = 4096


SIZES = {
    "1B": Size("1B", 16, 2048, 8192, 32, 8, 128256),
    "8B": Size("8B", 32, 4096, 14336, 32, 8, 128256),
    "tiny": Size("tiny", 2, 128, 256, 4, 2, 256, 64),
}
RECIPES = ("float", "w4a16", "w8a16", "w8a8-dynamic", "fp8")
BATCHES, PROMPTS = (1, 4, 16), (512, 2048)


class Cached(nn.Module):
    """Logits ``[B, 1, V]`` of the last of ``ids [B, S]`` at ``position [S]``; the cache is written in place."""

    def __init__(self, size: Size, batch: int) -> None:
        super().__init__()
        self.size = size
        config = DecoderConfig(size.vocab, size.hidden, size.inner, size.layers, size.heads, size.kv_heads, size.cache)
        self.decoder = Decoder(config)
        shape = (batch, size.kv_heads, size.cache, size.hidden // size.heads)
        for i in range(size.layers):
            self.register_buffer(f"keys{i}", torch.zeros(shape), persistent=False)
            self.register_buffer(f"values{i}", torch.zeros(shape), persistent=False)

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        decoder = self.decoder
        cos, sin = decoder.rope_cos[position], decoder.rope_sin[position]
        mask = torch.arange(self.size.cache, device=ids.device)[None, :] <= position[:, None]
        x = decoder.embedding(ids)
        for i, layer in enumerate(decoder.layers):
            q, k, v = layer.attention.project(layer.attention_norm(x), cos, sin)
            keys, values = getattr(self, f"keys{i}"), getattr(self, f"values{i}")
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v)
            x = x + layer.attention.attend(q, keys, values, mask)
            x = x + layer.feed_forward(layer.feed_forward_norm(x))
        logits: Tensor = decoder.head(decoder.norm(x[:, -1:]))
        return logits


def build(size: Size, batch: int, device: torch.device, recipe: str, inner: str) -> Any:
    """The model, in eval mode on ``device``, compiled with ``recipe`` (plain inductor for ``float``)."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = Cached(size, batch)
    finally:
        torch.set_default_dtype(before)
    model = model.to(torch.bfloat16).eval().requires_grad_(False)  # the tables of the rotary positions, too
    # Every variant and size of input is one more compilation of the same code.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1024
    if recipe == "float":
        return torch.compile(model, backend=inner)
    target = "torch-cuda" if device.type == "cuda" else "torch-cuda:sm_90"
    options = {"recipe": recipe, "target": target, "inner": inner, "release_weights": True}
    return torch.compile(model, backend="qcompiler", options=options)


def weights_of(size: Size) -> int:
    """Weights of the linear layers: what a token reads."""
    kv = size.hidden * size.kv_heads // size.heads
    layer = 2 * size.hidden**2 + 2 * size.hidden * kv + 3 * size.hidden * size.inner
    return size.layers * layer + size.vocab * size.hidden


@dataclass
class Resident:
    """One variant, ready to be run: its record so far, a step and the prompts as regions, what keeps them alive."""

    record: dict[str, Any]
    regions: dict[str, Region]
    kept: list[Any]


def reside(size: Size, batch: int, recipe: str, prompts: tuple[int, ...], device: torch.device, inner: str) -> Resident:
    """Build one variant: bytes that it takes once it has run, and its most while it runs, are part of the record."""
    gc.collect()
    record: dict[str, Any] = {"size": size.name, "batch": batch, "recipe": recipe, "weights": weights_of(size)}
    before = allocated(device)
    with torch.no_grad():
        model = build(size, batch, device, recipe, inner)
        ids = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        at = torch.full((1,), size.cache // 2, dtype=torch.int64, device=device)
        model(ids, at)
        synchronize(device)
        gc.collect()
        record["resident_bytes"] = allocated(device) - before
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        regions, kept = {"decode": region([lambda: model(ids, at)], device)}, [model, ids, at]
        for length in prompts if batch == 1 else ():
            prompt = torch.zeros((batch, length), dtype=torch.int64, device=device)
            positions = torch.arange(length, device=device)
            regions[str(length)] = region([lambda p=prompt, q=positions: model(p, q)], device)
            kept += [prompt, positions]
        if device.type == "cuda":
            record["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    return Resident(record, regions, kept)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def measure(
    size: Size,
    batch: int,
    recipes: Sequence[str],
    prompts: tuple[int, ...],
    device: torch.device,
    inner: str,
    rounds: int,
) -> list[dict[str, Any]]:
    """One record a recipe: seconds of a decode step in the middle of the cache and of each prompt, ratios to float."""
    failed: list[dict[str, Any]] = []
    ready: dict[str, Resident] = {}
    for recipe in recipes:
        try:
            ready[recipe] = reside(size, batch, recipe, prompts, device, inner)
        except Exception as e:  # what a recipe cannot do is a line of the table
            said = " ".join(f"{type(e).__name__}: {e}".split())[:300]
            failed.append({"size": size.name, "batch": batch, "recipe": recipe, "failed": said})
    for what in dict.fromkeys(name for r in ready.values() for name in r.regions):
        times = interleaved({name: r.regions[what] for name, r in ready.items()}, rounds, device)
        for name, found in times.items():
            s, record = statistics.median(found), ready[name].record
            tokens = batch if what == "decode" else int(what)
            told = {"s": s, "tokens_per_s": tokens / s, "rounds": found}
            if "float" in times:
                told["faster"] = ratio(times["float"], found)
            record[what if what == "decode" else f"prefill {what}"] = told
    return [*(r.record for r in ready.values()), *failed]
