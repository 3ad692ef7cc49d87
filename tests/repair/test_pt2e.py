"""torch's pt2e flow exported to ONNX: the nodes that torch 2.13's exporter writes, by hand, and the flow itself.

quantized_decomposed.quantize_per_tensor and dequantize_per_channel become QuantizeLinear and DequantizeLinear of opset
20: rank-0 activation scales, an int8 zero for each channel, weights as ``[N, K]`` under Gemm transB, float biases, and
no quantized results of Conv and the last Linear. quantized_decomposed.choose_qparams (dynamic activations) has no ONNX
function there, so such models do not export. The flow itself lives in torchao; where that is not installed, its tests
are skipped.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.repair.harness import EXACT, repair, saved
from tests.verify.build import Array, Net, rng, rows

SIDE = 8


def channel_weight(net: Net, name: str, shape: tuple[int, ...]) -> str:
    """``[N, ..]`` int8 codes with a scale and a zero of 0 for each row."""
    r = rng(len(name), *shape)
    codes = net.const(f"{name}_param", r.integers(-127, 128, shape).astype(np.int8))
    steps = (0.5 + r.random(shape[0])) / 127 / np.sqrt(shape[-1])
    scale = net.const(f"{name}_val", steps.astype(np.float32))
    zero = net.const(f"{name}_zero", np.zeros(shape[0], np.int8))
    return net.op("DequantizeLinear", [codes, scale, zero], f"dequantize_per_channel_{name}", axis=0)


def pair(net: Net, value: str, scale: float, zero: int, kind: Any = np.uint8) -> str:
    s, z = net.const(f"{value}_s", np.float32(scale)), net.const(f"{value}_z", np.array(zero, kind))
    net.op("QuantizeLinear", [value, s, z], f"quantize_{value}")
    return net.op("DequantizeLinear", [f"quantize_{value}", s, z], f"dequantize_{value}")


def inductor() -> onnx.ModelProto:
    """What the x86 inductor quantizer of torchao 0.18 and torch 2.13 make of conv, relu, pool, linear, relu, linear."""
    net = Net(20)
    net.input("x", (2, 3, 2 * SIDE, 2 * SIDE))
    bias = lambda n, size: net.const(n, rng(size).standard_normal(size).astype(np.float32))  # noqa: E731
    ins = [pair(net, "x", 0.03, 128), channel_weight(net, "conv", (8, 3, 3, 3)), bias("conv.bias", 8)]
    c = net.op("Conv", ins, "conv2d", name="node_conv2d", pads=[1] * 4, strides=[1, 1], dilations=[1, 1], group=1)
    r = net.op("Relu", [c], "relu", name="node_relu")
    p = net.op("AveragePool", [r], "avg_pool2d", name="node_pool", kernel_shape=[4, 4], strides=[4, 4])
    v = net.op("Reshape", [p, net.const("shape", np.array([2, 128]))], "view", name="node_view")
    g = net.op(
        "Gemm",
        [pair(net, v, 0.01, 0), channel_weight(net, "l1", (32, 128)), bias("l1.bias", 32)],
        "linear",
        name="node_linear",
        transB=1,
    )
    a = net.op("Relu", [g], "relu_1", name="node_relu_1")
    net.op(
        "Gemm",
        [pair(net, a, 0.02, 0), channel_weight(net, "l2", (10, 32)), bias("l2.bias", 10)],
        "linear_1",
        name="node_linear_1",
        transB=1,
    )
    net.output("linear_1", shape=[2, 10])
    return net.model()


def test_the_inductor_quantizers_graph(tmp_path: Path) -> None:
    feeds = [{"x": rows((2, 3, 2 * SIDE, 2 * SIDE), m)} for m in (1, 2)]
    out = repair(saved(inductor(), tmp_path), feeds, run=True)
    assert out.before == {"QC101"}
    assert not out.refusal
    assert out.report is not None
    assert {s.name: s.status for s in out.report.sites} == dict.fromkeys(
        ("node_conv2d", "node_linear", "node_linear_1"), "fused"
    )
    assert out.off <= EXACT


def linear_with_int8_input() -> onnx.ModelProto:
    """The XNNPACK quantizer: int8 activations with a zero point, weights behind a Transpose, quantized results."""
    net = Net(20)
    net.input("x", (2, 7, 32))
    w = net.op("Transpose", [channel_weight(net, "a", (64, 32))], "t", name="node_t", perm=[1, 0])
    h = net.op("MatMul", [pair(net, "x", 0.03, 7, np.int8), w], "h", name="node_MatMul")
    b = net.op("Add", [h, net.const("bias", rng(1).standard_normal(64).astype(np.float32))], "hb", name="node_linear")
    e = net.op("Gelu", [pair(net, b, 0.05, -3, np.int8)], "e", name="node_gelu")
    v = net.op("Transpose", [channel_weight(net, "b", (32, 64))], "t2", name="node_t2", perm=[1, 0])
    m = net.op("MatMul", [pair(net, e, 0.02, -100, np.int8), v], "m", name="node_MatMul_1")
    last = pair(net, m, 0.05, 1, np.int8)
    net.op("Add", [last, "x"], "y", name="node_add")
    net.output("y", shape=[2, 7, 32])
    return net.model()


def test_the_xnnpack_quantizers_graph(tmp_path: Path) -> None:
    feeds = [{"x": rows((2, 7, 32), m)} for m in (1, 2)]
    out = repair(saved(linear_with_int8_input(), tmp_path), feeds, run=True)
    assert out.before
    assert not out.refusal
    assert out.report is not None
    status = {s.name: s.status for s in out.report.sites}
    assert (status["node_MatMul"], status["node_MatMul_1"], status["node_gelu"]) == ("fused", "fused", "skipped")
    largest = 3.0  # the residual's inputs are normal, so their largest is above this
    assert out.off <= EXACT + 0.05 / largest


# -- the flow itself ---------------------------------------------------------------------------------------------


def exported(folder: Path, quantizer: str) -> tuple[Path, dict[str, Array]]:
    """A small network through prepare_pt2e, convert_pt2e and torch.onnx.export."""
    torch = pytest.importorskip("torch")
    flow = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason="torchao is not installed")
    if quantizer == "inductor":
        module = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
        chosen = module.X86InductorQuantizer()
        chosen.set_global(module.get_default_x86_inductor_quantization_config())
    else:
        module = pytest.importorskip("torchao.testing.pt2e._xnnpack_quantizer", reason="this torchao has no XNNPACK")
        chosen = module.XNNPACKQuantizer()
        chosen.set_global(module.get_symmetric_quantization_config(is_per_channel=True))

    class Network(torch.nn.Module):  # type: ignore[misc,name-defined]  # torch is imported only here
        def __init__(self) -> None:
            super().__init__()
            self.c1 = torch.nn.Conv2d(3, 8, 3, padding=1)
            self.bn = torch.nn.BatchNorm2d(8)
            self.c2 = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.head = torch.nn.Linear(8 * 16, 10)

        def forward(self, x: Any) -> Any:
            h = torch.relu(self.bn(self.c1(x)))
            h = torch.relu(h + self.c2(h))
            return self.head(torch.nn.functional.max_pool2d(h, 4).flatten(1))

    torch.manual_seed(0)
    x = (torch.randn(2, 3, 16, 16),)
    prepared = flow.prepare_pt2e(torch.export.export(Network().eval(), x).module(), chosen)
    prepared(*x)
    program = torch.export.export(flow.convert_pt2e(prepared), x)
    torch.onnx.export(program, x, dynamo=True, verbose=False).save(folder / "source.onnx")
    return folder / "source.onnx", {"x": x[0].numpy()}


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["inductor", "xnnpack"])
def test_the_flow_itself(quantizer: str, tmp_path: Path) -> None:
    path, feed = exported(tmp_path, quantizer)
    out = repair(path, [feed])
    assert out.before
    assert not out.refusal
    assert out.off <= out.allowed
    assert out.report is not None
    assert sum(s.status == "fused" for s in out.report.sites) == 3
