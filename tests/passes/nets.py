"""Random small networks in the IR, drawn op by op, and the pair form of them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from qcompiler import recipe
from qcompiler.backends.onnx.running import runnable
from qcompiler.calibrate.calibrator import Calibrator
from qcompiler.calibrate.data import open_data
from qcompiler.dtypes import F32, Array
from qcompiler.ir import Graph, Loc, TensorType, Value
from qcompiler.payload import constant
from qcompiler.pipeline import Context, run
from qcompiler.reader import parse
from qcompiler.target import Target
from qcompiler.text import show

PAIRS = (
    'insert-qdq{weights = "int8 channel sym", convs = "int8 channel sym", products = "int8 tensor sym"}, '
    'insert-activation-qdq{activations = "uint8 tensor asym", observer = "minmax"}, fold-constants'
)
CHANNELS, SIZE = 4, 6


class Net:
    """A graph that grows op by op; ``images`` are values [1, 4, h, w] and ``rows`` values [2, k]."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.graph = Graph()
        self.graph.meta["opset_import"] = (("", 17),)
        self.count = 0
        self.images = [self.graph.add_input("x", TensorType(F32, (1, CHANNELS, SIZE, SIZE)))]

    def const(self, array: Array) -> Value:
        self.count += 1
        return self.graph.add_const(f"c{self.count}", constant(array))

    def weight(self, *shape: int) -> Value:
        return self.const((self.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32))

    def op(self, name: str, *operands: Value | None, shape: tuple[int, ...], **attrs: object) -> Value:
        self.count += 1
        made = self.graph.create(
            f"onnx.{name}",
            operands,
            attrs,
            [(f"v{self.count}", TensorType(F32, shape))],
            loc=Loc(f"{name}_{self.count}"),
        )
        return made.result


def dims(value: Value) -> tuple[int, ...]:
    found = value.tensor.static_shape
    assert found is not None
    return found


IMAGE_OPS = (
    *(
        "Conv",
        "Conv",
        "Conv",
        "Concat",
        "Depthwise",
        "Relu",
        "Relu6",
        "LeakyRelu",
        "Sigmoid",
        "Exp",
        "Add",
        "AddConst",
        "Mul",
        "Concat",
    ),
    *("MaxPool", "AveragePool", "Transpose", "Pad", "Slice", "Resize"),
)


def grow(net: Net, what: str, x: Value, other: Value) -> Value | None:
    """One op more, or None where the shapes do not allow it."""
    shape = dims(x)
    channels, h, w = shape[1:]
    match what:
        case "Conv":
            bias = net.const(net.rng.standard_normal(5).astype(np.float32))
            pads = (1, 1, 1, 1)
            return net.op("Conv", x, net.weight(5, channels, 3, 3), bias, shape=(1, 5, h, w), pads=pads)
        case "Depthwise":
            return net.op("Conv", x, net.weight(channels, 1, 1, 1), shape=shape, group=channels)
        case "Relu" | "Sigmoid" | "Exp":
            return net.op(what, x, shape=shape)
        case "Relu6":
            bounds = (net.const(np.float32(0)), net.const(np.float32(1.5)))
            return net.op("Clip", x, *bounds, shape=shape)
        case "LeakyRelu":
            return net.op(what, x, shape=shape, alpha=0.1)
        case "Add" | "Mul" if dims(other) == shape:
            return net.op(what, x, other, shape=shape)
        case "AddConst":
            return net.op("Add", x, net.weight(1, channels, 1, 1), shape=shape)
        case "Concat" if dims(other)[2:] == shape[2:] and channels + dims(other)[1] <= 16:
            return net.op(what, x, other, shape=(1, channels + dims(other)[1], h, w), axis=1)
        case "MaxPool" | "AveragePool" if h > 2 and w > 2:
            return net.op(what, x, shape=(1, channels, h - 1, w - 1), kernel_shape=(2, 2))
        case "Transpose":
            return net.op(what, x, shape=(1, channels, w, h), perm=(0, 1, 3, 2))
        case "Pad":
            pads = net.const(np.array([0, 0, 1, 0, 0, 0, 0, 0]))
            return net.op(what, x, pads, shape=(1, channels, h + 1, w))
        case "Slice" if h > 2:
            edges = [net.const(np.array([n])) for n in (1, h, 2)]
            return net.op(what, x, *edges, shape=(1, channels, h - 1, w))
        case "Resize" if h <= 6 and w <= 6:
            scales = net.const(np.array([1, 1, 2, 1], np.float32))
            return net.op(
                what,
                x,
                None,
                scales,
                shape=(1, channels, 2 * h, w),
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            )
    return None


@st.composite
def nets(draw: st.DrawFn) -> Graph:
    """A network of 3 to 12 ops on images and a linear or two behind them, with one to three outputs."""
    net = Net(draw(st.integers(0, 99)))
    net.images.append(grow(net, "Conv", net.images[0], net.images[0]) or net.images[0])
    for _ in range(draw(st.integers(2, 11))):
        x, other = (net.images[draw(st.integers(0, len(net.images) - 1))] for _ in range(2))
        made = grow(net, draw(st.sampled_from(IMAGE_OPS)), x, other)
        if made is not None:
            net.images.append(made)
    last = net.images[-1]
    size = int(np.prod(dims(last)))
    if draw(st.booleans()):
        flat = net.op("Reshape", last, net.const(np.array([1, size])), shape=(1, size))
        row = net.op("MatMul", flat, net.weight(size, 7), shape=(1, 7))
        row = net.op("Add", row, net.const(net.rng.standard_normal(7).astype(np.float32)), shape=(1, 7))
        if draw(st.booleans()):
            row = net.op("Relu", row, shape=(1, 7))
            row = net.op("Gemm", row, net.weight(3, 7), shape=(1, 3), transB=1)
        net.graph.add_output(row)
    unread = [v for v in net.images[1:] if not v.uses]
    for value in dict.fromkeys([*unread, *draw(st.lists(st.sampled_from(net.images[1:]), max_size=1))]):
        net.graph.add_output(value)
    return net.graph


def samples(graph: Graph, count: int, seed: int = 0) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    shape = dims(graph.inputs[0])
    return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]


def apply(graph: Graph, steps: str, target: Target | None = None) -> Context:
    """Run the passes over ``graph``, calibrated on four samples."""
    ctx = Context(target)
    ctx.calibration = Calibrator(open_data(samples(graph, 4)), runnable)
    run(graph, recipe.parse_line(steps).passes, ctx)
    return ctx


def outputs(graph: Graph, feed: dict[str, Array]) -> list[Array]:
    with runnable(graph, []) as call:
        found = call(feed)
    return [found[v.name] for v in graph.outputs]


def copy(graph: Graph) -> Graph:
    return parse(show(graph))
