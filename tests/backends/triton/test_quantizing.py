"""Operators that quantize activations: their reference against that of the IR, what they refuse, how they trace."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from qcompiler import integer_numerics, numerics
from qcompiler.backends.triton import quantizing as _registered  # noqa: F401
from qcompiler.errors import InputError
from qcompiler.scheme import parse_scheme

OPS: Any = torch.ops.qcompiler
F8 = {torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn, torch.float8_e5m2: ml_dtypes.float8_e5m2}
CODES = (torch.int8, *F8)


def drawn(*shape: int, element: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * 10 ** torch.empty(*shape[:-1], 1).uniform_(-3, 2, generator=g)
    x.view(-1, shape[-1])[-1] = 0.0
    return x.to(element)


@pytest.mark.parametrize("element", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_rows_are_those_of_the_reference(element: torch.dtype) -> None:
    x, scheme = drawn(2, 5, 333, element=element), parse_scheme("int8 token sym dynamic")
    codes, scale = OPS.quantize_rows(x, None, None, 0.0, torch.int8, 0)
    array = x.float().numpy()
    wanted, zero = integer_numerics.dynamic_params(array, scheme)
    np.testing.assert_array_equal(scale.numpy(), wanted)
    np.testing.assert_array_equal(codes.numpy(), numerics.quantize(array, wanted, zero, scheme))
    static = OPS.quantize_static(x, torch.tensor([0.02]), None, torch.int8)
    wanted = numerics.quantize(array, np.float32(0.02), None, parse_scheme("int8 tensor sym"))
    np.testing.assert_array_equal(static.numpy(), wanted)


@pytest.mark.parametrize("code", F8)
def test_blocks_of_8_bit_floats(code: torch.dtype) -> None:
    """By hand: 128 columns over the largest code, cast by ml_dtypes."""
    x = drawn(3, 300)
    largest = float(ml_dtypes.finfo(F8[code]).max)
    codes, scale = OPS.quantize_rows(x, None, None, 0.0, code, 128)
    assert scale.shape == (3, 3)
    for row in range(3):
        for block in range(3):
            part = x[row, 128 * block : 128 * (block + 1)].numpy()
            wanted = np.float32(np.float64(np.abs(part).max()) / largest) if part.any() else np.float32(1)
            assert float(scale[row, block]) == wanted
            held = codes[row, 128 * block : 128 * (block + 1)].view(torch.uint8).numpy()
            np.testing.assert_array_equal(held, (part / wanted).astype(F8[code]).view(np.uint8))


def test_what_is_fused_is_what_its_parts_give() -> None:
    """Norm and rescale, one after the other in bf16, then the quantizer alone."""
    x, g = drawn(4, 96, element=torch.bfloat16), torch.Generator().manual_seed(1)
    smooth, weight = (torch.rand(96, generator=g).bfloat16() + 0.5 for _ in range(2))
    rms = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    normed = (x.float() * rms * weight.float()).bfloat16()
    for code in CODES:
        found = OPS.quantize_rows(x, smooth, weight, 1e-6, code, 0)
        wanted = OPS.quantize_rows(normed * smooth, None, None, 0.0, code, 0)
        torch.testing.assert_close(found[1], wanted[1], rtol=2.0**-7, atol=0)  # an ulp of bf16 in the largest
        apart = (found[0].float() * found[1] - wanted[0].float() * wanted[1]).abs()
        assert bool((apart <= (wanted[0].float() * wanted[1]).abs() * 0.26 + wanted[1]).all())


REFUSED = {
    "integers": (lambda: OPS.quantize_rows(torch.ones(2, 8).long(), None, None, 0.0, torch.int8, 0), "not torch.int64"),
    "a scalar": (lambda: OPS.quantize_rows(torch.tensor(1.0), None, None, 0.0, torch.int8, 0), "is a scalar"),
    "codes": (lambda: OPS.quantize_rows(torch.ones(2, 8), None, None, 0.0, torch.uint8, 0), "not torch.uint8"),
    "block": (lambda: OPS.quantize_rows(torch.ones(2, 8), None, None, 0.0, torch.int8, 64), "not 64"),
    "factors": (
        lambda: OPS.quantize_rows(torch.ones(2, 8), torch.ones(9), None, 0.0, torch.int8, 0),
        r"smooth is a float vector of K=8, not torch.float32\[9\]",
    ),
    "norm": (
        lambda: OPS.quantize_rows(torch.ones(2, 8), None, torch.ones(2, 8), 0.0, torch.int8, 0),
        "norm_weight is a float vector of K=8",
    ),
    "scale": (lambda: OPS.quantize_static(torch.ones(2, 8), torch.ones(2), None, torch.int8), "one f32 scale"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("block", [0, 128])
def test_opcheck(code: torch.dtype, block: int) -> None:
    x, vector = drawn(3, 2, 130, element=torch.bfloat16).transpose(0, 1), torch.ones(130)
    for given in ((None, None), (vector, vector)):
        torch.library.opcheck(OPS.quantize_rows.default, (x, *given, 1e-5, code, block))
    torch.library.opcheck(OPS.quantize_static.default, (x, torch.tensor(0.1), vector, code))


class Quantized(torch.nn.Module):
    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes, scale = OPS.quantize_rows(x, None, weight, 1e-5, torch.int8, 0)
        return codes, scale, OPS.quantize_static(x, torch.ones(()), None, torch.int8)


def test_it_is_compiled_and_exported_whole() -> None:
    net, args = Quantized(), (drawn(3, 64), torch.rand(64))
    wanted = net(*args)
    compiled = torch.compile(net, backend="eager", fullgraph=True)(*args)
    program = torch.export.export(net, args, dynamic_shapes=({0: torch.export.Dim("rows")}, None))
    names = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert "qcompiler.quantize_rows.default" in names
    assert "qcompiler.quantize_static.default" in names
    more = drawn(7, 64, seed=2)
    for found, expected in ((compiled, wanted), (program.module()(more, args[1]), net(more, args[1]))):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
