"""Reference semantics of the ``q.*`` ops whose activations are codes: dequantize all, compute in float64, round once.

Where the result has a scheme it is quantized from the float64 value. Kernels that round their bias to int32, or look
their function up in a table, are within the bound of their row of this. Convolutions and pools follow the ONNX
operators of the same name (opset 22), for any number of spatial axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from qcompiler.clipping import Floats, affine_params, work_dtype
from qcompiler.dtypes import F32, F64, Array, DType, dtype_of
from qcompiler.errors import BadWeights, InputError
from qcompiler.integer_spec import FUNCTIONS
from qcompiler.op_spec import scale_shape
from qcompiler.scheme import Scheme

Operands = Sequence[Array | None]
Dequantize = Callable[[Array, Array, Array | None, Scheme, DType], Array]


def dynamic_params(x: Array, scheme: Scheme) -> tuple[Array, Array | None]:
    """Scale and zero point of a dynamic scheme: ``[]`` per tensor, ``[.., 1]`` per token, ``[.., B]`` for blocks.

    The scale is f32 for f32, f16 and bf16 activations, whose codes are computed in f32, and f64 for f64.
    The law is :func:`qcompiler.clipping.affine_params` of the minimum and maximum of what shares the parameters.
    Raises BadWeights for NaN or infinity.
    """
    finite = np.isfinite(x)
    if not finite.all():
        raise BadWeights(int(x.size - np.count_nonzero(finite)), x.size)
    element = dtype_of(work_dtype(dtype_of(x.dtype)))
    if not x.size:
        lo = hi = np.zeros(scale_shape(x.shape, scheme))
    elif scheme.granularity == "block":
        starts = np.arange(0, x.shape[-1], scheme.group[1])
        lo, hi = (np.asarray(op.reduceat(x, starts, axis=-1), np.float64) for op in (np.minimum, np.maximum))
    else:
        token = scheme.granularity == "token"
        axis, keep = (-1, True) if token else (None, False)
        lo = np.asarray(x.min(axis=axis, keepdims=keep), np.float64)
        hi = np.asarray(x.max(axis=axis, keepdims=keep), np.float64)
    return affine_params(lo, hi, scheme, element)


# -- windows -------------------------------------------------------------------------------------------------


def _ints(attrs: Mapping[str, Any], key: str, count: int, default: int) -> list[int]:
    return [int(i) for i in attrs.get(key) or [default] * count]


def padding(attrs: Mapping[str, Any], size: Sequence[int], window: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Padding at the begin of each spatial axis, then at the end of each; ``window`` is the dilated kernel."""
    auto = attrs.get("auto_pad", "NOTSET") or "NOTSET"
    if isinstance(auto, bytes):
        auto = auto.decode()
    if auto == "NOTSET":
        return _ints(attrs, "pads", 2 * len(size), 0)
    if auto == "VALID":
        return [0] * (2 * len(size))
    total = [max((-(-n // s) - 1) * s + w - n, 0) for n, w, s in zip(size, window, strides, strict=True)]
    less = [t // 2 for t in total]
    more = [t - p for t, p in zip(total, less, strict=True)]
    return less + more if auto == "SAME_UPPER" else more + less


def _windows(
    x: Floats, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Sequence[int], fill: float
) -> Floats:
    """``[B, C, *out, *kernel]``: what each window of ``x[B, C, *size]`` sees, ``fill`` outside."""
    d = len(kernel)
    widths = [(0, 0), (0, 0), *((pads[i], max(pads[d + i], 0)) for i in range(d))]
    padded = np.pad(x, widths, constant_values=fill)
    dilated = [(k - 1) * s + 1 for k, s in zip(kernel, dilations, strict=True)]
    axes = tuple(range(2, 2 + d))
    seen: Floats = sliding_window_view(padded, dilated, axis=axes)
    steps = [slice(None), slice(None), *(slice(None, None, s) for s in strides)]
    return seen[(*steps, *(slice(None, None, s) for s in dilations))]


def convolve(x: Array, weight: Array, bias: Array | None, attrs: Mapping[str, Any]) -> Floats:
    """ONNX Conv of ``x[B, C, *size]`` with ``weight[O, C / group, *kernel]`` in float64: ``[B, O, *out]``.

    ``attrs``: strides, pads, dilations, group, auto_pad as in ONNX. Raises InputError for shapes that do not fit.
    """
    d, group = weight.ndim - 2, int(attrs.get("group", 1) or 1)
    if x.ndim != d + 2 or x.shape[1] != weight.shape[1] * group or weight.shape[0] % group:
        raise InputError(f"weights {list(weight.shape)} in {group} groups do not fit an input {list(x.shape)}")
    kernel, strides = list(weight.shape[2:]), _ints(attrs, "strides", d, 1)
    dilations = _ints(attrs, "dilations", d, 1)
    dilated = [(k - 1) * s + 1 for k, s in zip(kernel, dilations, strict=True)]
    pads = padding(attrs, x.shape[2:], dilated, strides)
    wide = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *((pads[i], pads[d + i]) for i in range(d))])
    size = [(n - w) // s + 1 for n, w, s in zip(wide.shape[2:], dilated, strides, strict=True)]
    out = np.zeros((x.shape[0], weight.shape[0], *size))
    flat = out.reshape(x.shape[0], group, weight.shape[0] // group, -1)
    factors = weight.astype(np.float64).reshape(group, weight.shape[0] // group, weight.shape[1], *kernel)
    for offset in np.ndindex(*kernel):  # one tap of the kernel at a time: no window is copied
        starts = [o * step for o, step in zip(offset, dilations, strict=True)]
        cut = [slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, size, strides, strict=True)]
        part = wide[(slice(None), slice(None), *cut)]
        seen = part.reshape(x.shape[0], group, weight.shape[1], -1)
        flat += factors[(slice(None), slice(None), slice(None), *offset)] @ seen
    if bias is not None:
        out += bias.astype(np.float64).reshape(1, -1, *[1] * d)
    return out


def average_pool(x: Array, attrs: Mapping[str, Any]) -> Floats:
    """ONNX AveragePool of ``x[B, C, *size]`` in float64; attributes as in ONNX, kernel_shape among them."""
    kernel = [int(k) for k in attrs["kernel_shape"]]
    d = len(kernel)
    strides, dilations = _ints(attrs, "strides", d, 1), _ints(attrs, "dilations", d, 1)
    dilated = [(k - 1) * s + 1 for k, s in zip(kernel, dilations, strict=True)]
    size = x.shape[2:]
    pads = padding(attrs, size, dilated, strides)
    inside = np.ones((1, 1, *size))
    if attrs.get("count_include_pad", 0):
        inside = np.pad(inside, [(0, 0), (0, 0), *((pads[i], pads[d + i]) for i in range(d))], constant_values=1.0)
    extra = [0] * d
    if attrs.get("ceil_mode", 0):
        for i in range(d):
            free = size[i] + pads[i] + pads[d + i] - dilated[i]
            out = -(-free // strides[i]) + 1
            if (out - 1) * strides[i] >= size[i] + pads[i]:  # a window must start inside the input or its left padding
                out -= 1
            extra[i] = max((out - 1) * strides[i] - free, 0)
    wide = [*pads[:d], *(p + e for p, e in zip(pads[d:], extra, strict=True))]
    total = _windows(x.astype(np.float64), kernel, strides, dilations, wide, 0.0)
    around = [*[0] * d, *extra] if attrs.get("count_include_pad", 0) else wide
    count = _windows(inside, kernel, strides, dilations, around, 0.0)
    axes = tuple(range(2 + d, 2 + 2 * d))
    sums: Floats = total.sum(axis=axes) / count.sum(axis=axes)
    return sums


# -- functions of q.apply ------------------------------------------------------------------------------------


def _softmax(x: Floats, axis: int) -> Floats:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    out: Floats = e / e.sum(axis=axis, keepdims=True)
    return out


def _sigmoid(x: Floats) -> Floats:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def call(fn: str, xs: Sequence[Floats], attrs: Mapping[str, Any]) -> Floats:
    """The ONNX op ``fn`` on float64 operands; raises InputError for one that ``q.apply`` does not have."""
    x = xs[0]
    match fn:
        case "Add":
            return x + xs[1]
        case "Mul":
            return x * xs[1]
        case "Concat":
            return np.concatenate(list(xs), axis=int(attrs["axis"]))
        case "Sigmoid":
            return _sigmoid(x)
        case "LeakyRelu":
            leaky: Floats = np.where(x >= 0, x, x * float(attrs.get("alpha", 0.01)))
            return leaky
        case "Softmax":
            return _softmax(x, int(attrs.get("axis", -1)))
        case "GlobalAveragePool":
            mean: Floats = x.mean(axis=tuple(range(2, x.ndim)), keepdims=True)
            return mean
        case "AveragePool":
            return average_pool(x, attrs)
    raise InputError(f"no reference for q.apply of {fn!r}; there is one for {', '.join(sorted(FUNCTIONS))}")


# -- the ops -------------------------------------------------------------------------------------------------


class Integer:
    """Evaluates one op: ``arrays`` are its operands, ``attrs`` its attributes. ``quantize`` and ``dequantize`` are the
    reference functions of :mod:`qcompiler.numerics`."""

    def __init__(
        self, arrays: Operands, attrs: Mapping[str, Any], quantize: Callable[..., Array], dequantize: Dequantize
    ) -> None:
        self.arrays, self.attrs, self.quantize, self.dequantize = arrays, attrs, quantize, dequantize

    def at(self, index: int) -> Array | None:
        return self.arrays[index] if index < len(self.arrays) else None

    def need(self, index: int) -> Array:
        found = self.at(index)
        if found is None:
            raise InputError(f"operand {index} is missing: {len(self.arrays)} are given")
        return found

    def activation(self, first: int, key: str) -> Floats:
        """The dequantized operand ``first``, float64."""
        return self.dequantize(self.need(first), self.need(first + 1), self.at(first + 2), self.attrs[key], F64)

    def dynamic(self) -> Floats:
        """The float operand 0 after a round trip through its dynamic codes, float64."""
        x, scheme = self.need(0), self.attrs["x_scheme"]
        scale, zero = dynamic_params(x, scheme)
        return self.dequantize(self.quantize(x, scale, zero, scheme), scale, zero, scheme, F64)

    def weight(self, first: int) -> Floats:
        """The dequantized weight in operand ``first``; a linear's parameters are ``[N, G]`` or ``[1, 1]``."""
        scheme: Scheme = self.attrs["scheme"]
        codes, scale, zero = self.need(first), self.need(first + 1), self.at(first + 2)
        if codes.ndim == 2 and scheme.axis == 1 and scheme.granularity in ("channel", "tensor"):
            scheme = scheme.with_axis(None if scheme.granularity == "tensor" else 0)
            scale, zero = _column(scale, scheme), None if zero is None else _column(zero, scheme)
        return self.dequantize(codes, scale, zero, scheme, F64)

    def finish(self, y: Floats, first: int, like: Array) -> Array:
        """``y`` in codes by the parameters in operand ``first``, or rounded to the dtype of ``like``."""
        if "y_scheme" in self.attrs:
            return self.quantize(y, self.need(first).astype(np.float64), self.at(first + 1), self.attrs["y_scheme"])
        return y.astype(like.dtype)

    def product(self, x: Floats, first: int) -> Floats:
        weight, bias = self.weight(first), self.at(first + 3)
        if not x.ndim or x.shape[-1] != weight.shape[1]:
            raise InputError(f"the activation {list(x.shape)} does not end in K={weight.shape[1]}")
        y = x @ weight.T
        return y if bias is None else y + bias.astype(np.float64)

    def run(self, name: str) -> Array:
        """The result of the op called ``name``."""
        floats = (a for a in self.arrays if a is not None and dtype_of(a.dtype).is_float and a.dtype.itemsize > 1)
        like = next(floats, np.zeros((), F32.storage))  # what has a byte is codes
        match name:
            case "q.linear_static":
                return self.finish(self.product(self.activation(0, "x_scheme"), 3), 7, like)
            case "q.linear_dyn":
                return self.product(self.dynamic(), 1).astype(like.dtype)
            case "q.conv":
                return self.finish(
                    convolve(self.activation(0, "x_scheme"), self.weight(3), self.at(6), self.attrs), 7, like
                )
            case "q.conv_dyn":
                return convolve(self.dynamic(), self.weight(1), self.at(4), self.attrs).astype(like.dtype)
            case "q.matmul":
                return self.finish(self.activation(0, "a_scheme") @ self.activation(3, "b_scheme"), 6, like)
            case "q.apply":
                count = (len(self.arrays) - 1) // 3
                xs = [self.activation(3 * i, "x_scheme") for i in range(count)]
                return self.finish(call(str(self.attrs["fn"]), xs, self.attrs), 3 * count, like)
            case "q.scale":
                return (self.need(0).astype(np.float64) * self.need(1).astype(np.float64)).astype(like.dtype)
        raise InputError(f"no reference for {name}")


def _column(params: Array, scheme: Scheme) -> Array:
    return params.reshape(() if scheme.granularity == "tensor" else (-1,))


NAMES = frozenset({"q.linear_static", "q.linear_dyn", "q.conv", "q.conv_dyn", "q.matmul", "q.apply", "q.scale"})
