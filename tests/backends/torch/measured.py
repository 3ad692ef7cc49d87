"""Two programs that differ by a known amount, and one as a kernel of torch computes it, for the tests of measuring."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from qcompiler.backends.torch.export import export_program

N, K = 6, 16


class Net(nn.Module):
    """Two results by name: floats ``[B, 6]`` and the place of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(K, N)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.fc(x)
        return {"scores": y, "best": y.argmax(-1)}


class _Layer(nn.Module):
    codes: Tensor
    weight_scales: Tensor
    ones: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scales = linear.weight.detach().abs().amax(1) / 127
        self.register_buffer("codes", (linear.weight.detach() / scales[:, None]).round().to(torch.int8))
        self.register_buffer("weight_scales", scales)
        self.register_buffer("ones", torch.ones(N, dtype=torch.bfloat16))
        self.register_buffer("bias", linear.bias.detach())


class Lowered(nn.Module):
    """:class:`Net` with its layer in int8, as the compiler writes it: constants are called after the site."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.fc = _Layer(net.fc)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.ops.aten._weight_int8pack_mm(x.to(torch.bfloat16), self.fc.codes, self.fc.ones)
        y = y.to(torch.float32) * self.fc.weight_scales + self.fc.bias
        return {"scores": y, "best": y.argmax(-1)}


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def written(module: nn.Module, path: Path) -> Path:
    """``module`` in a file, its batch open from 1 to 32."""
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1))
    program = export_program(module, (x,), ({0: Dim("batch", min=1, max=32)},))
    torch.export.save(program, path)
    return path
