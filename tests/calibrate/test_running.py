"""ONNX graphs run as ONNX Runtime runs the model, bit for bit, with and without taps; q ops by their reference."""

import random
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler import numerics
from qcompiler.backends import backend_of
from qcompiler.backends.onnx import running as module
from qcompiler.backends.onnx.feeds import made_up as made_up_feeds
from qcompiler.backends.onnx.load import load_onnx
from qcompiler.backends.onnx.running import Program, runnable
from qcompiler.dtypes import F16
from qcompiler.errors import InputError
from qcompiler.ir import Graph
from qcompiler.reader import parse
from qcompiler.scheme import parse_scheme
from tests.support import require_data

Arrays = dict[str, np.ndarray]


def plain(model: str | bytes, feed: Arrays, outputs: list[str] | None = None) -> Arrays:
    """The model as it stands in ONNX Runtime, with nothing optimized."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = outputs or [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def with_all_outputs(path: Path, names: list[str]) -> bytes:
    model = onnx.load(path)
    have = {o.name for o in model.graph.output}
    model.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names if n not in have)
    return model.SerializeToString()


def made_up(graph: Graph, batch: int = 1) -> Arrays:
    rng = np.random.default_rng(0)
    out = {}
    for v in graph.inputs:
        if v.payload is None:
            assert v.tensor.dtype is not None
            shape = [d if isinstance(d, int) else batch for d in v.tensor.shape or ()]
            out[v.name] = rng.standard_normal(shape).astype(v.tensor.dtype.storage)
    return out


def equal(a: Arrays, b: Arrays) -> None:
    for name, value in b.items():
        np.testing.assert_array_equal(a[name], value, err_msg=name)


@pytest.mark.parametrize("name", ["onnx/super_resolution_op15.onnx", "mnist/mnist-8.onnx", "onnx/yunet_n_320_320.onnx"])
def test_real_models_run_bit_for_bit(name: str) -> None:
    path = require_data(name)
    graph = load_onnx(path)
    feed = made_up(graph)
    wanted = plain(str(path), feed)
    with runnable(graph, []) as run:
        found = run(feed)
        assert found.keys() == wanted.keys()
        equal(found, wanted)
    taps = [r.name for op in graph for r in op.results]
    with runnable(graph, taps) as run:
        found = run(feed)
        equal(found, wanted)
        equal(run(feed), wanted)
    every = plain(with_all_outputs(path, taps), feed, taps)
    assert len(taps) > 7
    equal(found, every)


def _same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    return repr(a) == repr(b)


def test_models_of_all_kinds_run_bit_for_bit() -> None:
    """Sixty small models of the runtime's own tests that run on made-up inputs, the same every time, without f16."""
    root = require_data("ort_corpus")
    files = sorted(p for p in root.rglob("*.onnx") if p.stat().st_size < 1 << 16)
    random.Random(5).shuffle(files)
    ran = 0
    for path in files:
        try:
            graph = load_onnx(path)
        except InputError:
            continue
        results = [r for op in graph.walk() for r in op.results]
        if any(v.tensor.dtype is F16 for v in (*graph.inputs, *results)):
            continue
        feed = next(made_up_feeds(graph, 3), None)
        try:
            wanted, again = (plain(str(path), feed or {}) for _ in range(2))
        except Exception:  # not a model for this runtime or these inputs, which it says in many ways
            continue
        if not wanted or not all(_same(a, again[n]) for n, a in wanted.items()):
            continue
        own = {r for op in graph for r in op.results}
        taps = [r.name for r in results if r in own and r.tensor.dtype is not None and not r.meta.get("absent")]
        for tapped in ([], taps):
            with runnable(graph, tapped) as run:
                found = run(feed or {})
            wrong = [n for n, a in wanted.items() if not _same(a, found[n])]
            assert not wrong, (path.relative_to(root), wrong)
        ran += 1
        if ran == 60:
            return
    pytest.fail(f"only {ran} models ran")


