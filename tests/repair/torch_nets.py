"""Modules that are quantized by hand as torch's tools quantize them; codes and scales from fixed seeds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization.fx import _decomposed

Q = torch.ops.quantized_decomposed
assert _decomposed is not None  # importing it registers the ops


class Coded(nn.Module):
    """Buffers from a seed."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = torch.Generator().manual_seed(1)

    def codes(self, name: str, *shape: int, low: int = -127, high: int = 128, dtype: torch.dtype = torch.int8) -> None:
        self.register_buffer(name, torch.randint(low, high, shape, generator=self.rng).to(dtype))

    def steps(self, name: str, *shape: int, k: int = 32) -> None:
        self.register_buffer(name, (0.5 + torch.rand(shape, generator=self.rng)) / 127 / k**0.5)
        self.register_buffer(f"{name}_zero", torch.zeros(shape, dtype=torch.int64))

    def at(self, name: str) -> Tensor:
        return self.get_buffer(name)

    def channel(self, name: str) -> Tensor:
        """The weight ``name`` as pt2e spells it: int8 a channel, zero points of 0."""
        scale, zero = self.at(f"{name}_s"), self.at(f"{name}_s_zero")
        out: Tensor = Q.dequantize_per_channel(self.at(name), scale, zero, 0, -128, 127, torch.int8)
        return out


def static(x: Tensor, scale: float, zero: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    low, high = (0, 255) if dtype == torch.uint8 else (-128, 127)
    codes = Q.quantize_per_tensor(x, scale, zero, low, high, dtype)
    out: Tensor = Q.dequantize_per_tensor(codes, scale, zero, low, high, dtype)
    return out


def dynamic(x: Tensor, low: int, high: int, dtype: torch.dtype) -> Tensor:
    scale, zero = Q.choose_qparams(x, low, high, 1e-7, dtype)
    codes = Q.quantize_per_tensor(x, scale, zero, low, high, dtype)
    out: Tensor = Q.dequantize_per_tensor(codes, scale, zero, low, high, dtype)
    return out


class Inductor(Coded):
    """What X86InductorQuantizer makes of conv, relu, pool, linear, relu, linear; ``dtype`` of the activations' codes.

    ``[B, 3, 16, 16] -> [B, 10]``.
    """

    def __init__(self, dtype: torch.dtype = torch.uint8) -> None:
        super().__init__()
        self.dtype, self.middle = dtype, 0 if dtype == torch.uint8 else -128
        for name, shape in (("c", (8, 3, 3, 3)), ("l1", (32, 128)), ("l2", (10, 32))):
            self.codes(name, *shape)
            self.steps(f"{name}_s", shape[0], k=shape[1])
            self.register_buffer(f"{name}_b", torch.randn(shape[0], generator=self.rng))

    def forward(self, x: Tensor) -> Tensor:
        z, kind = self.middle, self.dtype
        x = torch.relu(F.conv2d(static(x, 0.03, z + 128, kind), self.channel("c"), self.at("c_b"), padding=1))
        x = F.max_pool2d(x, 4).flatten(1)
        x = torch.relu(F.linear(static(x, 0.02, z, kind), self.channel("l1"), self.at("l1_b")))
        return F.linear(static(x, 0.05, z, kind), self.channel("l2"), self.at("l2_b"))


class Dynamic(Coded):
    """Two linears that read one activation, scaled at run time. ``[B, 32] -> [B, 16]`` twice."""

    def __init__(self, low: int, high: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.how = (low, high, dtype)
        for name in ("a", "b"):
            self.codes(name, 16, 32)
            self.steps(f"{name}_s", 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        d = dynamic(x, *self.how)
        return F.linear(d, self.channel("a")), F.linear(d, self.channel("b"))


class Blocks(Coded):
    """int4 codes in blocks of 32 along K, a byte each; with ``token`` the activation has a scale a token."""

    def __init__(self, token: bool = False) -> None:
        super().__init__()
        self.token = token
        self.codes("w", 16, 64, low=-8, high=8)
        self.steps("s", 16, 2)
        self.codes("z", 16, 2, low=-2, high=3, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        if self.token:
            scale, zero = Q.choose_qparams_per_token_asymmetric(x, torch.int8)
            codes = Q.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
            x = Q.dequantize_per_token(codes, scale, zero, -128, 127, torch.int8, torch.float32)
        how: tuple[Any, ...] = (-8, 7, torch.int8, 32, torch.float32)
        return F.linear(x, Q.dequantize_per_channel_group(self.at("w"), self.at("s"), self.at("z"), *how))


class Written(Coded):
    """Dequantizes written as arithmetic; ``kind`` names the spelling. ``[B, 64] -> [B, 16]``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.codes("i8", 16, 64)
        self.codes("u8", 16, 64, low=1, high=256, dtype=torch.uint8)
        self.codes("packed", 16, 32, low=0, high=256, dtype=torch.uint8)
        self.codes("z4", 16, 2, 1, low=0, high=16, dtype=torch.uint8)
        self.steps("s", 16, 1, k=64)
        self.steps("s4", 16, 2, 1, k=64)

    def weight(self) -> Tensor:
        match self.kind:
            case "promoted":
                return self.at("i8") * self.at("s")
            case "middle":
                return (self.at("u8").to(torch.float32) - 128) * self.at("s")
            case "integers":
                return (self.at("u8").to(torch.int16) - 128).to(torch.float32) * self.at("s")
            case "turned":
                return (self.at("i8").t().to(torch.float32) * self.at("s").t()).t()
        codes = torch.stack([self.at("packed") & 15, self.at("packed") >> 4], -1)
        if self.kind == "nibbles":
            signed = (codes.view(16, 64).to(torch.int8) - 8).to(torch.float32)
            return (signed.view(16, 2, 32) * self.at("s4")).view(16, 64)
        floats = codes.view(16, 2, 32).to(torch.float32) - self.at("z4").to(torch.float32)
        return (floats * self.at("s4")).reshape(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "scaled behind":
            return F.linear(x, self.at("i8").to(x.dtype)) * self.at("s").reshape(16)
        return F.linear(x, self.weight())


class Table(Coded):
    """A table of codes that is looked up: dequantized before it (``whole``), or only its rows (``rows``)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.codes("t", 20, 64)
        self.steps("t_s", 20)

    def forward(self, ids: Tensor) -> Tensor:
        if self.kind == "whole":
            return F.embedding(ids, self.channel("t"))
        return F.embedding(ids, self.at("t")).to(torch.float32) * F.embedding(ids, self.at("t_s").reshape(20, 1))
