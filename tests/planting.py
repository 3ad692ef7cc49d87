"""Outliers planted in a trained decoder by a rescale that changes nothing: what quantizing must then cope with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def places(module: nn.Module) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """Name, what scales an activation (a norm's weight ``[K]``, or the rows ``[K, C]`` of a linear) and the weights
    ``[N, K]`` that read it, for each place of a decoder of this package or a transformers llama."""
    ours = hasattr(module, "embedding")
    core: Any = module if ours else module.model
    for number, layer in enumerate(core.layers):
        attention = layer.attention if ours else layer.self_attn
        first, second = (
            (layer.attention_norm, layer.feed_forward_norm)
            if ours
            else (layer.input_layernorm, layer.post_attention_layernorm)
        )
        gated = layer.feed_forward if ours else layer.mlp
        yield (
            f"{number}.attention",
            first.weight,
            [p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)],
        )
        yield f"{number}.gate_up", second.weight, [gated.gate_proj.weight, gated.up_proj.weight]
        yield f"{number}.down", gated.up_proj.weight, [gated.down_proj.weight]
    head: Any = module.head if ours else module.lm_head
    embedding: Any = module.embedding if ours else core.embed_tokens
    if head.weight.data_ptr() != embedding.weight.data_ptr():
        yield "head", core.norm.weight, [head.weight]


def plant(module: nn.Module, factor: float, *, channels: int = 3, seed: int = 0) -> None:
    """Multiply ``channels`` channels of every place by ``factor``, and divide the weights that read them by it.

    In place. The function stays the same but for rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, scale, readers in places(module):
            chosen = torch.randperm(len(scale), generator=generator)[:channels]
            scale[chosen] *= factor
            for weight in readers:
                weight[:, chosen] /= factor
