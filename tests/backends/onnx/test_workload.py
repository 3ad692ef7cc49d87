"""What models are timed with: sizes by phase and batch, caches, bytes of weights that a run reads."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.backends.onnx import workload
from qcompiler.backends.onnx.workload import Size, Workload, weight_bytes_read
from qcompiler.errors import InputError
from qcompiler.reader import parse

IDS = "%ids : int64[batch, sequence]"
CACHE = (
    "%input_ids : int64[batch, seq]; %past : f16[batch, 2, past_len, 8]; "
    '%mask : int64[batch, "past_len + seq"]; %position_ids : int64[batch, seq]'
)
PICTURE = "%x : f32[N, 3, height, width]"


def work(inputs: str, body: str = "", **dims: int) -> Workload:
    lines = "\n  ".join(f"input {i}" for i in inputs.split("; "))
    return Workload(parse(f"graph @main dialect=onnx {{\n  {lines}\n  {body}\n  return\n}}\n"), dims)


@pytest.mark.parametrize(
    ("inputs", "shapes", "varies"),
    [
        (IDS, ((8, 5),), (True, True, False)),
        ("%ids : int64[batch, max_seq_len_in_batch]", ((8, 5),), (True, True, False)),
        (CACHE, ((8, 5), (8, 2, 3, 8), (8, 8), (8, 5)), (True, True, True)),
        (PICTURE, ((8, 3, 224, 224),), (True, False, False)),
        ("%x : f32[?, 3, ?, ?]", ((8, 3, 224, 224),), (True, False, False)),
        ("%x : f32[rows, 64]", ((8, 64),), (True, False, False)),
        ("%x : f32[1, 1, 28, 28]", ((1, 1, 28, 28),), (False, False, False)),
        ("%x : f32[tokens, 64]", ((5, 64),), (False, True, False)),
        ("%x : f32[batch, 64]; %sr : int64[]", ((8, 64), ()), (True, False, False)),
    ],
)
def test_sizes(inputs: str, shapes: tuple[tuple[int, ...], ...], varies: tuple[bool, bool, bool]) -> None:
    found = work(inputs)
    assert found.shapes(Size(8, 5, 3)) == shapes
    assert (found.varies_batch, found.varies_rows, found.keeps_past) == varies


def test_a_dimension_may_be_fixed() -> None:
    found = work(PICTURE, height=96, width=64)
    assert found.shapes(Size(2, 1, 1)) == ((2, 3, 96, 64),)
    fixed = work(CACHE, past_len=7)
    assert fixed.shapes(Size(1, 5, 3))[1:3] == ((1, 2, 7, 8), (1, 12))
    assert not fixed.keeps_past
    with pytest.raises(InputError, match="--dim depth names no open dimension of the inputs; there are: N, height"):
        work(PICTURE, depth=3)


def test_values_follow_from_the_cache() -> None:
    feed = work(CACHE + "; %seqlens_k : int32[batch]; %total_seq_len : int32[]").feed(Size(2, 4, 10))
    assert feed["position_ids"].tolist() == [[10, 11, 12, 13]] * 2
    assert feed["mask"].tolist() == [[1] * 14] * 2
    assert feed["seqlens_k"].tolist() == [13, 13]
    assert feed["total_seq_len"] == 14
    assert feed["past"].dtype == np.float16


def test_token_ids_are_found() -> None:
    table = "const %w : f32[50, 8] = rand:1\n  %e : f32[batch, sequence, 8] = onnx.Gather(%w, %t)"
    looked = work("%t : int64[batch, sequence]", table)
    assert looked.tokens is not None and looked.tokens.name == "t"
    assert work(CACHE).tokens is not None
    assert work(PICTURE).tokens is None
    assert work("%t : int64[batch]").tokens is None


def test_what_is_not_made_up_is_named() -> None:
    assert "no values are made up for the input 'x'" in work("%x : bf16[batch, 8]").refusal()
    assert work(IDS).refusal() == ""


def test_inputs_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "INPUT_BYTES", 8 * 8 * 5)
    work(IDS).feed(Size(8, 5, 1))
    with pytest.raises(InputError, match="its inputs would take 328 bytes, more than 320"):
        work(IDS).feed(Size(41, 1, 1))


def test_weights_that_a_run_reads() -> None:
    body = """const %table : f32[100, 8] = rand:1
  const %w : f32[8, 4] = rand:2
  const %codes : int8[4, 6] = rand:3
  const %unused : f32[9] = rand:4
  const %tied : f32[100, 4] = rand:5
  %e : f32[2, 8] = onnx.Gather(%table, %ids)
  %h : f32[2, 4] = onnx.MatMul(%e, %w)
  %h2 : f32[2, 4] = onnx.MatMul(%e, %w)
  %i : int32[2, 6] = onnx.MatMulInteger(%ids8, %codes)
  %t : f32[2, 4] = onnx.Gather(%tied, %ids)
  %y : f32[4, 2] = onnx.MatMul(%tied, %h2)"""
    graph = work("%ids : int64[2]; %ids8 : uint8[2, 4]", body).graph
    assert weight_bytes_read(graph) == 8 * 4 * 4 + 24 + 100 * 4 * 4
