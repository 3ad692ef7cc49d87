"""aten graphs run as the emitted module does, bit for bit, with and without taps."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompiler.backends.torch.capture import load
from qcompiler.backends.torch.emit import filled, to_graph_module
from qcompiler.backends.torch.running import runnable
from qcompiler.dtypes import F32
from qcompiler.errors import InputError
from qcompiler.ir import Graph, TensorType
from qcompiler.numerics import choose_qparams, evaluate
from qcompiler.payload import constant
from qcompiler.scheme import parse_scheme
from tests.backends.torch.exports import NETS, assert_same, fresh, program, sample, second

MODELS = ("mlp", "cnn", "bert", "llama_tied", *NETS)


def feed(graph: Graph, args: tuple[Any, ...]) -> dict[str, np.ndarray]:
    """Arguments by the names of the graph's inputs, as arrays."""
    names = [v.name for v in graph.inputs if v.payload is None]
    leaves = [x.clone().numpy() if isinstance(x, Tensor) else np.asarray(x) for x in pytree.tree_leaves(args)]
    return dict(zip(names, leaves, strict=True))


def returned(graph: Graph, found: dict[str, np.ndarray]) -> list[Any]:
    """The tensors that the program returns, in order."""
    outputs = [torch.from_numpy(np.array(found[v.name])) for v in graph.outputs]
    return pytree.tree_leaves(filled(graph.meta["returns"], outputs, tuple))


@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_as_the_emitted_module(name: str) -> None:
    graph = load(program(name))
    tensors = [r.name for op in graph for r in op.results if r.tensor.dtype is not None]
    for args in (sample(name).args, second(name)):
        with torch.no_grad():  # whose absence lets some operators choose other kernels
            expected = [x for x in pytree.tree_leaves(to_graph_module(graph)(*fresh(args))) if x is not None]
        for taps in ([], tensors):
            with runnable(graph, taps) as run:
                for _ in range(2):  # what one call writes is not seen by the next
                    found = run(feed(graph, args))
                    ours = [x for x in returned(graph, found) if x is not None]
                    for a, b in zip(ours, expected, strict=True):
                        assert_same(a if isinstance(b, Tensor) else type(b)(a), b)
            assert found.keys() == {v.name for v in graph.outputs} | set(taps)


def test_taps_are_what_the_modules_saw() -> None:
    module, args, _ = sample("mlp")
    seen: list[np.ndarray] = []
    hooks = [
        m.register_forward_hook(lambda m, a, out: seen.append(out.detach().numpy()))
        for m in module.modules()
        if isinstance(m, torch.nn.Linear)
    ]
    module(*fresh(args))
    for hook in hooks:
        hook.remove()
    graph = load(program("mlp"))
    taps = [op.result.name for op in graph if op.name.startswith("aten.linear")]
    with runnable(graph, taps) as run:
        found = run(feed(graph, args))
    assert len(taps) == len(seen) > 1
    for name, wanted in zip(taps, seen, strict=True):
        np.testing.assert_array_equal(found[name], wanted)


def test_quantized_ops_have_reference_semantics() -> None:
    graph = load(program("mlp"))
    op = next(op for op in graph if op.name.startswith("aten.linear"))
    weight = op.operands[1]
    assert weight is not None and weight.payload is not None
    scheme = parse_scheme("int8 channel sym").with_axis(0)
    scale, _ = choose_qparams(weight.payload.array(), scheme)
    s = graph.add_const("s", constant(scale, F32))
    shape = weight.tensor.shape
    pair = [
        ("q.quantize", TensorType(scheme.dtype, shape)),
        ("q.dequantize", TensorType(F32, shape)),
    ]
    value = weight
    for name, type in pair:
        value = graph.create(name, [value, s], {"scheme": scheme}, [(graph.fresh("v"), type)], before=op).result
    op.set_operand(1, value)
    codes = evaluate("q.quantize", [weight.payload.array(), scale], {"scheme": scheme})
    wanted = evaluate("q.dequantize", [codes, scale], {"scheme": scheme})
    with runnable(graph, [value.name, op.result.name]) as run:
        args = sample("mlp").args
        found = run(feed(graph, args))
    np.testing.assert_array_equal(found[value.name], wanted)
    bias = op.operands[2]
    assert bias is not None and bias.payload is not None
    again = torch.nn.functional.linear(args[0], torch.from_numpy(wanted), torch.from_numpy(bias.payload.array()))
    np.testing.assert_array_equal(found[op.result.name], again.detach().numpy())


def test_what_cannot_be_run_is_told() -> None:
    graph = load(program("mlp"))
    with pytest.raises(InputError, match="no value %nothing"), runnable(graph, ["nothing"]):
        pass
    with runnable(graph, []) as run:
        with pytest.raises(InputError, match="are missing; it takes"):
            run({})
        with pytest.raises(InputError, match="there is no input extra"):
            run(feed(graph, sample("mlp").args) | {"extra": np.ones(1)})
        with pytest.raises(InputError, match="torch cannot run aten"):
            run({n: np.ones((1, 1), np.float32) for n in feed(graph, sample("mlp").args)})
