"""Exported programs by name, each made once a process, and arguments of a second shape."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from qcompiler.backends.torch.dims import leaf_specs
from qcompiler.backends.torch.export import export_program
from qcompiler.backends.torch.sources import Sample
from tests import zoo
from tests.backends.torch import nets

ZOO = ("mlp", "cnn", "llama", "llama_tied", "qwen3", "gpt2", "opt", "phi3", "gemma", "bert", "vit", "whisper")
NETS = (
    "cache",
    "batchnorm_train",
    "cond",
    "while_loop",
    "contexts",
    "several",
    "sizes",
    "written_input",
    "tied",
    "named",
    "recurrent",
    "attention",
    "data_dependent",
    "half",
)


@functools.cache
def sample(name: str) -> Sample:
    home = zoo if name in ZOO or name == "minilm" else nets
    made: Sample = getattr(home, name)()
    return made


@functools.cache
def program(name: str) -> ExportedProgram:
    module, args, shapes = sample(name)
    return export_program(module, args, shapes)


def fresh(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies, since a program may write to its arguments."""
    copied: tuple[Any, ...] = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)
    return copied


def second(name: str) -> tuple[Any, ...]:
    """Other values, and every dynamic size three larger."""
    module, args, shapes = sample(name)
    generator = torch.Generator().manual_seed(7)
    leaves, spec = pytree.tree_flatten(args)

    def other(leaf: Any, asked: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        sizes = list(leaf.shape)
        for axis, dim in asked.items() if isinstance(asked, dict) else enumerate(asked or ()):
            sizes[axis] += 3 if dim is not None else 0
        if leaf.is_floating_point():
            return torch.randn(sizes, generator=generator)
        return torch.randint(0, int(leaf.max()) + 1, sizes, generator=generator)

    specs = leaf_specs(module.forward, args, shapes)
    made: tuple[Any, ...] = pytree.tree_unflatten([other(x, s) for x, s in zip(leaves, specs, strict=True)], spec)
    return made


def assert_same(got: Any, expected: Any) -> None:
    """Equal in structure, and bit for bit."""
    got_leaves, got_spec = pytree.tree_flatten(got)
    leaves, spec = pytree.tree_flatten(expected)
    assert got_spec == spec
    for a, b in zip(got_leaves, leaves, strict=True):
        if isinstance(b, Tensor):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert torch.equal(_bits(a), _bits(b))
        else:
            assert type(a) is type(b)
            assert a == b


def _bits(x: Tensor) -> Tensor:
    if x.is_complex():
        x = torch.view_as_real(x)
    return x.detach().contiguous().reshape(-1).view(torch.uint8) if x.dtype != torch.bool else x
