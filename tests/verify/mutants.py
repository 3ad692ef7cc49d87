"""An accepted artifact, and ways to break one site of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tests.verify.build import Array, Net, rng, tensor

VOCAB, WIDTH, INNER = 512, 256, 512
UP, DOWN, HEAD, TABLE = "w1", "w2", "w3", "emb"


def float_model() -> ModelProto:
    """A table and three products; the first one is followed by a Relu. Sites are called after their weights."""
    net = Net()
    net.input("ids", ("B", "S"), TensorProto.INT64)
    r = rng(5)
    const = lambda name, *shape: net.const(name, r.standard_normal(shape).astype(np.float32))  # noqa: E731
    e = net.op("Gather", [const(TABLE, VOCAB, WIDTH), "ids"], "e", name="model.embed")
    h = net.op("MatMul", [e, const(UP, WIDTH, INNER)], "h", name="model.up")
    a = net.op("Relu", [h], "a", name="act")
    d = net.op("MatMul", [a, const(DOWN, INNER, WIDTH)], "d", name="model.down")
    x = net.op("Add", [d, e], "x", name="residual")
    net.op("MatMul", [x, const(HEAD, WIDTH, VOCAB)], "y", name="head")
    net.output("y")
    return net.model()


@dataclass
class Artifact:
    """A model to be broken in place."""

    model: ModelProto

    def node(self, name: str) -> NodeProto:
        return next(n for n in self.model.graph.node if n.name == name)

    def const(self, name: str) -> TensorProto:
        return next(t for t in self.model.graph.initializer if t.name == name)

    def array(self, name: str) -> Array:
        return numpy_helper.to_array(self.const(name))

    def put(self, name: str, values: Array, element: int | None = None) -> str:
        """Replace or add an initializer."""
        for at, t in enumerate(self.model.graph.initializer):
            if t.name == name:
                del self.model.graph.initializer[at]
                break
        self.model.graph.initializer.append(tensor(name, values, element))
        return name

    def attr(self, name: str, key: str, value: int | None) -> None:
        node = self.node(name)
        kept = [a for a in node.attribute if a.name != key]
        del node.attribute[:]
        node.attribute.extend(kept + ([helper.make_attribute(key, value)] if value is not None else []))

    def open_up(self, name: str, *, default: bool) -> None:
        """Make an initializer a graph input, with or without its default."""
        t = self.const(name)
        self.model.graph.input.append(helper.make_tensor_value_info(name, t.data_type, list(t.dims)))
        if not default:
            self.model.graph.initializer.remove(t)

    def replace(self, name: str, *nodes: NodeProto) -> None:
        """Put ``nodes`` in the place of the node called ``name``."""
        graph = self.model.graph
        at = next(i for i, n in enumerate(graph.node) if n.name == name)
        rest = list(graph.node)
        del graph.node[:]
        graph.node.extend([*rest[:at], *nodes, *rest[at + 1 :]])

    def codes(self, name: str) -> tuple[Array, Array, Array]:
        """Codes [N, K], scales and zeros [N, groups] of a 4-bit or 8-bit MatMulNBits."""
        node = self.node(name)
        attrs = {a.name: a.i for a in node.attribute}
        raw = self.array(node.input[1])
        if attrs["bits"] == 4:
            raw = np.stack([raw & 15, raw >> 4], -1)
        codes = raw.reshape(attrs["N"], -1)[:, : attrs["K"]].astype(np.int64)
        scales = self.array(node.input[2]).reshape(attrs["N"], -1)
        z = self.array(node.input[3])
        zeros = np.stack([z & 15, z >> 4], -1).reshape(len(z), -1)[:, : scales.shape[1]] if attrs["bits"] == 4 else z
        return codes, scales, zeros.astype(np.int64)

    def value(self, name: str) -> Array:
        """The float weight [N, K]."""
        codes, scales, zeros = self.codes(name)
        size = codes.shape[1] // scales.shape[1]
        wide = lambda t: np.repeat(t, size, axis=1)  # noqa: E731
        return ((codes - wide(zeros)) * wide(scales)).astype(np.float32)


def dequantize(a: Artifact, site: str, *, transposed: bool) -> str:
    """A DequantizeLinear ``<site>.dq`` of uint4 codes with blocks along K: as [K, N], or as [N, K]."""
    codes, scales, zeros = a.codes(site)
    flip = (lambda t: t) if transposed else (lambda t: t.T.copy())
    ins = [
        a.put(f"{site}.c", flip(codes), TensorProto.UINT4),
        a.put(f"{site}.s", flip(scales)),
        a.put(f"{site}.z", flip(zeros), TensorProto.UINT4),
    ]
    block = codes.shape[1] // scales.shape[1]
    node = helper.make_node(
        "DequantizeLinear", ins, [f"{site}.f"], f"{site}.dq", axis=int(transposed), block_size=block
    )
    a.model.graph.node.insert(0, node)
    return f"{site}.f"


def dequantize_left(a: Artifact) -> None:
    f, node = dequantize(a, UP, transposed=False), a.node(UP)
    a.replace(UP, helper.make_node("MatMul", [node.input[0], f], list(node.output), UP))


def transpose_between(a: Artifact) -> None:
    f, node = dequantize(a, DOWN, transposed=True), a.node(DOWN)
    t = helper.make_node("Transpose", [f], [f"{DOWN}.t"], f"{DOWN}.transpose", perm=[1, 0])
    a.replace(DOWN, t, helper.make_node("MatMul", [node.input[0], f"{DOWN}.t"], list(node.output), DOWN))


def shared_codes(a: Artifact) -> None:
    f, node = dequantize(a, DOWN, transposed=False), a.node(DOWN)
    a.model.graph.node.insert(
        1,
        helper.make_node(
            "DequantizeLinear",
            [f"{DOWN}.c", f"{DOWN}.s", f"{DOWN}.z"],
            ["again.f"],
            "again.dq",
            axis=0,
            block_size=a.codes(HEAD)[0].shape[1] // a.codes(HEAD)[1].shape[1],
        ),
    )
    other = helper.make_node("MatMul", ["a", "again.f"], ["again"], "again.mm")
    a.replace(DOWN, other, helper.make_node("MatMul", [node.input[0], f], list(node.output), DOWN))
    a.model.graph.output.append(helper.make_tensor_value_info("again", TensorProto.FLOAT, None))


def folded_back(a: Artifact) -> None:
    node = a.node(DOWN)
    a.put(f"{DOWN}.float", a.value(DOWN).T.copy())
    a.replace(DOWN, helper.make_node("MatMul", [node.input[0], f"{DOWN}.float"], list(node.output), DOWN))


def spelled_out(a: Artifact) -> None:
    codes, scales, zeros = a.codes(DOWN)
    node, group = a.node(DOWN), codes.shape[1] // scales.shape[1]
    a.put("c", codes.astype(np.uint8))
    a.put("z", np.repeat(zeros, group, 1).astype(np.float32))
    a.put("s", np.repeat(scales, group, 1))
    make = helper.make_node
    a.replace(
        DOWN,
        make("Cast", ["c"], ["cf"], "cast", to=TensorProto.FLOAT),
        make("Sub", ["cf", "z"], ["cz"], "sub"),
        make("Mul", ["cz", "s"], ["cs"], "mul"),
        make("Transpose", ["cs"], ["ct"], "t", perm=[1, 0]),
        make("MatMul", [node.input[0], "ct"], list(node.output), DOWN),
    )


def table_before_lookup(a: Artifact) -> None:
    r = rng(9)
    a.put("t", r.integers(-127, 128, (VOCAB, WIDTH)).astype(np.int8))
    a.put("ts", (0.01 * (1 + r.random(VOCAB))).astype(np.float32))
    dq = helper.make_node("DequantizeLinear", ["t", "ts"], ["tf"], f"{TABLE}.dq", axis=0)
    a.replace(TABLE, dq, helper.make_node("Gather", ["tf", "ids"], ["e"], TABLE))


def island(a: Artifact) -> None:
    a.put("qs", np.array(0.05, np.float32))
    a.put("qz", np.array(0, np.uint8))
    make = helper.make_node
    a.replace(
        "act",
        make("QuantizeLinear", ["h", "qs", "qz"], ["hq"], "act.q"),
        make("DequantizeLinear", ["hq", "qs", "qz"], ["hf"], "act.dq"),
        make("Tanh", ["hf"], ["a"], "act"),
    )


def block_wise_integer(a: Artifact) -> None:
    r = rng(8)
    a.put("wq", r.integers(-127, 128, (INNER, WIDTH)).astype(np.int8))
    a.put("ws", (0.001 * (1 + r.random((INNER // 32, WIDTH)))).astype(np.float32))
    a.put("qs", np.array(0.05, np.float32))
    a.put("qz", np.array(128, np.uint8))
    make, out = helper.make_node, list(a.node(DOWN).output)
    a.replace(
        DOWN,
        make("QuantizeLinear", ["a", "qs", "qz"], ["aq"], "a.q"),
        make("DequantizeLinear", ["aq", "qs", "qz"], ["af"], "a.dq"),
        make("DequantizeLinear", ["wq", "ws"], ["wf"], "w.dq", axis=0, block_size=32),
        make("MatMul", ["af", "wf"], out, DOWN),
    )


def bnb4(a: Artifact) -> None:
    n, k = WIDTH, INNER
    node = a.node(DOWN)
    ins = [node.input[0], a.put("b4", np.zeros(n * k // 2, np.uint8)), a.put("b4s", np.ones(n * k // 64, np.float32))]
    a.replace(
        DOWN,
        helper.make_node(
            "MatMulBnb4", ins, list(node.output), DOWN, domain="com.microsoft", K=k, N=n, block_size=64, quant_type=1
        ),
    )


def float_zeros(a: Artifact) -> None:
    a.put(a.node(DOWN).input[3], a.codes(DOWN)[2].astype(np.float32))


def g_idx(a: Artifact) -> None:
    node = a.node(DOWN)
    block = next(x.i for x in node.attribute if x.name == "block_size")
    node.input.append(a.put("order", (np.arange(INNER) // block).astype(np.int32)))


def scales(change: Callable[[Array], Array]) -> Callable[[Artifact], None]:
    def mutate(a: Artifact) -> None:
        name = a.node(DOWN).input[2]
        a.put(name, change(a.array(name).copy()))

    return mutate


def _first_row(value: float) -> Callable[[Array], Array]:
    def change(s: Array) -> Array:
        s[0] = value
        return s

    return change


def rank_two(a: Artifact) -> None:
    name = a.node(DOWN).input[1]
    a.put(name, a.array(name).reshape(WIDTH, -1))


def three_bits(a: Artifact) -> None:
    name = a.node(DOWN).input[1]
    a.put(name, np.zeros((WIDTH, INNER // 128, 48), np.uint8))
    a.attr(DOWN, "bits", 3)


def block_of(size: int) -> Callable[[Artifact], None]:
    def mutate(a: Artifact) -> None:
        node = a.node(DOWN)
        a.put(node.input[1], np.zeros((WIDTH, INNER // size, size // 2), np.uint8))
        a.put(node.input[2], np.full((WIDTH, INNER // size), 0.01, np.float32))
        a.put(node.input[3], np.zeros((WIDTH, -(-INNER // size // 2)), np.uint8))
        a.attr(DOWN, "block_size", size)

    return mutate


def two_bits_of_16(a: Artifact) -> None:
    node = a.node(DOWN)
    a.put(node.input[1], np.full((WIDTH, INNER // 16, 4), 7, np.uint8))
    a.put(node.input[2], (0.01 * (1 + rng(3).random((WIDTH, INNER // 16)))).astype(np.float32))
    a.put(node.input[3], np.zeros((WIDTH, INNER // 64), np.uint8))
    a.attr(DOWN, "bits", 2)
    a.attr(DOWN, "block_size", 16)


def short_codes(a: Artifact) -> None:
    name = a.node(DOWN).input[1]
    a.put(name, a.array(name)[:, :-1].copy())


def nan_bias(a: Artifact) -> None:
    a.put("bias", np.full(WIDTH, np.nan, np.float32))
    node = a.node(DOWN)
    node.input.extend(["", "bias"] if len(node.input) == 4 else ["bias"])


def unknown_op(a: Artifact) -> None:
    a.replace("act", helper.make_node("Squash", ["h"], ["a"], "act", domain="nobody"))
    a.model.opset_import.append(helper.make_opsetid("nobody", 1))


def another_weight(a: Artifact) -> None:
    """Float numbers on no grid: only the report can tell that they were promised in few bits."""
    node = a.node(DOWN)
    a.put("other", rng(6).standard_normal((INNER, WIDTH)).astype(np.float32))
    a.replace(DOWN, helper.make_node("MatMul", [node.input[0], "other"], list(node.output), DOWN))


def renamed(a: Artifact) -> None:
    a.node(DOWN).name = "somebody else"


def opened(index: int, *, default: bool) -> Callable[[Artifact], None]:
    return lambda a: a.open_up(a.node(DOWN).input[index], default=default)


@dataclass(frozen=True)
class Mutant:
    """A way to break an artifact: ``code`` and ``op`` are what the verdict must say. ``bits`` names the artifact."""

    name: str
    change: Callable[[Artifact], None]
    code: str
    op: str = DOWN
    bits: int = 4
    report: bool = False
    severity: str = "error"


MUTANTS = (
    Mutant("a dequantize is left in", dequantize_left, "QC101", f"{UP}.dq"),
    Mutant("a transpose is put between", transpose_between, "QC102", f"{DOWN}.dq"),
    Mutant("two dequantizes share the codes", shared_codes, "QC101", f"{DOWN}.dq"),
    Mutant("the weight is folded back to float", folded_back, "QC103"),
    Mutant("the dequantize is spelled out", spelled_out, "QC103", "cast"),
    Mutant("another float weight takes its place", another_weight, "QC103", report=True),
    Mutant("the site is renamed", renamed, "QC106", report=True),
    Mutant("8 bits without accuracy level", lambda a: a.attr(DOWN, "accuracy_level", None), "QC104", bits=8),
    Mutant("8 bits at accuracy level 0", lambda a: a.attr(DOWN, "accuracy_level", 0), "QC104", bits=8),
    Mutant("float zero points", float_zeros, "QC104"),
    Mutant("float zero points of 8 bits", float_zeros, "QC204", bits=8),
    Mutant("a g_idx is added", g_idx, "QC104"),
    Mutant("a g_idx of 8 bits is added", g_idx, "QC205", bits=8),
    Mutant("the codes are an input", opened(1, default=False), "QC104"),
    Mutant("the codes can be overridden", opened(1, default=True), "QC104"),
    Mutant("MatMulBnb4 is substituted", bnb4, "QC104"),
    Mutant("2 bits in blocks of 16", two_bits_of_16, "QC104"),
    Mutant("the scales are an input", opened(2, default=False), "QC303"),
    Mutant("the scales can be overridden", opened(2, default=True), "QC303"),
    Mutant("the zero points are an input", opened(3, default=False), "QC303"),
    Mutant("an integer product with scales in blocks", block_wise_integer, "QC303"),
    Mutant("blocks of 8", block_of(8), "QC202"),
    Mutant("blocks of 512", block_of(512), "QC202"),
    Mutant("3 bits", three_bits, "QC201"),
    Mutant("codes of rank 2", rank_two, "QC205"),
    Mutant("a block of codes is missing", short_codes, "QC205"),
    Mutant("weight_prepacked is 1", lambda a: a.attr(DOWN, "weight_prepacked", 1), "QC205"),
    Mutant("the scales are zeroed", scales(lambda s: s * 0), "QC302"),
    Mutant("one row of scales is zeroed", scales(_first_row(0.0)), "QC302"),
    Mutant("a scale is NaN", scales(_first_row(float("nan"))), "QC302"),
    Mutant("a scale is infinite", scales(_first_row(float("inf"))), "QC302"),
    Mutant("a bias is NaN", nan_bias, "QC301"),
    Mutant("the table is dequantized before the lookup", table_before_lookup, "QC102", f"{TABLE}.dq"),
    Mutant("an island around the activation", island, "QC105", "act.dq"),
    Mutant("an unknown op", unknown_op, "QC902", "act"),
    Mutant("all scales alike", scales(lambda s: np.full_like(s, 0.01)), "QC304", severity="warning"),
)


def broken(model: ModelProto, mutant: Mutant) -> ModelProto:
    out = onnx.ModelProto()
    out.CopyFrom(model)
    mutant.change(Artifact(out))
    return out
