"""Timing of .pt2 files: what their sizes stand for, inputs made up for them, processes of their own, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qcompiler.backends.onnx.workload import Size
from qcompiler.backends.torch.calling import Call
from qcompiler.backends.torch.feeds import made_up
from qcompiler.backends.torch.timing import TorchTimed
from qcompiler.backends.torch.workload import TorchWorkload, guesses
from qcompiler.benching import bench
from qcompiler.errors import InputError
from qcompiler.ir import Graph
from qcompiler.reader import parse
from tests.backends.torch.measured import Lowered, net, written

CACHED = """graph @main dialect=aten {
  input %input_ids : int64[d0,d1]
  input %past_k_0 : f32[d0,2,d2,8]
  input %attention_mask : int64[d0,"d1 + d2"]
  const %table : f32[50,8] = rand:1
  %e : f32[d0,d1,8] = aten.embedding.default(%table, %input_ids) {args = [$0, $1]}
  return %e, %past_k_0, %attention_mask
}"""


def graph_of(text: str, **meta: object) -> Graph:
    graph = parse(text)
    graph.meta |= meta
    return graph


def test_sizes_are_known_by_where_they_stand() -> None:
    work = TorchWorkload(graph_of(CACHED, ranges=(("d0", 1, 4), ("d1", 1, 9), ("d2", 0, None)), in_spec="x"), {})
    assert work.roles == {"d0": "batch", "d1": "rows", "d2": "past"}
    assert work.tokens is not None
    assert work.tokens.name == "input_ids"
    assert work.varies_batch
    assert work.varies_rows
    assert work.keeps_past
    feed = work.feed(Size(2, 3, 7))
    assert {n: a.shape for n, a in feed.items()} == {
        "input_ids": (2, 3),
        "past_k_0": (2, 2, 7, 8),
        "attention_mask": (2, 10),
    }
    assert feed["input_ids"].max() < 50
    assert feed["attention_mask"].min() == 1
    with pytest.raises(InputError, match=r"takes 1 to 4 for d0 \(batch\), not 8"):
        work.feed(Size(8, 1, 1))
    with pytest.raises(InputError, match=r"takes 1 to 9 for d1 \(rows\), not 512"):
        work.feed(Size(1, 512, 1))


def test_dims_by_name_and_by_the_users_names() -> None:
    text = """graph @main dialect=aten {
      input %x : f32[batch,height,seq]
      return %x
    }"""
    work = TorchWorkload(graph_of(text), {"height": 5})
    assert work.roles == {"batch": "batch", "height": "rows", "seq": "rows"}
    assert work.feed(Size(2, 3, 1))["x"].shape == (2, 5, 3)
    with pytest.raises(InputError, match="--dim width names no open dimension of the inputs; there are: batch, height"):
        TorchWorkload(graph_of(text), {"width": 5})


def test_arguments_of_every_kind() -> None:
    """Constants stand where they were captured, sizes are numbers, bf16 comes through files that know none."""
    text = """graph @main dialect=aten {
      input %x : bf16[d0,4]
      input %n : opaque"SymInt d0 + 1"
      input %scale : opaque"float 3.5"
      input %none : opaque"None"
      return %x
    }"""
    graph = graph_of(text, in_spec="(('*', '*'), {'scale': '*', 'none': '*'})")
    (feed, *_) = guesses(graph, 0)
    (whole, *_) = made_up(graph, 0)
    assert list(whole) == ["scale", "none", "x", "n"]  # a graph takes what its program was captured with, too
    assert whole["scale"] == 3.5
    assert feed["n"] == feed["x"].shape[0] + 1
    call = Call.from_json(Call.of(graph).to_json())
    assert call.fed == ["x", "n"]
    args, kwargs = call.arguments({"x": feed["x"].view(np.dtype("V2")), "n": feed["n"]})
    assert np.array_equal(args[0].float().numpy(), feed["x"].astype(np.float32))
    assert args[1] == int(feed["n"])
    assert kwargs == {"scale": 3.5, "none": None}
    with pytest.raises(InputError, match="inputs n are missing; the program takes x, n"):
        call.arguments({"x": feed["x"]})


def test_bench_in_processes_of_their_own(tmp_path: Path) -> None:
    model = net()
    first, second = written(model, tmp_path / "float.pt2"), written(Lowered(model), tmp_path / "int8.pt2")
    found = bench([first, second], batches=(1, 64), rounds=2, threads=1)
    for file in found.files:
        assert [(t.case.batch, t.case.unit) for t in file.timings] == [(1, "samples")]
        assert file.peak_bytes > file.before_bytes > 0
        assert any("takes 1 to 32 for" in why for why in file.left_out)  # 64 samples are too many
    # by hand: a 6 x 16 weight and 6 biases in f32; codes, scales in f32, ones in bf16 and biases
    assert [f.weight_bytes for f in found.files] == [6 * 16 * 4 + 24, 6 * 16 + 24 + 12 + 24]
    assert found.files[1].timings[0].speedup is not None
    assert "torch" in found.versions


def test_what_cannot_be_timed(tmp_path: Path) -> None:
    (tmp_path / "bad.pt2").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"bad.pt2 is not a .pt2 archive"):
        TorchTimed(tmp_path / "bad.pt2", 1, {}, tmp_path)
    path = written(net(), tmp_path / "a.pt2")
    with pytest.raises(InputError, match="--dim height names no open dimension"):
        TorchTimed(path, 1, {"height": 3}, tmp_path)
