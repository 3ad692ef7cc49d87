"""A llama-style decoder in plain PyTorch: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CachedDecoder", "Decoder", "DecoderConfig"]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a :class:`Decoder`; every field is a plain number, so the record is JSON-ready.

    ``max_positions`` bounds the sequence length (cache included) that the rotary tables cover. With
    ``tie_embeddings`` the output head uses the embedding matrix as its weight.
    """

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 640
    num_layers: int = 5
    num_heads: int = 8
    num_kv_heads: int = 2
    max_positions: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        """Reject sizes that do not divide as the architecture needs."""
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head size, not {self.head_dim}")

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.hidden_size // self.num_heads

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DecoderConfig:
        """Build a configuration from :meth:`to_dict` output; an unknown key raises ``TypeError``."""
        return cls(**values)


class RMSNorm(nn.Module):
    """Scale each vector of the last axis to unit root mean square, then by a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` float ``[..., size]``; same shape and dtype out."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to ``x`` ``[B, H, S, D]`` with tables ``[S, D / 2]``."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions and an optional key/value cache."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        kv_size = self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries ``[B, H, S, D]`` and keys and values ``[B, Hkv, S, D]`` of ``x`` ``[B, S, C]``."""
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend ``q`` to ``k`` and ``v``, causally when ``mask`` is None; ``[B, S, C]`` out."""
        batch, _, length, _ = q.shape
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        merged = out.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim)
        projected: Tensor = self.o_proj(merged)
        return projected


class FeedForward(nn.Module):
    """The gated feed-forward block: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` float ``[..., C]`` to the same shape."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One decoder layer: attention and feed-forward, each after a norm and inside a residual."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer's output ``[B, S, C]`` and its keys and values ``[B, Hkv, P + S, D]``."""
        q, k, v = self.attention.project(self.attention_norm(x), cos, sin)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        x = x + self.attention.attend(q, k, v, mask)
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return x, k, v


class Decoder(nn.Module):
    """A causal language model over token ids.

    :meth:`forward` is the plain prefill form; :meth:`step` also takes and returns the key/value cache, and
    :class:`CachedDecoder` wraps it as a module of its own so that it can be exported.
    """

    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2).double() / config.head_dim)
        angles = torch.arange(config.max_positions).double()[:, None] * frequencies
        self.register_buffer("rope_cos", angles.cos().float(), persistent=False)
        self.register_buffer("rope_sin", angles.sin().float(), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Draw the weights from torch's global generator; residual outputs start smaller with depth."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, std=0.02 / (2 * self.config.num_layers) ** 0.5 if residual else 0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits float32 ``[B, S, V]`` of ``input_ids`` int64 ``[B, S]``, with no cache."""
        length = input_ids.shape[1]
        cos, sin = self.rope_cos[:length], self.rope_sin[:length]
        x = self.embedding(input_ids)
        for layer in self.layers:
            x, _, _ = layer(x, cos, sin, None, None)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def step(
        self, input_ids: Tensor, past_k: list[Tensor], past_v: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Run ``input_ids`` int64 ``[B, S]`` after ``P`` cached positions.

        ``past_k`` and ``past_v`` hold one float32 ``[B, Hkv, P, D]`` tensor per layer (``P`` may be 0, see
        :meth:`empty_cache`). Returns logits float32 ``[B, S, V]`` and the grown caches ``[B, Hkv, P + S, D]``.
        """
        past, length = past_k[0].shape[2], input_ids.shape[1]
        cos, sin = self.rope_cos[past : past + length], self.rope_sin[past : past + length]
        positions = torch.arange(past + length, device=input_ids.device)
        mask = positions[None, :] <= positions[past:, None]
        x = self.embedding(input_ids)
        present_k: list[Tensor] = []
        present_v: list[Tensor] = []
        for layer, layer_k, layer_v in zip(self.layers, past_k, past_v, strict=True):
            x, k, v = layer(x, cos, sin, (layer_k, layer_v), mask)
            present_k.append(k)
            present_v.append(v)
        return self.head(self.norm(x)), present_k, present_v

    def empty_cache(self, batch: int = 1, length: int = 0) -> tuple[list[Tensor], list[Tensor]]:
        """Return zero caches (keys, values): per layer a float32 ``[batch, Hkv, length, D]`` tensor."""
        shape = (batch, self.config.num_kv_heads, length, self.config.head_dim)
        layers = range(self.config.num_layers)
        return [torch.zeros(shape) for _ in layers], [torch.zeros(shape) for _ in layers]

    def num_parameters(self) -> int:
        """Count the weights, a tied head once."""
        return sum(parameter.numel() for parameter in self.parameters())


class CachedDecoder(nn.Module):
    """The cache form of a :class:`Decoder` as a module: the same weights, ``forward`` is :meth:`Decoder.step`."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, input_ids: Tensor, past_k: list[Tensor], past_v: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return logits and the grown caches; shapes as :meth:`Decoder.step` says."""
        return self.decoder.step(input_ids, past_k, past_v)
