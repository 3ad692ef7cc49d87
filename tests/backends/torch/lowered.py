"""A small network lowered by a recipe, as a graph or as the ``.pt2`` file that is written of it."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from qcompiler import recipe as recipes
from qcompiler.backends.base import Silent
from qcompiler.backends.torch.backend import TorchBackend
from qcompiler.backends.torch.capture import load
from qcompiler.backends.torch.kernels import target
from qcompiler.ir import Graph, Op
from qcompiler.pipeline import Context, run

WORDS, WIDTH, HIDDEN = 50, 64, 100
RECIPES = ("w4a16", "w8a16", "w8a8-dynamic")
SITES = ("emb", "up", "down", "head")


class Network(nn.Module):
    """A table, two layers of which one has 100 features, and a head tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(WORDS, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.emb(ids)
        out: Tensor = self.head(h + self.down(torch.relu(self.up(h))))
        return out


@functools.cache
def program() -> ExportedProgram:
    """The network exported, batch and sequence open."""
    dims = {0: Dim("batch", min=1, max=64), 1: Dim("sequence", min=1, max=600)}
    ids = torch.zeros(2, 7, dtype=torch.int64)
    with torch.no_grad():
        return torch.export.export(Network().eval(), (ids,), dynamic_shapes=(dims,))


def lowered(recipe: str, spec: str = "torch-cpu") -> Graph:
    """The network after the passes of ``recipe``."""
    graph = load(program())
    run(graph, recipes.load(recipe).passes, Context(target(spec)))
    return graph


def written(graph: Graph, path: Path) -> Path:
    """``graph`` as a ``.pt2`` file."""
    TorchBackend().emit(graph, path, {}, Silent())
    return path


def at(graph: Graph, site: str) -> Op:
    """The kernel call of a site."""
    return next(op for op in graph if op.label == site)
