"""Every way to write a dequantize in torch, exported by torch itself, is found; what only looks like one is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, nn
from torch.nn import functional as F

from qcompiler.backends.torch.capture import load
from qcompiler.verify.findings import Finding
from qcompiler.verify.static import find_unfused

N, K = 32, 64
QD = torch.ops.quantized_decomposed
Forward = Callable[[Any, Tensor], Any]


class Weights(nn.Module):
    """One weight in every form; ``forward`` is the spelling under test."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        buffers = {
            "w": torch.randint(-8, 8, (N, K), dtype=torch.int8, generator=g),
            "pairs": torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, generator=g),
            "words": torch.randint(-(2**31), 2**31 - 1, (K // 8, N), dtype=torch.int32, generator=g),
            "flat": torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, generator=g),
            "s": torch.rand(N, 1, generator=g),
            "z": torch.randint(0, 15, (N, 1), dtype=torch.uint8, generator=g),
            "zeros": torch.zeros(N, dtype=torch.int64),
            "gs": torch.rand(N, 4, 1, generator=g),
            "book": torch.linspace(-1, 1, 16),
            "index": torch.randint(0, 16, (N, K), dtype=torch.uint8, generator=g),
            "wide": torch.randint(0, 16, (N, K), generator=g),
            "f8": torch.randn(N, K, generator=g).to(torch.float8_e4m3fn),
            "kernel": torch.randint(-8, 8, (8, 3, 3, 3), dtype=torch.int8, generator=g),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.linear = nn.Linear(K, N)
        self.spelling = forward

    def forward(self, x: Tensor) -> Any:
        return self.spelling(self, x)


def found(forward: Forward) -> list[Finding]:
    with torch.no_grad():
        program = torch.export.export(Weights(forward).eval(), (torch.randn(2, K),))
    return find_unfused(load(program))


def unpacked(m: Any) -> Tensor:
    return torch.stack([m.pairs & 15, m.pairs >> 4], -1).reshape(N, K)


def gptq(m: Any) -> Tensor:
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return torch.bitwise_and(torch.bitwise_right_shift(m.words[:, None, :], shifts[None, :, None]), 15).reshape(K, N)


def rows(x: Tensor) -> Tensor:
    return x.long()[:, 0].clamp(0, 3)


def channel(m: Any) -> Tensor:
    made: Tensor = QD.dequantize_per_channel(m.w, m.s.flatten(), m.zeros, 0, -128, 127, torch.int8)
    return made


def tensor(codes: Tensor) -> Tensor:
    made: Tensor = QD.dequantize_per_tensor(codes, 0.1, 0, -128, 127, torch.int8)
    return made


def quantized(x: Tensor) -> Tensor:
    made: Tensor = QD.quantize_per_tensor(x, 0.1, 0, -128, 127, torch.int8)
    return made


ARITHMETIC: dict[str, Forward] = {
    "columns in another order": lambda m, x: F.linear(x, m.w[:, torch.arange(K - 1, -1, -1)].float() * m.s),
    "cast, then scale": lambda m, x: F.linear(x, m.w.to(torch.float32) * m.s),
    "transposed": lambda m, x: x @ (m.w.float() * m.s).t(),
    "no cast at all": lambda m, x: F.linear(x, m.w * m.s),
    "a zero point": lambda m, x: F.linear(x, (m.w.float() - m.z) * m.s),
    "a zero point in integers": lambda m, x: F.linear(x, (m.w.to(torch.int32) - 8).float() * m.s),
    "groups": lambda m, x: F.linear(x, (m.w.float().reshape(N, 4, -1) * m.gs).reshape(N, K)),
    "groups by unflatten": lambda m, x: F.linear(x, (m.w.unflatten(1, (4, -1)).float() * m.gs).flatten(1)),
    "halves of bytes": lambda m, x: F.linear(x, (unpacked(m).float() - 8) * m.s),
    "halves by division": lambda m, x: F.linear(x, torch.cat([(m.pairs % 16).float(), (m.pairs // 16).float()], 1)),
    "words of eight": lambda m, x: x @ ((gptq(m) - 8).float() * m.s.t()),
    "a flat list": lambda m, x: F.linear(x, torch.stack([m.flat & 15, m.flat >> 4], -1).reshape(N, K).float() * m.s),
    "signs restored": lambda m, x: F.linear(x, torch.where(unpacked(m) > 7, unpacked(m) - 16, unpacked(m)) * m.s),
    "scaled behind the product": lambda m, x: F.linear(x, m.w.float()) * m.s.t(),
    "in bf16": lambda m, x: F.linear(x.bfloat16(), m.w.bfloat16() * m.s.bfloat16()),
    "floats of 8 bits": lambda m, x: F.linear(x, m.f8.to(torch.float32) * m.s),
    "in place": lambda m, x: F.linear(x, m.w.float().mul_(m.s)),
    "type_as": lambda m, x: F.linear(x, m.w.type_as(x) * m.s),
    "divided": lambda m, x: F.linear(x, m.w / m.s),
    "einsum": lambda m, x: torch.einsum("bk,nk->bn", x, m.w.float() * m.s),
    "addmm": lambda m, x: torch.addmm(m.s.flatten(), x, (m.w.float() * m.s).t()),
    "mv": lambda m, x: torch.mv(m.w.float() * m.s, x[0]),
    "attention": lambda m, x: F.scaled_dot_product_attention(x[None], m.w.float()[None] * m.s, m.w.float()[None]),
    "conv": lambda m, x: F.conv2d(x[:, :9].reshape(2, 1, 3, 3).expand(2, 3, 3, 3), m.kernel.float() * 0.1),
    "a table": lambda m, x: F.embedding(rows(x), m.w.float() * m.s),
    "a bag": lambda m, x: F.embedding_bag(x.long()[:, :2].clamp(0, 3), m.w.float() * m.s),
    "in a branch": lambda m, x: torch.cond(
        x.sum() > 0, lambda a, w: F.linear(a, w.float() * 0.1), lambda a, w: F.linear(a, w.float() * 0.2), (x, m.w)
    ),
}
CODEBOOKS: dict[str, Forward] = {
    "index": lambda m, x: F.linear(x, m.book[m.index.long()] * m.s),
    "index by int32": lambda m, x: F.linear(x, m.book[m.index.int()]),
    "index stored wide": lambda m, x: F.linear(x, m.book[m.wide] * m.s),
    "take": lambda m, x: F.linear(x, torch.take(m.book, m.wide) * m.s),
    "halves of bytes": lambda m, x: F.linear(x, m.book[unpacked(m).long()] * m.s),
    "index_select": lambda m, x: F.linear(x, m.book.index_select(0, m.index.flatten().long()).reshape(N, K)),
    "embedding": lambda m, x: F.linear(x, F.embedding(m.index.long(), m.book[:, None]).squeeze(-1) * m.s),
}
OPS: dict[str, tuple[Forward, str]] = {
    "per channel": (lambda m, x: F.linear(x, channel(m)), "QC101"),
    "per tensor": (lambda m, x: F.linear(x, tensor(m.w)), "QC101"),
    "per group": (
        lambda m, x: F.linear(
            x,
            QD.dequantize_per_channel_group(
                m.w, m.gs[..., 0], torch.zeros(N, 4), -8, 7, torch.int8, K // 4, torch.float32
            ),
        ),
        "QC101",
    ),
    "per token": (
        lambda m, x: F.linear(
            x,
            QD.dequantize_per_token(m.w, m.s, torch.zeros(N, 1, dtype=torch.int64), -8, 7, torch.int8, torch.float32),
        ),
        "QC101",
    ),
    "moved": (lambda m, x: x @ channel(m).t().contiguous(), "QC102"),
    "a table": (lambda m, x: F.embedding(rows(x), channel(m)).relu(), "QC102"),
    "quantized in the graph": (lambda m, x: F.linear(x, tensor(quantized(m.linear.weight))), "QC101"),
    "an activation": (lambda m, x: m.linear(tensor(quantized(x))), "QC105"),
    "an island": (lambda m, x: quantized(torch.tanh(tensor(quantized(x)))), "QC105"),
    "a pair": (lambda m, x: quantized(tensor(quantized(x))), "QC107"),
    "simulated": (
        lambda m, x: F.linear(x, torch.fake_quantize_per_tensor_affine(m.linear.weight, 0.1, 0, -128, 127)),
        "QC107",
    ),
    "an output": (lambda m, x: (x.sum(), tensor(m.w)), "QC101"),
}
SOUND: dict[str, Forward] = {
    "float": lambda m, x: m.linear(x),
    "rows, then floats": lambda m, x: (m.w[rows(x)].float() * m.s[rows(x)]).relu(),
    "rows, floats, product": lambda m, x: m.linear(F.embedding(rows(x), m.w).float() * 0.1),
    "rows with zero points": lambda m, x: m.linear((m.w.index_select(0, rows(x)).float() - 3) * m.s[rows(x)]),
    "rows, dequantized by name": lambda m, x: m.linear(tensor(m.w.index_select(0, rows(x)))),
    "a mask": lambda m, x: x[:, None] * (m.w > 0).float(),
    "a bias by relative position": lambda m, x: F.scaled_dot_product_attention(
        x[None], x[None], x[None], attn_mask=m.book[torch.tensor([[0, 1], [1, 0]])][None]
    ),
    "a picture": lambda m, x: m.linear((x.to(torch.uint8).float() - 127) / 128),
    "positions": lambda m, x: m.linear(x + F.embedding(torch.arange(2), m.linear.weight)),
    "learned queries": lambda m, x: m.linear(F.embedding(torch.arange(2), m.linear.weight)),
    "learned queries of few bits": lambda m, x: m.linear(F.embedding(torch.arange(2), m.w).float() * 0.1),
    "a kernel on codes": lambda m, x: torch._int_mm(quantized(x), m.w.t()).float() * m.s.t(),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name: str) -> None:
    findings = found(ARITHMETIC[name])
    assert {(f.code, f.severity) for f in findings} == {("QC101", "error")}
    assert all("as f32" in f.message for f in findings)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_codebooks(name: str) -> None:
    assert {f.code for f in found(CODEBOOKS[name])} == {"QC101"}


@pytest.mark.parametrize("name", OPS)
def test_operators(name: str) -> None:
    forward, code = OPS[name]
    assert {(f.code, f.severity) for f in found(forward)} == {(code, "error")}


@pytest.mark.parametrize("name", SOUND)
def test_what_is_no_fault(name: str) -> None:
    assert not found(SOUND[name])


def test_a_weight_in_a_block_without_gradients() -> None:
    class Block(Weights):
        def forward(self, x: Tensor) -> Any:
            with torch.no_grad():
                w = self.w.float() * self.s
                return F.linear(x, w)

    program = torch.export.export(Block(lambda m, x: x).eval(), (torch.randn(2, K),))
    assert [f.code for f in find_unfused(load(program))] == ["QC101"]
