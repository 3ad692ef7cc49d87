"""Build small quantized ONNX graphs by hand, without anything of the product whose verdicts they test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

Array = NDArray[Any]
MS = "com.microsoft"
LOW_BITS = {TensorProto.INT4: 4, TensorProto.UINT4: 4, TensorProto.INT2: 2, TensorProto.UINT2: 2}
ROWS = (1, 5)
"""How many rows each case is fed: one decode step, and a small prefill that is no divisor of the shapes."""


@dataclass
class Case:
    """A graph, what to feed it, and the float64 answer. ``blame``: the node names that a rejection may name."""

    name: str
    model: ModelProto
    feeds: list[dict[str, Array]]
    expect: Callable[[dict[str, Array]], Array] | None = None
    blame: tuple[str, ...] = ()
    weights: int = 0
    """Elements of the quantized weight; 0 when only activations are quantized."""


@dataclass
class Net:
    """A graph under construction; every node gets the name it is given."""

    opset: int = 21
    nodes: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    consts: list[TensorProto] = field(default_factory=list)
    functions: list[Any] = field(default_factory=list)

    def const(self, name: str, values: Any, element: int | None = None) -> str:
        """An initializer; ``element`` is needed for int4 and the like, whose codes come one an element."""
        self.consts.append(tensor(name, values, element))
        return name

    def input(self, name: str, shape: Sequence[int | str], element: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, element, list(shape)))
        return name

    def output(self, name: str, element: int = TensorProto.FLOAT, shape: Sequence[Any] | None = None) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, element, shape))
        return name

    def op(self, kind: str, inputs: Sequence[str], out: str, *, name: str = "", **attrs: Any) -> str:
        """A node ``domain:Kind`` or ``Kind`` with one output; ``out`` may hold several names, separated by spaces."""
        domain, _, short = kind.rpartition(":")
        domain = MS if domain == "ms" else domain
        node = helper.make_node(short, list(inputs), out.split(), name=name or out.split()[0], domain=domain, **attrs)
        self.nodes.append(node)
        return out.split()[0]

    def model(self) -> ModelProto:
        graph = helper.make_graph(self.nodes, "main", self.inputs, self.outputs, self.consts)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(MS, 1)]
        opsets += [helper.make_opsetid(f.domain, 1) for f in self.functions]
        ir = 13 if self.opset >= 25 else 10
        return helper.make_model(graph, opset_imports=opsets, ir_version=ir, functions=self.functions)


def tensor(name: str, values: Any, element: int | None = None) -> TensorProto:
    values = np.asarray(values)
    if element in LOW_BITS:
        data = pack(values, LOW_BITS[element])
        return TensorProto(name=name, data_type=element, dims=values.shape, raw_data=data.tobytes())
    if element is not None and element != helper.np_dtype_to_tensor_dtype(values.dtype):
        values = values.astype(helper.tensor_dtype_to_np_dtype(element))
    return numpy_helper.from_array(values, name)


def pack(codes: Array, bits: int) -> Array:
    """Codes to bytes, element 0 in the low bits, by arithmetic on whole numbers."""
    per = 8 // bits
    flat = codes.reshape(-1).astype(np.int64) % (1 << bits)
    lanes = np.append(flat, np.zeros(-flat.size % per, np.int64)).reshape(-1, per)
    return (lanes * (1 << (bits * np.arange(per)))).sum(axis=1).astype(np.uint8)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def rows(shape: Sequence[int | str], m: int, element: Any = np.float32) -> Array:
    """Standard normal values; the symbol ``M`` in ``shape`` becomes ``m``."""
    concrete = [m if d == "M" else int(d) for d in shape]
    return rng(7, m).standard_normal(concrete).astype(element)


def bf16(values: Array) -> Array:
    return values.astype(ml_dtypes.bfloat16)


@dataclass
class NBits:
    """Codes of a weight ``[N, K]`` with groups along K, its packed form for MatMulNBits, and its float64 value."""

    n: int = 128
    k: int = 256
    bits: int = 4
    bs: int = 64
    asym: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        r = rng(self.seed, self.n, self.k, self.bits, self.bs)
        groups = -(-self.k // self.bs)
        top = 1 << self.bits
        self.codes = r.integers(0, top, (self.n, self.k))
        self.scales = (0.5 + r.random((self.n, groups))).astype(np.float32) / top
        self.zeros = r.integers(0, top, (self.n, groups)) if self.asym else np.full((self.n, groups), top // 2)

    def value(self, scales: Array | None = None, zeros: Array | None = None) -> Array:
        """float64 ``[N, K]``."""
        s = (self.scales if scales is None else scales).astype(np.float64)
        z = (self.zeros if zeros is None else zeros).astype(np.float64)
        wide = lambda t: np.repeat(t, self.bs, axis=1)[:, : self.k]  # noqa: E731
        return (self.codes - wide(z)) * wide(s)

    def packed(self) -> Array:
        """uint8 ``[N, groups, bs * bits / 8]``."""
        groups = self.scales.shape[1]
        padded = np.zeros((self.n, groups * self.bs), np.int64)
        padded[:, : self.k] = self.codes
        return pack(padded, self.bits).reshape(self.n, groups, self.bs * self.bits // 8)

    def packed_zeros(self) -> Array:
        """uint8 ``[N, ceil(groups * bits / 8)]``."""
        return np.stack([pack(row, self.bits) for row in self.zeros])
