"""Inputs made up for models: sizes from symbols, values that ops accept."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.backends.onnx.feeds import INPUT_BYTES, made_up
from qcompiler.reader import parse

Shapes = dict[str, tuple[int, ...]]


def first(inputs: str, m: int = 5, body: str = "") -> dict[str, np.ndarray]:
    lines = "\n  ".join(f"input {i}" for i in inputs.split("; "))
    return next(made_up(parse(f"graph @main dialect=onnx {{\n  {lines}\n  {body}\n  return\n}}\n"), m))


@pytest.mark.parametrize(
    ("inputs", "shapes"),
    [
        ("%x : f32[M, 64]", {"x": (5, 64)}),
        ("%x : f32[?, 64]", {"x": (5, 64)}),
        ("%x : f32[3, 64]", {"x": (3, 64)}),
        ("%ids : int64[batch, sequence]", {"ids": (1, 5)}),
        ("%ids : int64[b, s]; %attention_mask : int64[b, s]", {"ids": (1, 5), "attention_mask": (1, 5)}),
        (
            '%ids : int64[batch, seq]; %past : f16[batch, 2, past_len, 8]; %mask : int64[batch, "past_len + seq"]',
            {"ids": (1, 5), "past": (1, 2, 1, 8), "mask": (1, 6)},
        ),
        ("%mask : int64[batch, total_len]; %ids : int64[batch, seq]", {"mask": (1, 6), "ids": (1, 5)}),
        ('%x : f32["2*M", "M//2", "(M"]', {"x": (10, 2, 5)}),
        ("%x : f32[]", {"x": ()}),
    ],
)
def test_sizes_come_from_symbols(inputs: str, shapes: Shapes) -> None:
    assert {name: a.shape for name, a in first(inputs).items()} == shapes


def test_every_guess_is_another_one() -> None:
    graph = parse("graph @main dialect=onnx {\n  input %x : f32[height, width]\n  return\n}\n")
    assert [f["x"].shape for f in made_up(graph, 7)] == [(1, 7), (7, 1), (7, 7), (1, 1)]


def test_indices_fit_the_table() -> None:
    body = "const %t : f32[3, 4] = rand:1\n  %y : f32[M, 4] = onnx.Gather(%t, %i)"
    ids = first("%i : int64[M]", 200, body)["i"]
    assert (ids.min(), ids.max()) == (0, 2)


def test_values_have_the_type_and_the_meaning() -> None:
    made = first(
        "%m : bool[M]; %attention_mask : int64[M]; %position_ids : int64[1, M]; "
        "%u : uint8[M]; %h : f16[M]; %s : string[M]"
    )
    assert made["m"].all()
    assert (made["attention_mask"] == 1).all()
    assert made["position_ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert made["u"].dtype == np.uint8
    assert made["h"].dtype == np.float16
    assert made["s"].dtype.kind == "U"


def test_a_scale_is_small_and_positive() -> None:
    body = "const %w : int8[8, 8] = rand:1\n  %y : f32[8, 8] = onnx.DequantizeLinear(%w, %s)"
    scale = first("%s : f32[8]", 5, body)["s"]
    assert (scale > 0).all()
    assert (scale < 0.1).all()


@pytest.mark.parametrize("kind", ['opaque"sequence"', "bf16[M]", "int4[M]", "f32[*]"])
def test_what_cannot_be_made_up(kind: str) -> None:
    assert not list(made_up(parse(f"graph @main dialect=onnx {{\n  input %x : {kind}\n  return\n}}\n"), 5))


def test_no_input_is_huge() -> None:
    rows = INPUT_BYTES // 4 // 64
    fits = parse(f"graph @main dialect=onnx {{\n  input %x : f32[{rows}, 64]\n  return\n}}\n")
    over = parse(f"graph @main dialect=onnx {{\n  input %x : f32[{rows + 1}, 64]\n  return\n}}\n")
    assert [f["x"].nbytes for f in made_up(fits, 1)] == [INPUT_BYTES]
    assert not list(made_up(over, 1))