# -- a model with everything that is special -----------------------------------------------------------------------


def branching() -> onnx.ModelProto:
    """Both branches read ``h``, which nothing outside them reads; ``y`` is an output and is read again."""

    def branch(name: str, op: str) -> onnx.GraphProto:
        const = numpy_helper.from_array(np.float32([3.0]), f"{name}_c")
        nodes = [helper.make_node(op, ["h", f"{name}_c"], [f"{name}_out"])]
        return helper.make_graph(
            nodes, name, [], [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)], [const]
        )

    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node("Neg", ["x"], ["y"]),
        helper.make_node("Less", ["t", "limit"], ["small"]),
        helper.make_node(
            "If", ["small"], ["z"], then_branch=branch("yes", "Mul"), else_branch=branch("no", "Add"), name="if"
        ),
        helper.make_node("Sum", ["y", "z", "w"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])]
        + [helper.make_tensor_value_info(n, TensorProto.FLOAT, []) for n in ("t", "limit")]
        + [helper.make_tensor_value_info("w", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 4]) for n in ("y", "out")],
        [numpy_helper.from_array(np.float32(0.5), "limit"), numpy_helper.from_array(np.float32([1, 2, 3, 4]), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


X = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_regions_outputs_inputs_and_defaults(t: float) -> None:
    model = branching()
    graph = load_onnx(model)
    feed = {"x": X, "t": np.array(t, np.float32)}
    wanted = plain(model.SerializeToString(), feed)
    with runnable(graph, ["h", "y", "x", "z", "limit", "w"]) as run:
        found = run(feed)
        equal(found, wanted)
        np.testing.assert_array_equal(found["h"], np.maximum(X, 0))  # read by regions alone
        np.testing.assert_array_equal(found["z"], found["h"] * 3 if t < 0.5 else found["h"] + 3)
        np.testing.assert_array_equal(found["x"], X)
        np.testing.assert_array_equal(found["w"], np.float32([1, 2, 3, 4]))
        other = run(
            feed | {"limit": np.array(1 - t, np.float32), "w": np.zeros(4, np.float32)}
        )  # defaults can be overridden
        equal(
            other,
            plain(
                model.SerializeToString(), feed | {"limit": np.array(1 - t, np.float32), "w": np.zeros(4, np.float32)}
            ),
        )
        assert not np.array_equal(other["out"], found["out"])


def test_a_graph_that_computes_nothing() -> None:
    graph = parse(
        "graph @g dialect=onnx {\n  input %x : f32[2]\n  const %c : f32[1] = dense(4.0)\n  return %x, %c\n}\n"
    )
    with runnable(graph, []) as run:
        equal(run({"x": X[0, :2]}), {"x": X[0, :2], "c": np.float32([4])})


# -- q ops ---------------------------------------------------------------------------------------------------------

U8, W8 = parse_scheme("uint8 tensor asym"), parse_scheme("int8 channel sym").with_axis(0)
PAIRS = """graph @g dialect=onnx {
  input %x : f32[n, 4]
  const %w : f32[5, 4] = rand:3
  const %ws : f32[5] = dense(0.02, 0.02, 0.03, 0.02, 0.01)
  const %s : f32[] = dense(0.02)
  const %z : uint8[] = dense(128)
  %h : f32[n, 4] = onnx.Tanh(%x)
  %hq : uint8[n, 4] = q.quantize(%h, %s, %z) {scheme = <uint8 tensor asym>}
  %hd : f32[n, 4] = q.dequantize(%hq, %s, %z) {scheme = <uint8 tensor asym>}
  %wq : int8[5, 4] = q.quantize(%w, %ws) {scheme = <int8 channel sym axis=0>}
  %wd : f32[5, 4] = q.dequantize(%wq, %ws) {scheme = <int8 channel sym axis=0>}
  %wt : f32[4, 5] = onnx.Transpose(%wd) {perm = [1, 0]}
  %m : f32[n, 5] = onnx.MatMul(%hd, %wt)
  %t : uint8[4, n] = onnx.Transpose(%hq) {perm = [1, 0]}
  %td : f32[4, n] = q.dequantize(%t, %s, %z) {scheme = <uint8 tensor asym>}
  %y : f32[n, n] = onnx.MatMul(%hd, %td)
  return %m, %y
}
"""


def pairs_by_hand(graph: Graph) -> Arrays:
    """Every value of :data:`PAIRS`, by NumPy and the reference."""
    payloads = {n: v.payload.array() for n, v in graph.consts.items() if v.payload is not None}
    w, ws, s, z = (payloads[n] for n in ("w", "ws", "s", "z"))
    h = plain(_one("Tanh", X), {"x": X})["y"]
    hq = numerics.quantize(h, s, z, U8)
    hd = numerics.evaluate("q.dequantize", [hq, s, z], {"scheme": U8})
    wd = numerics.evaluate("q.dequantize", [numerics.quantize(w, ws, None, W8), ws], {"scheme": W8})
    return {"h": h, "hq": hq, "hd": hd, "wd": wd, "wt": wd.T, "t": hq.T, "td": hd.T, "m": hd @ wd.T, "y": hd @ hd.T}


def _one(op: str, x: np.ndarray) -> bytes:
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "g", info[:1], info[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def test_pairs_run_by_the_reference() -> None:
    graph = parse(PAIRS)
    wanted = pairs_by_hand(graph)
    for taps in ([], list(wanted)):
        with runnable(graph, taps) as run:
            found = run({"x": X})
        for name in taps or ("m", "y"):
            if name in ("m", "y"):  # float products: the runtime adds in another order
                np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)
            else:
                np.testing.assert_array_equal(found[name], wanted[name])
    assert graph.local("wq") is not None  # the graph itself is as it was


def test_parts_are_as_few_as_they_can_be() -> None:
    """Constants are folded, so what is before and behind the pair on the activation are two parts of host ops."""
    with runnable(parse(PAIRS), ["wd"]) as run:
        assert isinstance(run, Program)
        kinds = ["host" if isinstance(s, module.Step) else s.name for s in run.steps]
    assert kinds == ["host", "q.quantize", "q.dequantize", "host", "q.dequantize", "host"]


def test_what_is_read_no_more_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = parse(PAIRS)
    known: list[set[str]] = []
    real = module.Step.run

    def spied(self, values):  # type: ignore[no-untyped-def]
        known.append({v.name for v in values})
        return real(self, values)

    monkeypatch.setattr(module.Step, "run", spied)
    with runnable(graph, []) as run:
        run({"x": X})
    assert known == [{"x"}, {"hq", "hd"}, {"hd", "td", "m"}]


LINEAR = """graph @g dialect=onnx {
  input %x : f32[n, 32]
  const %w : int4[8, 32] = rand:5
  const %s : f32[8, 1] = rand:6
  %y : f32[n, 8] = q.linear(%x, %w, %s) {scheme = <int4 g32 sym axis=1>, site = "y"}
  %z : f32[n, 8] = onnx.Relu(%y)
  return %z
}
"""


def test_weight_only_ops_and_codes_of_four_bits() -> None:
    graph = parse(LINEAR)
    x = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    op = next(iter(graph))
    operands = [x, *(v.payload.array() for v in op.operands[1:] if v is not None and v.payload is not None)]
    wanted = numerics.evaluate(op.name, operands, op.attrs)
    with runnable(graph, ["y", "w"]) as run:
        found = run({"x": x})
    np.testing.assert_array_equal(found["y"], wanted)
    np.testing.assert_array_equal(found["z"], np.maximum(wanted, 0))
    assert found["w"].dtype == np.int8


IN_REGION = """graph @g dialect=onnx meta {{opset_import = [["", 17]]}} {{
  input %x : f32[2]
  input %c : bool[]
  const %s : f32[] = dense(0.5)
  %y : f32[2] = onnx.If(%c) regions {{
    then_branch = graph @a dialect=onnx {{
      const %w : f32[2] = dense(0.7, 1.2)
      %q : int8[2] = q.quantize({of}, %s) {{scheme = <int8 tensor sym>}}
      %d : f32[2] = q.dequantize(%q, %s) {{scheme = <int8 tensor sym>}}
      %r : f32[2] = onnx.Mul(%d, %x)
      return %r
    }}
    else_branch = graph @b dialect=onnx {{
      %n : f32[2] = onnx.Neg(%x)
      return %n
    }}
  }}
  return %y
}}
"""


def test_quantized_constants_inside_regions() -> None:
    with runnable(parse(IN_REGION.format(of="%w")), []) as run:
        found = run({"x": np.float32([1, 2]), "c": np.array(True)})
        np.testing.assert_array_equal(found["y"], np.float32([0.5, 2.0]))
        np.testing.assert_array_equal(run({"x": np.float32([1, 2]), "c": np.array(False)})["y"], np.float32([-1, -2]))
    with (
        pytest.raises(InputError, match=r"q.quantize 'q' stands inside a region"),
        runnable(parse(IN_REGION.format(of="%x")), []),
    ):
        pass


def test_big_weights_lie_beside_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAPPED_OVER", 16)
    graph = parse(PAIRS.replace("f32[5, 4] = rand:3", "f32[5, 4] = rand:4"))
    wanted = pairs_by_hand(graph)
    with runnable(graph, ["hd", "wt"]) as run:
        found = run({"x": X})
    np.testing.assert_array_equal(found["wt"], wanted["wt"])
    np.testing.assert_array_equal(found["hd"], wanted["hd"])


def anonymous_bytes() -> int:
    """Memory of this process that is no mapped file."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s*(\d+) kB", status)[1]) << 10  # type: ignore[index]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel tells it under /proc alone")
def test_weights_are_mapped_and_not_copied() -> None:
    """128 MiB of weights in a session that ran: less than a quarter of that in memory of our own."""
    consts = "".join(f"  const %w{i} : f32[1024, 1024] = rand:{i}\n" for i in range(32))
    ops = "".join(f"  %h{i + 1} : f32[n, 1024] = onnx.MatMul(%h{i}, %w{i})\n" for i in range(32))
    graph = parse(f"graph @g dialect=onnx {{\n  input %h0 : f32[n, 1024]\n{consts}{ops}  return %h32\n}}\n")
    before = anonymous_bytes()
    with runnable(graph, ["h1"]) as run:
        found = run({"h0": np.zeros((2, 1024), np.float32)})
        assert found["h32"].shape == (2, 1024)
        assert anonymous_bytes() - before < 32 << 20


# -- faults ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    graph = parse(PAIRS)
    with pytest.raises(InputError, match="no value %nothing to tap"), runnable(graph, ["nothing"]):
        pass
    with runnable(graph, []) as run:
        with pytest.raises(InputError, match="inputs x are missing; it takes x"):
            run({})
        with pytest.raises(InputError, match="there is no input v"):
            run({"x": X, "v": X})
        with pytest.raises(InputError, match="ONNX Runtime cannot run the model"):
            run({"x": X[:, :2]})
    broken = parse(PAIRS.replace("onnx.Tanh", "onnx.NoSuchOp"))
    with runnable(broken, []) as run, pytest.raises(InputError, match=r"cannot open the model to run it.*NoSuchOp"):
        run({"x": X})
    assert not list(tmp_path.iterdir())  # temporary files went with the contexts


def test_the_backend_offers_it() -> None:
    with backend_of("ort-cpu").runner(parse(PAIRS), ["h"]) as run:
        assert run({"x": X}).keys() == {"h", "m", "y"}
