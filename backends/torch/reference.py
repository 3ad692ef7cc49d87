"""What a low-bit call should compute, in float64, from the codes that the program stores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from qcompiler.backends.torch import layouts
from qcompiler.backends.torch.conditions import WIDTH
from qcompiler.backends.torch.held import INT4, INT8, LowBit, argument
from qcompiler.backends.torch.nodes_triton import BIAS, MUL, RESIDUAL, SLOTS
from qcompiler.backends.torch.payload import TorchPayload
from qcompiler.backends.torch.weights_triton import activation_of, is_ours, weight_of
from qcompiler.dtypes import Array
from qcompiler.ir import Value

ROWS = 512
"""Output features that are compared, from the first: a whole number of blocks of every layout."""
ACTIVATIONS = 64
"""Rows of the activation that are compared."""
CONVOLUTION = 1 << 28
"""Products of a convolution above which it is not compared."""
TABLE = 1 << 26
"""Elements of a table above which a lookup in it is not compared."""
WRONG = 0.02
"""Relative root mean square error of wrong numbers. Rounding weights, sums and results to bf16 gives 2^-9 each, which
is 0.6 % together; codes of another layout give 100 %."""


class Reference:
    """References for the calls of one program; ``metadata`` says for which vector width its int4 weights are packed."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self.width = metadata.get(WIDTH) or _here()

    @torch.no_grad()
    def relative_error(self, node: LowBit, known: Mapping[Value, Any], result: Any) -> float | None:
        """Root mean square of the difference over that of the reference; None where there is no reference."""
        if not isinstance(result, torch.Tensor) or not result.numel() or not node.rows:
            return None
        if node.call == INT4:
            weight = self._int4(node, known)
        elif node.call == INT8:
            weight = self._int8(node, known)
        elif node.call == "qcompiler.qlinear":
            return _integer(node, known, result)
        elif node.call == "qcompiler.qconv":
            return _convolution(node, known, result)
        elif is_ours(node.op):
            return _triton(node, known, result)
        else:
            return None
        x = known.get(node.x) if node.x is not None else None
        if weight is None or not isinstance(x, torch.Tensor):
            return None
        wide = x.reshape(-1, x.shape[-1])[:ACTIVATIONS].double().numpy()
        wanted = wide @ weight.T
        return _relative(wanted, result.reshape(-1, result.shape[-1])[:ACTIVATIONS, : len(weight)])

    def _int4(self, node: LowBit, known: Mapping[Value, Any]) -> Array | None:
        packed, both, group = _tensor(node.codes, known), _tensor(node.scales, known), argument(node.op, 2)
        if packed is None or both is None or not isinstance(group, int) or self.width not in layouts.ROWS:
            return None
        rows = min(ROWS, packed.shape[0])
        codes = layouts.int4unpack(packed[:rows].contiguous().numpy(), self.width).astype(np.float64) - layouts.MIDDLE
        scale, offset = (both[:, :rows, i].double().numpy().T for i in (0, 1))
        weight: Array = codes * np.repeat(scale, group, axis=1) + np.repeat(offset, group, axis=1)
        return weight

    def _int8(self, node: LowBit, known: Mapping[Value, Any]) -> Array | None:
        codes, scales = _tensor(node.codes, known), _tensor(node.scales, known)
        if codes is None or scales is None:
            return None
        weight: Array = codes[:ROWS].double().numpy() * scales[:ROWS].double().numpy()[:, None]
        return weight


def _here() -> str:
    return str(torch.backends.cpu.get_cpu_capability()).lower()


def _tensor(value: Value | None, known: Mapping[Value, Any]) -> torch.Tensor | None:
    found = None if value is None else known.get(value)
    return found if isinstance(found, torch.Tensor) else None


def _integer(node: LowBit, known: Mapping[Value, Any], result: torch.Tensor) -> float | None:
    """``qcompiler::qlinear``: codes times codes, scaled, biased, and quantized again where it gives codes."""

    def given(index: int) -> Any:
        found = argument(node.op, index)
        return known.get(found) if isinstance(found, Value) else found

    x, x_scale, x_zero, weight, w_scale, bias = (given(i) for i in range(6))
    if not all(isinstance(t, torch.Tensor) for t in (x, x_scale, x_zero, weight, w_scale)):
        return None
    rows = weight[:ROWS]
    wide = (x.reshape(-1, x.shape[-1])[:ACTIVATIONS].double() - x_zero.double()) * x_scale.double()
    wanted = wide @ rows.double().T * w_scale.reshape(-1)[:ROWS].double()
    if isinstance(bias, torch.Tensor):
        wanted = wanted + bias[:ROWS].double()
    got = result.reshape(-1, result.shape[-1])[:ACTIVATIONS, : len(rows)]
    if got.dtype == torch.uint8:
        y_scale, y_zero = given(6), given(7)
        wanted = torch.clamp(torch.round(wanted / y_scale) + y_zero, 0, 255)
    return _relative(wanted.numpy(), got)


