"""The operators of torch artifacts: numbers against float64, what tracing sees, and the packed weights behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from qcompiler import integer_numerics, numerics
from qcompiler.backends.torch import ops as _registered  # noqa: F401
from qcompiler.backends.torch.packing import PACKED, conv_weight, linear_weight
from qcompiler.errors import InputError
from qcompiler.scheme import parse_scheme

Q = torch.ops.qcompiler
SOME = settings(max_examples=20, deadline=None, derandomize=True)
DYNAMIC = parse_scheme("uint8 tensor asym dynamic")
F32_STEP = 2.0**-22
"""Sums are exact; then at most three roundings to f32 (scale, scale, bias), relative to the largest term."""


class Linear:
    """Random codes of one layer; the reference computes with them in float64."""

    def __init__(self, n: int, k: int, lead: Sequence[int] = (3,), *, bias: bool = True, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.x = torch.randint(0, 256, (*lead, k), dtype=torch.uint8, generator=g)
        self.x_scale = torch.tensor(0.01 + 0.01 * float(torch.rand((), generator=g)))
        self.x_zero = torch.randint(0, 256, (), dtype=torch.uint8, generator=g)
        self.weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=g)
        self.w_scale = torch.rand(n, generator=g) * 0.01 + 0.001
        self.bias = torch.randn(n, generator=g) if bias else None

    def __call__(self, out: torch.dtype = torch.float32, y_scale: float = 1.0, y_zero: int = 0) -> torch.Tensor:
        operands = (self.x, self.x_scale, self.x_zero, self.weight, self.w_scale, self.bias)
        y: torch.Tensor = Q.qlinear(*operands, y_scale, y_zero, out)
        return y

    @property
    def wanted(self) -> torch.Tensor:
        x = (self.x.double() - self.x_zero.double()) * self.x_scale.double()
        y = x @ (self.weight.double() * self.w_scale.double()[:, None]).T
        return y if self.bias is None else y + self.bias.double()


def near(y: torch.Tensor, wanted: torch.Tensor, step: float) -> None:
    assert y.shape == wanted.shape
    if y.numel():
        assert float((y.double() - wanted).abs().max()) <= step * max(1e-30, float(wanted.abs().max()))


@SOME
@given(
    st.lists(st.integers(0, 5), max_size=3), st.integers(1, 70), st.integers(1, 150), st.booleans(), st.integers(0, 9)
)
@example([], 1, 1, True, 0)
@example([1], 64, 64, True, 0)
@example([17], 5, 4097, False, 0)
@example([0], 3, 7, True, 0)
@example([130], 33, 65, True, 0)
def test_linear_is_exact(lead: list[int], n: int, k: int, bias: bool, seed: int) -> None:
    layer = Linear(n, k, lead, bias=bias, seed=seed)
    y = layer()
    near(y, layer.wanted, F32_STEP)
    assert torch.equal(layer(torch.bfloat16), y.bfloat16()), "rounded once, from f32"
    scale = float(np.float32(0.02 * k**0.5))
    codes = (layer.wanted / scale).round().add(7).clamp(0, 255)
    assert float((layer(torch.uint8, scale, 7).double() - codes).abs().max() if codes.numel() else 0) <= 1


def test_the_largest_sums_do_not_saturate() -> None:
    layer = Linear(8, 4096, (5,), bias=False)
    layer.x.fill_(255)
    layer.x_zero.fill_(0)
    layer.weight[:4], layer.weight[4:] = 127, -128
    near(layer(), layer.wanted, F32_STEP)


def test_a_view_of_an_activation_is_read_as_it_lies() -> None:
    layer = Linear(12, 20, (6,))
    wanted = layer()
    layer.x = layer.x.t().contiguous().t()
    assert torch.equal(layer(), wanted)
    layer.weight = layer.weight.t().contiguous().t()
    assert torch.equal(layer(), wanted)


@pytest.mark.parametrize("bits", ["f32", "bf16", "f16"])
@SOME
@given(data=st.data())
def test_dynamic_codes_are_the_reference_s(bits: str, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), max_size=3))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    size, shift = data.draw(st.sampled_from([1e-3, 1.0, 300.0])), data.draw(st.sampled_from([-4.0, 0.0, 4.0]))
    given_ = torch.from_numpy(np.asarray((rng.standard_normal(shape) + shift) * size))
    x = given_.to({"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[bits])
    same_codes(x)


@pytest.mark.parametrize("values", [[0.0, -0.0], [1e-40, -1e-40], [-3.0, -1.0], [5.0], [3e38, -1e38], [2e-38]])
def test_dynamic_codes_at_the_ends(values: list[float]) -> None:
    same_codes(torch.tensor(values))


def same_codes(x: torch.Tensor) -> None:
    """Codes, scale and zero point are, bit for bit, those of the reference in f32."""
    array = x.float().numpy()
    scale, zero = integer_numerics.dynamic_params(array, DYNAMIC)
    codes, s, z = Q.quantize_dynamic(x)
    assert (s.dtype, z.dtype, codes.dtype) == (torch.float32, torch.uint8, torch.uint8)
    assert s.shape == z.shape == () and codes.shape == x.shape
    assert s.item() == scale and z.item() == zero
    wanted = numerics.quantize(array, scale, zero, DYNAMIC)
    np.testing.assert_array_equal(codes.numpy(), wanted)
    np.testing.assert_array_equal(Q.quantize(x, s, z).numpy(), wanted)


@pytest.mark.parametrize("zero", [0, 1, 2, 127, 128, 255])
def test_ties_are_rounded_to_even_before_the_zero_point_is_added(zero: int) -> None:
    x = np.concatenate([np.arange(-300, 300) / 2, [-1e30, 1e30, -np.inf, np.inf]]).astype(np.float32)
    scheme, point = parse_scheme("uint8 tensor asym"), np.asarray(zero, np.uint8)
    got = Q.quantize(torch.from_numpy(x), torch.tensor(1.0), torch.tensor(zero, dtype=torch.uint8))
    np.testing.assert_array_equal(got.numpy(), numerics.quantize(x, np.float32(1) * np.ones(()), point, scheme))


def test_nothing_has_no_range() -> None:
    codes, scale, zero = Q.quantize_dynamic(torch.empty(0, 3))
    assert codes.shape == (0, 3) and (scale.item(), zero.item()) == (1.0, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_without_codes_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="holds NaN or infinity"):
        Q.quantize_dynamic(torch.tensor([1.0, bad]))


# -- convolution ---------------------------------------------------------------------------------------------


def conv_case(
    axes: int, seed: int, *, per: int, each: int, groups: int, out: torch.dtype = torch.float32
) -> tuple[tuple[object, ...], torch.Tensor]:
    """Operands of ``qconv`` and what float64 makes of them."""
    rng = np.random.default_rng(seed)
    kernel, stride, dilation = (rng.integers(1, 4, axes).tolist() for _ in range(3))
    padding = rng.integers(0, 3, axes).tolist()
    size = [(k - 1) * d + int(rng.integers(1, 6)) for k, d in zip(kernel, dilation, strict=True)]
    x = torch.from_numpy(rng.integers(0, 256, (2, per * groups, *size)).astype(np.uint8))
    weight = torch.from_numpy(rng.integers(-128, 128, (each * groups, per, *kernel)).astype(np.int8))
    x_scale, x_zero = torch.tensor(0.02), torch.tensor(int(rng.integers(0, 256)), dtype=torch.uint8)
    w_scale = torch.from_numpy(rng.uniform(0.001, 0.01, each * groups).astype(np.float32))
    bias = torch.from_numpy(rng.standard_normal(each * groups).astype(np.float32)) if seed % 2 else None
    wide = (x.double() - x_zero.double()) * x_scale.double()
    scaled = weight.double() * w_scale.double().view(-1, *[1] * (axes + 1))
    conv = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[axes - 1]
    wanted = conv(wide, scaled, None if bias is None else bias.double(), stride, padding, dilation, groups)
    y = (0.25, 128) if out is torch.uint8 else (1.0, 0)
    return (x, x_scale, x_zero, weight, w_scale, bias, stride, padding, dilation, groups, *y, out), wanted


@SOME
@example(3, 5, 3, 2, 2).via("an axis along which every window sees padding alone")
@given(st.integers(1, 3), st.integers(0, 99), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 1, 2, 3, 16]))
def test_convolution_is_exact(axes: int, seed: int, per: int, each: int, groups: int) -> None:
    args, wanted = conv_case(axes, seed, per=per, each=each, groups=groups)
    y = Q.qconv(*args)
    near(y, wanted, F32_STEP)
    assert y.is_contiguous()
    assert torch.equal(Q.qconv(*args[:-1], torch.bfloat16), y.bfloat16())
    codes = Q.qconv(*args[:-3], 0.25, 128, torch.uint8)
    assert float((codes.double() - (wanted / 0.25).round().add(128).clamp(0, 255)).abs().max()) <= 1


def test_a_convolution_keeps_the_layout_of_its_activation() -> None:
    args, wanted = conv_case(2, 3, per=3, each=5, groups=1)
    x = args[0]
    assert isinstance(x, torch.Tensor)
    y = Q.qconv(x.contiguous(memory_format=torch.channels_last), *args[1:])
    assert y.is_contiguous(memory_format=torch.channels_last)
    near(y, wanted, F32_STEP)


def test_an_empty_batch_is_convolved_to_nothing() -> None:
    args, wanted = conv_case(2, 3, per=3, each=5, groups=1)
    x = args[0]
    assert isinstance(x, torch.Tensor)
    assert Q.qconv(x[:0], *args[1:]).shape == (0, *wanted.shape[1:])


# -- what is refused -----------------------------------------------------------------------------------------


def test_what_onednn_would_get_wrong_is_refused() -> None:
    layer = Linear(8, 16)
    args = (layer.x_scale, layer.x_zero, layer.weight, layer.w_scale, None, 1.0, 0)
    with pytest.raises(InputError, match=r"takes torch\.uint8 activations, not torch\.int8"):
        Q.qlinear(layer.x.to(torch.int8), *args, torch.float32)
    with pytest.raises(InputError, match=r"not torch\.float16"):
        Q.qlinear(layer.x, *args, torch.float16)
    with pytest.raises(InputError, match=r"ends in 15, the weight is \[8, 16\]"):
        Q.qlinear(layer.x[:, :15], *args, torch.float32)
    with pytest.raises(InputError, match="8 output channels and 7 weight scales"):
        Q.qlinear(layer.x, *args[:3], layer.w_scale[:7], *args[4:], torch.float32)
    with pytest.raises(InputError, match=r"has torch\.uint8 codes"):
        Q.qlinear(layer.x, *args[:2], layer.weight.view(torch.uint8), *args[3:], torch.float32)
    operands, _ = conv_case(2, 3, per=3, each=5, groups=1)
    with pytest.raises(InputError, match="does not fit the weight"):
        Q.qconv(torch.zeros(1, 2, 9, 9, dtype=torch.uint8), *operands[1:])
    with pytest.raises(InputError, match=r"f32, f16 and bf16 activations, not torch\.float64"):
        Q.quantize_dynamic(torch.zeros(3, dtype=torch.float64))


# -- tracing -------------------------------------------------------------------------------------------------


def test_torch_s_own_checks_of_an_operator() -> None:
    layer = Linear(12, 20, (2, 3))
    operands = (layer.x, layer.x_scale, layer.x_zero, layer.weight, layer.w_scale, layer.bias)
    torch.library.opcheck(Q.qlinear.default, (*operands, 1.0, 0, torch.bfloat16))
    torch.library.opcheck(Q.qconv.default, conv_case(2, 2, per=2, each=3, groups=2)[0])
    last = torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(Q.quantize_dynamic.default, (last.bfloat16(),))
    torch.library.opcheck(Q.copied.default, (last,))
    torch.library.opcheck(Q.quantize.default, (last, torch.tensor(0.5), torch.tensor(3, dtype=torch.uint8)))


def test_what_tracing_sees_is_laid_out_as_what_runs() -> None:
    last = torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    scale, zero = torch.tensor(0.5), torch.tensor(3, dtype=torch.uint8)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (Q.qconv.default, conv_case(axes, axes, per=2, each=3, groups=2)[0]) for axes in (1, 2, 3)
    ]
    for x in (torch.randn(2, 3), torch.randn(3, 2).t(), last, torch.randn(3, 1).expand(3, 4), last.half()):
        calls += [(Q.quantize_dynamic.default, (x,)), (Q.quantize.default, (x, scale, zero))]
    for op, args in calls:
        torch.library.opcheck(op, args, test_utils="test_faketensor")


class Net(nn.Module):
    """A convolution, then two linears that share a dynamically quantized activation."""

    weight: torch.Tensor
    kernel: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.register_buffer("kernel", torch.randint(-128, 128, (4, 3, 3, 3), dtype=torch.int8, generator=g))
        self.register_buffer("weight", torch.randint(-128, 128, (10, 4), dtype=torch.int8, generator=g))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale, zero = Q.quantize_dynamic(x)
        ones = torch.ones(4)
        y = Q.qconv(codes, scale, zero, self.kernel, ones, None, [1, 1], [1, 1], [1, 1], 1, 1.0, 0, torch.float32)
        row = y.flatten(2).mean(-1)
        codes, scale, zero = Q.quantize_dynamic(row)
        parts = [
            Q.qlinear(codes, scale, zero, w, torch.ones(10), None, 1.0, 0, torch.float32)
            for w in (self.weight, self.weight)
        ]
        return parts[0] + parts[1]


def test_compiled_and_exported_with_any_batch(tmp_path: Path) -> None:
    net, x = Net().eval(), torch.randn(3, 3, 6, 6)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    decomposed = program.run_decompositions().module()
    for size in (3, 5, 2):
        x = torch.randn(size, 3, 6, 6)
        for other in (compiled, loaded, decomposed):
            assert torch.equal(other(x), net(x))
    names = [str(n.target) for n in program.graph.nodes]
    assert names.count("qcompiler.qlinear.default") == 2 and names.count("qcompiler.qconv.default") == 1


def test_a_packed_weight_is_taken_as_it_is() -> None:
    layer = Linear(12, 20)
    wanted = layer()
    layer.weight = linear_weight(layer.weight)
    held = len(PACKED)
    assert torch.equal(layer(), wanted) and len(PACKED) == held
    for axes in (1, 2, 3):
        args, _ = conv_case(axes, 5, per=3, each=2, groups=2)
        weight, shape = args[3], args[6:10]
        assert isinstance(weight, torch.Tensor)
        wanted = Q.qconv(*args)
        assert torch.equal(Q.qconv(*args[:3], conv_weight(weight, *shape), *args[4:]), wanted)  # type: ignore[arg-type]


def test_a_packed_weight_is_traced_too() -> None:
    layer = Linear(12, 20)
    packed = linear_weight(layer.weight)

    def run(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = Q.qlinear(x, layer.x_scale, layer.x_zero, packed, layer.w_scale, None, 1.0, 0, torch.float32)
        return y

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(layer.x), run(layer.x))


def test_codes_by_hand() -> None:
    """The law that both follow, by hand: range -1..3, so scale 4/255 and zero point 64 (63.75 rounded)."""
    codes, scale, zero = Q.quantize_dynamic(torch.tensor([-1.0, 0.0, 3.0]))
    assert scale.item() == np.float32(4 / 255) and zero.item() == 64
    assert codes.tolist() == [0, 64, 255]
