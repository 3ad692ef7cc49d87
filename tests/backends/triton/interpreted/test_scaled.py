"""Products of codes, in the interpreter, against float64: all scales, forms, ragged shapes and epilogues."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from qcompiler.backends.triton import layouts, scaled, scaled_call
from qcompiler.backends.triton.tiles import Tile

DECODE = Tile(16, 64, 256, 4, 2)
PREFILL = Tile(64, 128, 128, 4, 2)
SPLIT = Tile(16, 64, 128, 4, 2, split=2)
STREAM = Tile(128, 128, 128, 4, 2)
ROUNDING = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""Of a result, relative to the largest one: its own rounding and that of some sums in f32."""
F8 = ("f8e4m3", "f8e5m2")


def codes_of(form: str, *shape: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if form == "int8":
        return torch.randint(-128, 128, shape, generator=g, dtype=torch.int8)
    return torch.randn(*shape, generator=g).to(scaled_call.CODES[form])


def factors(*shape: int, seed: int, element: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.5).to(element)


def eight(form: str, m: int, n: int, k: int, x_scale: str, w_scale: str) -> dict[str, Any]:
    """Arguments of an 8-bit product, with scales of ``tensor``, ``row`` or ``block``."""
    blocks = -(-k // 128)
    x_shape = {"tensor": (), "row": (m, 1), "block": (m, blocks)}[x_scale]
    w_shape = {"tensor": (1,), "row": (n,), "block": (-(-n // 128), blocks)}[w_scale]
    return {
        "x": codes_of(form, m, k, seed=m),
        "x_scale": factors(*x_shape, seed=1),
        "codes": codes_of(form, n, k, seed=n),
        "scales": factors(*w_shape, seed=2),
        "zeros": None,
        "n": n,
        "group": 0,
        "block": 128 if x_scale == "block" else 0,
        "form": form,
    }


def four(form: str, code: str, m: int, n: int, k: int, group: int, x_scale: str, asym: bool) -> dict[str, Any]:
    """Arguments of a product of 4-bit weights; they are packed by ``layouts``."""
    given = eight(code, m, n, k, x_scale, "row")
    rng = np.random.default_rng(n)
    low = -8 if form == "int4" else 0
    kind = np.int8 if form == "int4" else np.uint8
    count = -(-k // group) if group else 1
    codes = rng.integers(low, low + 16, (n, k)).astype(kind)
    scales = (rng.random((n, count)) + 0.5).astype(np.float32)
    given["codes"] = torch.from_numpy(layouts.pack_codes(codes, form))
    given["scales"] = torch.from_numpy(layouts.pack_scales(scales, n, k, group))
    zeros = np.zeros((n, count), kind)
    if asym:
        zeros = rng.integers(low, low + 16, (n, count)).astype(kind)
        given["zeros"] = torch.from_numpy(layouts.pack_zeros(zeros, n, k, group, form))
    elif form == "uint4":
        zeros = zeros * 0
    width = group or k
    spread = [np.repeat(a.astype(np.float64), width, 1)[:, :k] for a in (zeros, scales)]
    given["weight"] = torch.from_numpy((codes.astype(np.float64) - spread[0]) * spread[1])
    return given | {"group": group, "form": form}


def exact(given: dict[str, Any]) -> torch.Tensor:
    """x W^T in float64."""
    x, n, k = given["x"].double(), given["n"], given["x"].shape[-1]
    wide = x * (given["x_scale"].double().repeat_interleave(128, -1)[..., :k] if given["block"] else given["x_scale"])
    weight = given.get("weight")
    if weight is None:
        scales = given["scales"].double()
        if scales.dim() == 2:
            scales = scales.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
        elif scales.numel() > 1:
            scales = scales[:, None]
        weight = given["codes"].double() * scales
    return wide @ weight.T


def run(given: dict[str, Any], tile: Tile, out: torch.dtype = torch.float32, act: str = "none", **extra: Any) -> Any:
    arguments = {key: value for key, value in given.items() if key != "weight"}
    rest = {"bias": None, "mul": None, "residual": None} | extra
    return scaled.linear_cuda(**arguments, **rest, act=act, out=out, tile=tile)


def call_of(given: dict[str, Any]) -> scaled_call.Call:
    return scaled_call.Call(**{key: value for key, value in given.items() if key != "weight"})


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert float(error) <= ROUNDING[found.dtype]


@pytest.mark.parametrize("tile", [DECODE, PREFILL, SPLIT], ids=["decode", "prefill", "split"])
@pytest.mark.parametrize("form", ["int8", "f8e5m2"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 256), (5, 100, 304), (66, 130, 144), (3, 70, 129)])
def test_scales_of_rows(form: str, m: int, n: int, k: int, tile: Tile) -> None:
    given = eight(form, m, n, k, "row", "row")
    close(run(given, tile), exact(given))


@pytest.mark.parametrize("form", ["int8", *F8])
@pytest.mark.parametrize("scales", ["row", "block"])
def test_many_rows_are_loaded_by_descriptors(form: str, scales: str) -> None:
    """Ragged M, N and K, of a view whose rows lie apart; K that does not suit the unit goes the other way."""
    m, n, k = 140, 200, 304
    given = eight(form, m, n, k, scales, scales)
    assert scaled.streams(call_of(given), STREAM, 90)
    close(run(given, STREAM), exact(given))
    given["x"] = torch.cat([given["x"], given["x"]], 1)[:, :k]
    mul, bias = factors(m, n, seed=4), factors(n, seed=5)
    assert scaled.streams(call_of(given), STREAM, 90)
    close(run(given, STREAM, act="relu", mul=mul, bias=bias), (exact(given) + bias.double()).relu() * mul.double())
    other = eight(form, m, n, 301, "row", "row")
    assert not scaled.streams(call_of(other), STREAM, 90)
    assert not scaled.streams(call_of(given), STREAM, 89)
    assert not scaled.streams(call_of(given | {"x": given["x"][:, 8:296]}), STREAM, 90)


@pytest.mark.parametrize("form", ["int8", "f8e4m3"])
@pytest.mark.parametrize("x_scale", ["tensor", "row", "block"])
@pytest.mark.parametrize("w_scale", ["tensor", "row", "block"])
def test_every_pair_of_scales(form: str, x_scale: str, w_scale: str) -> None:
    given = eight(form, 5, 200, 304, x_scale, w_scale)
    for tile in (PREFILL,) if x_scale == w_scale else (SPLIT,):
        close(run(given, tile), exact(given))


def test_int8_sums_are_exact() -> None:
    """All at the end of the range: the sum is 2^14 K, an integer that f32 holds."""
    k = 1024
    given = eight("int8", 3, 64, k, "tensor", "tensor")
    given |= {"x_scale": torch.ones(()), "scales": torch.ones(1)}
    given["x"].fill_(-128)
    given["codes"].fill_(-128)
    for tile in (DECODE, PREFILL, SPLIT):
        assert bool((run(given, tile) == 2.0**14 * k).all())


def test_long_sums_of_8_bit_floats_are_added_in_parts() -> None:
    given = eight("f8e4m3", 2, 64, 4224, "row", "row")
    call = call_of(given)
    assert [call.parts(sm) for sm in (89, 90, 100)] == [True, True, False]
    close(run(given, Tile(16, 64, 256, 4, 2)), exact(given))


@pytest.mark.parametrize(("form", "asym"), [("int4", False), ("int4", True), ("uint4", True)])
@pytest.mark.parametrize("code", ["int8", "f8e4m3"])
@pytest.mark.parametrize("group", [0, 128, 256])
def test_4_bit_weights(form: str, code: str, asym: bool, group: int) -> None:
    for m, n, k, tile in ((1, 64, 256, DECODE), (5, 100, 304, SPLIT), (66, 70, 261, PREFILL)):
        given = four(form, code, m, n, k, group, "row", asym)
        close(run(given, tile), exact(given))


@pytest.mark.parametrize("x_scale", ["tensor", "block"])
def test_4_bit_weights_with_other_scales_of_the_activation(x_scale: str) -> None:
    given = four("int4", "f8e4m3", 5, 100, 304, 128, x_scale, True)
    close(run(given, DECODE), exact(given))


FUNCTIONS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
}


@pytest.mark.parametrize("tile", [DECODE, PREFILL, SPLIT], ids=["decode", "prefill", "split"])
@pytest.mark.parametrize("form", ["int8", "f8e4m3", "int4"])
def test_epilogues(form: str, tile: Tile) -> None:
    m, n, k = 5, 72, 128
    given = four(form, "int8", m, n, k, 128, "row", False) if form == "int4" else eight(form, m, n, k, "row", "row")
    bias, mul, residual = factors(n, seed=3), factors(m, n, seed=4), factors(m, n, seed=5)
    given["x_scale"] /= float(exact(given).abs().max()) / 4  # functions are not linear near 0 alone
    types = itertools.cycle((torch.float16, torch.bfloat16, torch.float32))
    for (act, function), out in zip(FUNCTIONS.items(), types, strict=False):
        extra = {"bias": bias.to(out), "mul": mul.to(out), "residual": residual.to(out)}
        wanted = function(exact(given) + extra["bias"].double()) * extra["mul"].double() + extra["residual"].double()
        close(run(given, tile, out, act, **extra), wanted)
    close(run(given, tile, mul=mul[:1]), exact(given) * mul[:1].double())


@pytest.mark.parametrize("form", ["int8", "f8e4m3", "int4"])
def test_kernel_and_reference_of_the_operator_agree_on_views(form: str) -> None:
    given = four(form, "int8", 6, 72, 256, 0, "row", True) if form == "int4" else eight(form, 6, 72, 256, "row", "row")
    given["x"] = given["x"].view(2, 3, 256).transpose(0, 1)
    given["x_scale"] = factors(3, 2, 1, seed=3)
    arguments = {key: value for key, value in given.items() if key != "weight"}
    rest = {"bias": None, "mul": None, "residual": None, "act": "silu", "out": torch.bfloat16}
    found = scaled.linear_cuda(**arguments, **rest, tile=DECODE)
    wanted = torch.ops.qcompiler.a8_linear(**arguments, **rest)
    assert found.shape == wanted.shape == (3, 2, 72)
    close(found, wanted.double())


def test_a_vector() -> None:
    given = eight("int8", 1, 72, 256, "tensor", "row")
    given["x"] = given["x"][0]
    found = run(given, DECODE)
    assert found.shape == (72,)
    close(found, exact(given))