def _convolution(node: LowBit, known: Mapping[Value, Any], result: torch.Tensor) -> float | None:
    """``qcompiler::qconv`` on the first of the batch, where that is little work in float64."""

    def given(index: int) -> Any:
        found = argument(node.op, index)
        return known.get(found) if isinstance(found, Value) else found

    x, x_scale, x_zero, weight, w_scale, bias = (given(i) for i in range(6))
    if not all(isinstance(t, torch.Tensor) for t in (x, x_scale, x_zero, weight, w_scale)):
        return None
    stride, padding, dilation, groups = (
        list(a) if isinstance(a, tuple) else a for a in (given(i) for i in range(6, 10))
    )
    work = node.columns * (result.numel() // max(1, result.shape[0]))
    if work > CONVOLUTION or not isinstance(groups, int):
        return None
    axes = x.dim() - 2
    wide = (x[:1].double() - x_zero.double()) * x_scale.double()
    shape = (-1,) + (1,) * (axes + 1)
    convolve = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[axes - 1]
    floats = weight.double() * w_scale.double().reshape(shape)
    wanted: Any = convolve(wide, floats, None if bias is None else bias.double(), stride, padding, dilation, groups)
    if result.dtype == torch.uint8:
        y_scale, y_zero = given(10), given(11)
        wanted = torch.clamp(torch.round(wanted / y_scale) + y_zero, 0, 255)
    return _relative(wanted.numpy(), result[:1])


def _triton(node: LowBit, known: Mapping[Value, Any], result: torch.Tensor) -> float | None:
    """Our own products, the first :data:`ROWS` features of the first :data:`ACTIVATIONS` rows, and lookups."""

    def array(value: Value) -> Array | None:
        found = known.get(value)
        if not isinstance(found, torch.Tensor):
            return None
        return TorchPayload(found).array()

    got = result.reshape(-1, result.shape[-1])[:ACTIVATIONS].cpu()
    index = argument(node.op, 0)
    if node.kind == "embedding":
        asked = known.get(index) if isinstance(index, Value) else None
        if not isinstance(asked, torch.Tensor) or node.rows * node.columns > TABLE:
            return None
        weight = weight_of(node.op, array)
        if weight is None:
            return None
        return _relative(weight[asked.reshape(-1)[:ACTIVATIONS].cpu().numpy(), : got.shape[1]], got)
    x, weight = activation_of(node.op, array), weight_of(node.op, array, ROWS)
    if x is None or weight is None:
        return None
    columns = min(len(weight), got.shape[1])
    y = torch.from_numpy(x[:ACTIVATIONS] @ weight[:columns, : x.shape[1]].T)
    bias, mul, residual = (argument(node.op, i) for i in (BIAS, MUL, RESIDUAL))
    y = y if not isinstance(bias, Value) else y + known[bias].double().cpu()[:columns]
    y = FUNCTIONS[str(argument(node.op, SLOTS[node.call].form + 1))](y)
    for value, what in ((mul, torch.mul), (residual, torch.add)):
        if isinstance(value, Value):
            other = known[value].double().cpu()
            y = what(y, other.reshape(-1, other.shape[-1])[:ACTIVATIONS, :columns])
    return _relative(y.numpy(), got[:, :columns])


FUNCTIONS: dict[str, Any] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
}
"""What may be computed behind a product."""


def _relative(wanted: Array, got: torch.Tensor) -> float | None:
    size = float(np.sqrt(np.mean(np.square(wanted)))) if wanted.size else 0.0
    if not np.isfinite(size) or size == 0.0:
        return None
    with np.errstate(invalid="ignore", over="ignore"):
        off = float(np.sqrt(np.mean(np.square(got.double().numpy() - wanted)))) / size
    return off if np.isfinite(off) else 1e300
