"""Every example exports with `torch.export` and to ONNX, and keeps its numbers at other sizes."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch.utils import _pytree

from qcompiler.models import builders, pystdlib
from qcompiler.models.builders import Example

# Reassociated float32 sums through a few layers of order one; the exports change nothing else.
TOLERANCE = 5e-5

EXAMPLES: dict[str, Callable[[], Example]] = {
    "mlp": builders.mlp_example,
    "tiny_cnn": builders.tiny_cnn_example,
    "tiny_llama": builders.tiny_llama_example,
    "tied_llama": builders.tied_llama_example,
    "cached_llama": builders.cached_llama_example,
    "pystdlib": pystdlib.example,
}


def _resized(name: str, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The example's arguments, and the same with other dynamic sizes, the smallest included."""
    if name == "cached_llama":
        ids, keys, values = args
        return [args, *((ids[:1], [k[:1, :, :n] for k in keys], [v[:1, :, :n] for v in values]) for n in (0, 1, 5))]
    (x,) = args
    if x.dtype == torch.int64:
        return [(x,), (x[:1, :1],), (torch.cat((x, x, x))[:, :9],)]
    return [(x,), (x[:1],), (torch.cat((x, x)) * 0.5,)]


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_exports_both_ways(name: str, tmp_path: Path) -> None:
    module, args, shapes = EXAMPLES[name]()
    assert not module.training
    program = torch.export.export(module, args, dynamic_shapes=shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        onnx_program = torch.onnx.export(program, dynamo=True, verbose=False)
    assert onnx_program is not None
    onnx_program.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    for inputs in _resized(name, args):
        with torch.inference_mode():
            expected = _pytree.tree_leaves(module(*inputs))
            exported = _pytree.tree_leaves(program.module()(*inputs))
        feeds = {key: leaf.numpy() for key, leaf in zip(names, _pytree.tree_leaves(inputs), strict=True)}
        ran = session.run(None, feeds)
        for want, torch_got, onnx_got in zip(expected, exported, ran, strict=True):
            np.testing.assert_allclose(torch_got.numpy(), want.numpy(), rtol=0, atol=TOLERANCE)
            np.testing.assert_allclose(onnx_got, want.numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("build", [builders.mlp, builders.tiny_cnn, builders.tiny_llama, builders.tied_llama])
def test_seed_decides_the_weights(build: Callable[..., torch.nn.Module]) -> None:
    state = torch.get_rng_state()
    first, again, other = (dict(build(seed=seed).named_parameters()) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
