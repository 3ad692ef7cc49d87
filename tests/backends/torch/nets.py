"""Small torch modules, one for each way in which an exported program can be more than a chain of calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from qcompiler.backends.torch.sources import Sample

N = Dim("n", min=2, max=64)


def _sample(module: nn.Module, args: tuple[Any, ...], shapes: Any = None) -> Sample:
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return Sample(module, args, shapes)


class _Cache(nn.Module):
    """A cache written in place through a view, and a counter that is not saved."""

    k: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(2, 8, 4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x: Tensor, position: Tensor) -> dict[str, Tensor]:
        self.k.index_copy_(1, position, x)
        self.k[:, :1] *= 2
        self.count += 1
        return {"sum": self.k.sum(1), "count": self.count + 0}


def cache() -> Sample:
    return _sample(_Cache(), (torch.randn(2, 1, 4), torch.tensor([3])))


def batchnorm_train() -> Sample:
    """In training mode: running statistics are written by a call whose schema does not say so."""
    return _sample(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).train(), (torch.randn(5, 4),), ({0: N},))


class _Cond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        def yes(x: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x) + 1, x * 1

        def no(x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.sin(x), torch.cond(x.max() > 1, lambda x: x * 2, lambda x: x * 3, (x,))

        a, b = torch.cond(x.sum() > 0, yes, no, (x,))
        return torch.add(a, b)


def cond() -> Sample:
    """Branches with captured weights, one branch inside another."""
    return _sample(_Cond(), (torch.randn(3, 4),), ({0: N},))


class _While(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        from torch._higher_order_ops.while_loop import while_loop

        def more(i: Tensor, x: Tensor) -> Tensor:
            return i < 5

        def step(i: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, x * 1.5 + i

        loop: Any = while_loop
        i, y = loop(more, step, (torch.tensor(0), x))
        return i, y


def while_loop() -> Sample:
    return _sample(_While(), (torch.randn(3, 4),), ({0: N},))


class _Contexts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        with torch.no_grad():
            y = y * 2
        return torch.Tensor.float(y)


def contexts() -> Sample:
    """Autocast and no_grad: calls that wrap a subgraph and return a tuple of one."""
    return _sample(_Contexts(), (torch.randn(3, 4),), ({0: N},))


class _Several(nn.Module):
    def forward(self, x: Tensor, k: None = None, scale: float = 2.0) -> tuple[Any, ...]:
        a, _, c = torch.split(x, [2, 3, 4], dim=1)
        values, indices = torch.topk(x, 2)
        m = x.max(dim=1)
        return (a * scale, c), {"v": values, "i": [indices, m.values]}, x.chunk(3, 1)[1], 1, None, (m.indices, "s")


def several() -> Sample:
    """Calls with several results, of which some are unused; a nested output with constants in it."""
    return _sample(_Several(), (torch.randn(4, 9), None, 3.5), ({0: N}, None, None))


class _Sizes(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = x.shape[0]
        larger: Any = torch.sym_max
        half = larger(n // 2, 3)
        return x.new_zeros(n * 2 + 1, 3), x.reshape(-1)[:n] * half, x.new_full((n,), n * 0.5)


def sizes() -> Sample:
    """Arithmetic on a symbolic size."""
    return _sample(_Sizes(), (torch.randn(4, 6),), ({0: N},))


class _Steps(nn.Module):
    def forward(self, x: Tensor, n: int) -> tuple[Tensor, int]:
        x.add_(1)
        return x.view(n, -1), n + 1


def written_input() -> Sample:
    """Writes to its argument; takes and returns an integer."""
    return _sample(_Steps(), (torch.randn(2, 6), 3), (None, Dim.DYNAMIC))


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(ids))
        return out


def tied() -> Sample:
    return _sample(_Tied(), (torch.tensor([[1, 2, 3]]),), ({1: N},))


class _Named(nn.Module):
    """A parameter and an argument of one name; parameters without a module; a literal; a shared literal."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(3))
        self.table = torch.arange(40.0).reshape(20, 2).t()

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.x + torch.tensor([1.0, 2.0, 3.0])).sum() + self.table[0]


def named() -> Sample:
    return _sample(_Named(), (torch.randn(2, 3),), ({0: N},))


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(10, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, (h, _) = self.lstm(x)
        return self.gru(y)[0], h


def recurrent() -> Sample:
    return _sample(_Recurrent(), (torch.randn(3, 6, 4),))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.LayerNorm(16)

    def forward(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        out, weights = self.attention(q, kv, kv)
        return self.norm(out + q), weights


def attention() -> Sample:
    return _sample(
        _Attention().eval(), (torch.randn(2, 5, 16), torch.randn(2, 7, 16)), ({0: N}, {0: N, 1: Dim("keys", max=32)})
    )


class _Found(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x.nonzero()[:, 0]] * 2


def data_dependent() -> Sample:
    """A size that only running it tells, with the assertions that export adds."""
    return _sample(_Found(), (torch.tensor([1.0, 0.0, 3.0]),), ({0: N},))


class _Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.bfloat16))
        self.register_buffer("scales", torch.randn(8).to(torch.float8_e4m3fn))

    def forward(self, x: Tensor) -> Tensor:
        scales = self.get_buffer("scales").to(torch.float32)
        return (
            torch.clamp(x.bfloat16() @ self.weight, -float("inf"), 3.0).float() * scales[:4]
            + x.to(torch.complex64).real
        )


def half() -> Sample:
    """bfloat16 and float8 constants, an infinite attribute, a complex cast."""
    return _sample(_Half(), (torch.randn(3, 4),), ({0: N},))
