"""What :mod:`qcompiler.spellings.aten_values` computes of constants is what torch computes, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcompiler.backends.torch.capture import load
from qcompiler.spellings.aten_values import is_known
from qcompiler.spellings.expressions import expression

GENERATOR = torch.Generator().manual_seed(0)
P = torch.randint(0, 256, (6, 8), generator=GENERATOR).to(torch.uint8)
W = torch.randint(-(2**31), 2**31, (4, 8), generator=GENERATOR).to(torch.int32)
S = torch.rand(6, 1, generator=GENERATOR)
SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)

CASES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "nibbles": lambda p, w, s: torch.stack([p & 15, p >> 4], -1).view(6, 16).to(torch.int8) - 8,
    "wrapping": lambda p, w, s: (p + p) * p - 7,
    "gptq": lambda p, w, s: torch.bitwise_right_shift(w.unsqueeze(1).expand(-1, 8, -1), SHIFTS.view(1, -1, 1)) & 15,
    "shifts of negatives": lambda p, w, s: (w << 4) >> 28,
    "cat and slices": lambda p, w, s: torch.cat([p[:, 2:5], p[1:2].expand(6, 8)], 1).t().contiguous(),
    "select, repeat": lambda p, w, s: p.select(0, -1).repeat_interleave(3, 0).reshape(2, -1),
    "mixed types": lambda p, w, s: (p.to(torch.float32) - 3) * s / 7,
    "halves": lambda p, w, s: (p.to(torch.float16) * s.to(torch.float16)).transpose(0, 1),
    "remainders": lambda p, w, s: torch.remainder(w, 16) ^ torch.neg(w),
    "permuted": lambda p, w, s: p.view(2, 3, 8).permute(2, 0, 1).flatten(1).to(torch.int64) | 256,
}


class Net(nn.Module):
    def __init__(self, fn: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn
        for name, value in (("p", P), ("w", W), ("s", S)):
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fn(self.get_buffer("p"), self.get_buffer("w"), self.get_buffer("s")), x + 1


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits(name: str) -> None:
    net, x = Net(CASES[name]), torch.zeros(1)
    graph = load(torch.export.export(net, (x,)))
    found = expression(graph.outputs[0])
    assert found is not None, [op.name for op in graph if not is_known(op)]
    want = net(x)[0].numpy()
    got = found.array()
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


def test_what_is_not_known_is_no_constant() -> None:
    net, x = Net(lambda p, w, s: torch.sin(s)), torch.zeros(1)
    assert expression(load(torch.export.export(net, (x,))).outputs[0]) is None
    net = Net(lambda p, w, s: torch.add(s, s, alpha=2))
    assert expression(load(torch.export.export(net, (x,))).outputs[0]) is None
