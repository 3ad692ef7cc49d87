"""The linear of codes: its reference against float64 and the reference of the IR, what it refuses, how it traces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qcompiler import numerics
from qcompiler.backends.triton import layouts, scaled, scaled_call
from qcompiler.backends.triton.architectures import ARCHITECTURES
from qcompiler.backends.triton.tiles import Tile
from qcompiler.dtypes import F64
from qcompiler.errors import InputError
from qcompiler.scheme import parse_scheme

OPS: Any = torch.ops.qcompiler
FORMS = tuple(scaled_call.CODES)


def arguments(form: str, m: int = 5, n: int = 72, k: int = 300, **changed: Any) -> dict[str, Any]:
    """Arguments that fit, with scales of rows, but for those given."""
    g = torch.Generator().manual_seed(n)
    code = scaled_call.CODES.get(form, torch.int8)
    four = form in scaled_call.SHIFTS
    x, codes = ((torch.randn(r, k, generator=g) * 30).to(code) for r in (m, n))
    scales = torch.rand(n, generator=g) + 0.5
    if four:
        laid = (np.random.default_rng(n).integers(0, 16, (n, k)) - scaled_call.SHIFTS[form]).astype(
            np.int8 if form == "int4" else np.uint8
        )
        codes = torch.from_numpy(layouts.pack_codes(laid, form))
        scales = torch.from_numpy(layouts.pack_scales(scales[:, None].numpy(), n, k, 0))
    made = {
        "x": x,
        "x_scale": torch.rand(m, 1, generator=g) + 0.5,
        "codes": codes,
        "scales": scales,
        "zeros": None,
        "bias": torch.randn(n, generator=g),
        "mul": None,
        "residual": None,
        "n": n,
        "group": 0,
        "block": 0,
        "form": form,
        "act": "none",
        "out": torch.float32,
    }
    return made | changed


@pytest.mark.parametrize("x_scale", ["tensor", "row", "block"])
@pytest.mark.parametrize("w_scale", ["tensor", "row", "block"])
@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_the_product_of_what_codes_stand_for(form: str, x_scale: str, w_scale: str) -> None:
    m, n, k = 5, 140, 300
    shapes = {"tensor": (1,), "row": (m, 1), "block": (m, 3)}, {"tensor": (1,), "row": (n,), "block": (2, 3)}
    xs, ws = torch.rand(shapes[0][x_scale]) + 0.5, torch.rand(shapes[1][w_scale]) + 0.5
    given = arguments(form, m, n, k, x_scale=xs, scales=ws, block=128 if x_scale == "block" else 0)
    column, row = np.arange(k) // 128, np.arange(n) // 128
    x = given["x"].double() * (xs.double()[:, column] if x_scale == "block" else xs.double())
    factor = {"tensor": ws, "row": ws[:, None]}.get(w_scale, ws[row][:, column] if w_scale == "block" else None)
    assert factor is not None
    wanted = x @ (given["codes"].double() * factor.double()).T + given["bias"].double()
    torch.testing.assert_close(
        OPS.a8_linear(**given).double(), wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max())
    )


@pytest.mark.parametrize("text", ["int4 channel sym", "int4 g128 asym", "int4 g256 sym", "uint4 g128 asym"])
def test_4_bit_weights_are_those_of_the_reference(text: str) -> None:
    """Against ``numerics.dequantize`` of the canonical codes, laid out by ``layouts``."""
    n, k = 70, 384
    scheme = parse_scheme(text)
    scheme = scheme.with_axis(0 if scheme.granularity == "channel" else 1)
    weight = np.random.default_rng(0).standard_normal((n, k)).astype(np.float32)
    scale, zero = numerics.choose_qparams(weight, scheme)
    codes = numerics.quantize(weight, scale, zero, scheme)
    group, form = (scheme.group[0] if scheme.group else 0), str(scheme.dtype)
    laid = {
        "codes": torch.from_numpy(layouts.pack_codes(codes, form)),
        "scales": torch.from_numpy(layouts.pack_scales(scale.reshape(n, -1), n, k, group)),
        "zeros": None if zero is None else torch.from_numpy(layouts.pack_zeros(zero.reshape(n, -1), n, k, group, form)),
    }
    for code in (torch.int8, torch.float8_e4m3fn):
        given = arguments("int4", 3, n, k, group=group, **laid) | {"form": form, "bias": None}
        given["x"] = given["x"].to(code)
        wanted = given["x"].double() * given["x_scale"].double()
        wanted = wanted @ torch.from_numpy(numerics.dequantize(codes, scale, zero, scheme, F64)).T
        torch.testing.assert_close(
            OPS.a8_linear(**given).double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max())
        )


def test_what_follows_the_product() -> None:
    given = arguments("int8", x_scale=torch.full((5, 1), 2.0**-12))
    plain = OPS.a8_linear(**given)
    mul, residual = torch.rand(5, 72), torch.rand(1, 72)
    found = OPS.a8_linear(**given | {"act": "silu", "mul": mul, "residual": residual, "out": torch.bfloat16})
    torch.testing.assert_close(found, (torch.nn.functional.silu(plain) * mul + residual).bfloat16())
    assert OPS.a8_linear(**arguments("int8", x_scale=torch.ones(()), x=torch.ones(300).to(torch.int8))).shape == (72,)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "form": (arguments("int8") | {"form": "uint8"}, "no weights of form 'uint8'; there are int8, f8e4m3"),
    "floats": (arguments("int8", x=torch.ones(5, 300)), "int8, e4m3 or e5m2, not torch.float32"),
    "mixed": (arguments("f8e4m3", x=torch.ones(5, 300).to(torch.int8)), "f8e4m3 weights do not multiply torch.int8"),
    "e5m2": (arguments("int4", x=torch.ones(5, 300).to(torch.float8_e5m2)), "15, which e5m2 does not hold"),
    "block": (arguments("int8", block=64), r"\(block=128\) or a row \(0\), not 64"),
    "codes": (arguments("int8") | {"n": 71}, r"are torch.int8\[71, 300\], not torch.int8\[72, 300\]"),
    "group": (arguments("int4", group=64), "groups of a multiple of 128, not 64; quantize with such groups, or leave"),
    "zeros": (arguments("int8", zeros=torch.zeros(72)), "neither groups nor zero points"),
    "x_scale": (arguments("int8", x_scale=torch.ones(4, 1)), r"f32 \[5, 1\], \[1\] or \[\], not torch.float32\[4, 1\]"),
    "scales": (
        arguments("int8", scales=torch.ones(71)),
        r"floats \[72\] or \[1\] or \[1, 3\], not torch.float32\[71\]",
    ),
    "zero type": (arguments("int4", zeros=torch.zeros(1, 128)), r"int16\[1, 128\], not torch.float32"),
    "out": (arguments("int8", out=torch.int8), "f32, f16 or bf16, not torch.int8"),
    "act": (arguments("int8", act="tanh"), "not 'tanh'"),
    "bias": (arguments("int8", bias=torch.ones(5)), r"\[72\], not \[5\]"),
    "residual": (arguments("int8", residual=torch.ones(4, 72)), "does not broadcast"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused(what: str) -> None:
    given, message = REFUSED[what]
    with pytest.raises(InputError, match=message):
        OPS.a8_linear(**given)


@pytest.mark.parametrize("form", [*FORMS, *scaled_call.SHIFTS])
def test_opcheck(form: str) -> None:
    given = arguments(form, mul=torch.rand(5, 72), residual=torch.rand(5, 72), act="gelu")
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not form.startswith("f8"):  # torch's own check of schemas multiplies its inputs, which 8-bit floats cannot
        tests.append("test_schema")
    torch.library.opcheck(OPS.a8_linear.default, tuple(given.values()), test_utils=tests)


class Linear(torch.nn.Module):
    """Quantizes its input and multiplies."""

    def __init__(self) -> None:
        super().__init__()
        given = arguments("int8", k=64)
        self.register_buffer("codes", given["codes"])
        self.register_buffer("scales", given["scales"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = OPS.quantize_rows(x, None, None, 0.0, torch.int8, 0)
        weight = (self.codes, self.scales, None, None, None, None)
        made: torch.Tensor = OPS.a8_linear(codes, scale, *weight, 72, 0, 0, "int8", "relu", torch.float32)
        return made


def test_it_is_compiled_and_exported_whole() -> None:
    net, x = Linear(), torch.randn(2, 3, 64)
    compiled = torch.compile(net, backend="eager", fullgraph=True)(x)
    program = torch.export.export(
        net, (x,), dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("rows")},)
    )
    assert any(str(n.target) == "qcompiler.a8_linear.default" for n in program.graph.nodes)
    assert torch.equal(compiled, net(x))
    more = torch.randn(5, 2, 64)
    assert torch.equal(program.module()(more), net(more))


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_every_architecture_has_a_tile_for_every_call(sm: int) -> None:
    """From the shipped tables; sums apart have tiles of their own, and 8-bit floats need their units."""
    for form in (*FORMS, *scaled_call.SHIFTS):
        if form.startswith("f8") and not ARCHITECTURES[sm].native_f8:
            continue
        for m in (1, 17, 1000):
            given = arguments(form, m)
            call = scaled_call.Call(*(given[f] for f in scaled_call.Call.__dataclass_fields__))
            tile = scaled.tile_of(call, sm)
            assert isinstance(tile, Tile)
            assert tile.bm == (16 if m == 1 else 32 if m == 17 else 128)
