"""Passes that are wrong on purpose: what each breaks, in which pass, and the op that must be named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qcompiler.dtypes import Array
from qcompiler.ir import Graph, Op, Value
from qcompiler.payload import ArrayPayload, constant

FLOATS = "normalise"
W8A16 = "normalise, insert-qdq{weights = 'int8 g32 asym'}, fold-constants, propagate-qdq, fold-qdq".replace("'", '"')
PAIRS = (
    'normalise, fold-batchnorm, insert-qdq{weights = "int8 channel sym", convs = "int8 channel sym"}, '
    'insert-activation-qdq{activations = "uint8 tensor asym"}, fold-constants, propagate-qdq, fold-qdq'
)
FUSED = f"{PAIRS}, fuse-integer, fuse-linear"


@dataclass(frozen=True)
class Mutant:
    """``before`` are passes that are right; then ``right`` (empty: nothing), and ``breaks`` on the graph it made.
    ``culprit`` is the label or site of the op that must be named."""

    name: str
    before: str
    right: str
    kind: str
    breaks: Callable[[Graph], None]
    culprit: str


def op_of(graph: Graph, label: str) -> Op:
    ops = (op for op in graph.walk() if op.name not in ("q.quantize", "q.dequantize"))
    return next(op for op in ops if label in (op.label, op.attrs.get("site"), op.meta.get("site")))


def made(graph: Graph, name: str) -> Op:
    found = graph.local(name)
    assert found is not None and found.owner is not None, name
    return found.owner


def replace_const(op: Op, slot: int, change: Callable[[Array], Array]) -> None:
    """Another constant in the place of operand ``slot``."""
    old = op.operands[slot]
    assert old is not None and old.payload is not None
    array = change(old.payload.array().copy())
    payload = ArrayPayload(np.array(array, order="C"), old.payload.dtype)
    op.set_operand(slot, old.graph.add_const(old.graph.fresh(f"{old.name}_broken"), payload))


def dequantize_before(graph: Graph, label: str, slot: int = 1) -> Op:
    value = op_of(graph, label).operands[slot]
    assert value is not None and value.owner is not None
    return value.owner


def transposed_weight(g: Graph) -> None:
    replace_const(op_of(g, "mid"), 1, np.transpose)


def dropped_bias(g: Graph) -> None:
    add = op_of(g, "down_add")
    replace_const(add, 1, np.zeros_like)


def bias_of_another_channel(g: Graph) -> None:
    replace_const(op_of(g, "conv"), 2, lambda b: np.roll(b, 1))


def shifted_pads(g: Graph) -> None:
    op_of(g, "conv").attrs["pads"] = (2, 1, 0, 1)


def dropped_relu(g: Graph) -> None:
    relu = op_of(g, "up_relu")
    x = relu.operands[0]
    assert x is not None
    relu.result.replace_uses(x)
    relu.erase()


def wrong_residual(g: Graph) -> None:
    add = op_of(g, "residual")
    add.set_operand(1, add.operand(0))


def wrong_pool(g: Graph) -> None:
    op_of(g, "pool").name = "onnx.AveragePool"


def scale_times_two(g: Graph) -> None:
    replace_const(dequantize_before(g, "mid"), 1, lambda s: s * np.float32(2))


def one_group_off(g: Graph) -> None:
    replace_const(dequantize_before(g, "up"), 1, lambda s: np.roll(s, 1, axis=0))


def zero_off_by_one(g: Graph) -> None:
    dq = dequantize_before(g, "down")
    replace_const(dq, 2, lambda z: (z + 1).astype(z.dtype))


def swapped_rows(g: Graph) -> None:
    replace_const(dequantize_before(g, "mid"), 0, lambda c: c[::-1])


def zero_of_activation_off(g: Graph) -> None:
    op = op_of(g, "up")
    replace_const(op, 2, lambda z: (z + 1).astype(z.dtype))


def scale_of_other_activation(g: Graph) -> None:
    op = op_of(g, "mid")
    replace_const(op, 1, lambda s: s * np.float32(1.05))


def fused_without_bias(g: Graph) -> None:
    op = op_of(g, "up")
    op.set_operand(6, None)


def wrong_strides(g: Graph) -> None:
    op_of(g, "conv").attrs["dilations"] = (2, 2)
    op_of(g, "conv").attrs["pads"] = (2, 2, 2, 2)


def swapped_nibbles(g: Graph) -> None:
    replace_const(op_of(g, "mid"), 1, lambda b: ((b >> 4) | (b << 4)).astype(np.uint8))


def kernel_zero_off(g: Graph) -> None:
    op = op_of(g, "down")
    replace_const(op, 3, lambda z: (z + 1).astype(z.dtype))


def result_zero_off(g: Graph) -> None:
    op = op_of(g, "conv")
    replace_const(op, 7, lambda z: (z + 1).astype(z.dtype))


def kernel_bias_halved(g: Graph) -> None:
    op = op_of(g, "conv")
    replace_const(op, 8, lambda b: (b // 2).astype(b.dtype))


def _pair(g: Graph, value: str) -> tuple[Op, Op]:
    found = g.local(value)
    assert found is not None
    q = next(u for u in found.users if u.name == "q.quantize")
    return q, next(u for u in q.result.users if u.name == "q.dequantize")


def _rescale(g: Graph, value: str, factor: float, both: bool) -> None:
    for op in _pair(g, value)[0 if both else 1 :]:
        replace_const(op, 1, lambda s: (s * np.float32(factor)).astype(s.dtype))


def weight_scale_halved(g: Graph) -> None:
    _rescale(g, "mid.weight", 0.5, both=True)


def weight_scale_doubled(g: Graph) -> None:
    _rescale(g, "mid.weight", 2.0, both=True)


def weight_back_by_another_scale(g: Graph) -> None:
    _rescale(g, "up.weight", 1.1, both=False)


def activation_scale_halved(g: Graph) -> None:
    _rescale(g, "x", 0.5, both=True)


def activation_scale_doubled(g: Graph) -> None:
    _rescale(g, "x", 2.0, both=True)


def activation_zero_off(g: Graph) -> None:
    replace_const(_pair(g, "x")[1], 2, lambda z: (z + 1).astype(z.dtype))


def pairs_and_no_bias(g: Graph) -> None:
    dropped_bias(g)


def shapes_that_do_not_fit(g: Graph) -> None:
    flat = op_of(g, "flat")
    shape = g.add_const(g.fresh("shape"), constant(np.array([-1, 7], np.int64)))
    flat.name, flat.attrs = "onnx.Reshape", {}
    flat.set_operands([flat.operand(0), shape])


def first(graph: Graph, name: str) -> Value:
    return next(op.results[0] for op in graph.walk() if op.name == name)


INSERT = 'insert-qdq{weights = "int8 channel sym"}'
INSERT_ALL = 'insert-qdq{weights = "int8 channel sym", convs = "int8 channel sym"}'
INSERT_ACTIVATIONS = 'insert-activation-qdq{activations = "uint8 tensor asym", observer = "minmax"}'
W4A16 = W8A16.replace("int8", "int4")
MUTANTS = [
    Mutant("a weight transposed", FLOATS, "", "exact", transposed_weight, "mid"),
    Mutant("a bias dropped", FLOATS, "", "exact", dropped_bias, "down_add"),
    Mutant("biases of other channels", FLOATS, "", "exact", bias_of_another_channel, "conv"),
    Mutant("pads shifted", FLOATS, "", "exact", shifted_pads, "conv"),
    Mutant("a Relu dropped", FLOATS, "", "exact", dropped_relu, "mid"),
    Mutant("a residual from elsewhere", FLOATS, "", "exact", wrong_residual, "residual"),
    Mutant("another pool", FLOATS, "", "exact", wrong_pool, "pool"),
    Mutant("shapes that do not fit", FLOATS, "", "exact", shapes_that_do_not_fit, "flat"),
    Mutant("a scale times two", W8A16, "", "exact", scale_times_two, "mid"),
    Mutant("scales of the group before", W8A16, "", "exact", one_group_off, "up"),
    Mutant("a zero point off by one", W8A16, "", "exact", zero_off_by_one, "down"),
    Mutant("rows of codes in another order", W8A16, "", "exact", swapped_rows, "mid"),
    Mutant("an activation's zero point off by one", PAIRS, "fuse-integer", "exact", zero_of_activation_off, "up"),
    Mutant("an activation's scale from elsewhere", PAIRS, "fuse-integer", "exact", scale_of_other_activation, "mid"),
    Mutant("fused without its bias", PAIRS, "fuse-integer", "exact", fused_without_bias, "up"),
    Mutant("dilated by another factor", PAIRS, "fuse-integer", "exact", wrong_strides, "conv"),
    Mutant("nibbles swapped", f"{W4A16}, fuse-linear", "choose-layout", "layout", swapped_nibbles, "mid"),
    Mutant("packed zero points off", f"{W8A16}, fuse-linear", "choose-layout", "layout", kernel_zero_off, "down"),
    Mutant("the result's zero point off", FUSED, "choose-layout", "layout", result_zero_off, "conv"),
    Mutant("half of an int32 bias", FUSED, "choose-layout", "layout", kernel_bias_halved, "conv"),
    Mutant("a weight's scale halved", FLOATS, INSERT, "lossy", weight_scale_halved, "mid"),
    Mutant("a weight's scale doubled", FLOATS, INSERT, "lossy", weight_scale_doubled, "mid"),
    Mutant("a weight back by another scale", FLOATS, INSERT, "lossy", weight_back_by_another_scale, "up"),
    Mutant("pairs put in, a bias dropped", FLOATS, INSERT, "lossy", pairs_and_no_bias, "down_add"),
    Mutant("an input's scale halved", INSERT_ALL, INSERT_ACTIVATIONS, "lossy", activation_scale_halved, "x"),
    Mutant("an input's scale doubled", INSERT_ALL, INSERT_ACTIVATIONS, "lossy", activation_scale_doubled, "x"),
    Mutant("an input's zero point off", INSERT_ALL, INSERT_ACTIVATIONS, "lossy", activation_zero_off, "x"),
]
