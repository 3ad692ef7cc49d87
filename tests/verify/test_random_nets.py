"""Random networks, quantized by the runtime's own tool with random options: verdicts against what the runtime does."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto
from onnxruntime import quantization as ortq

from qcompiler.backends.onnx.evidence import verify_file
from qcompiler.backends.onnx.kernels import target
from qcompiler.backends.onnx.worker import Worker
from tests.verify.build import Array, Case, Net, rng, rows
from tests.verify.measure import measure

COUNT = 30
WIDTH = 64
Shape = tuple[int | str, ...]


class Samples(ortq.CalibrationDataReader):  # type: ignore[misc]  # the base class has no types
    def __init__(self, shape: Shape) -> None:
        self.left: Iterator[dict[str, Array]] = iter([{"x": rows(shape, m)} for m in (4, 8)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.left, None)


class Grower:
    """A random network, one layer after another."""

    def __init__(self, choose: random.Random, seed: int) -> None:
        self.choose, self.r, self.net = choose, rng(seed), Net(choose.choice([13, 17, 21]))

    def often(self, share: float) -> bool:
        return self.choose.random() < share

    def const(self, name: str, *shape: int) -> str:
        return self.net.const(name, (self.r.standard_normal(shape) * 0.3).astype(np.float32))

    def activation(self, x: str, i: int, kinds: Sequence[str]) -> str:
        kind = self.choose.choice(kinds)
        if not kind:
            return x
        ins = [x]
        if kind == "Clip":
            ins += [self.net.const(f"low{i}", np.float32(0)), self.net.const(f"high{i}", np.float32(6))]
        attrs: dict[str, Any] = {"kernel_shape": [2, 2]} if kind == "MaxPool" else {}
        return self.net.op(kind, ins, f"r{i}", name=f"act{i}", **attrs)

    def perceptron(self, rank: int) -> tuple[str, Shape]:
        shape: Shape = ("M", WIDTH) if rank == 2 else ("M", 3, WIDTH)
        x = self.net.input("x", shape)
        for i in range(self.choose.choice([1, 2, 3])):
            w = self.const(f"w{i}", WIDTH, WIDTH)
            bias = [self.const(f"b{i}", WIDTH)] if self.often(0.6) else []
            if rank == 2 and self.often(0.5):
                x = self.net.op("Gemm", [x, w, *bias], f"h{i}", name=f"mm{i}", transB=self.choose.choice([0, 1]))
            else:
                x = self.net.op("MatMul", [x, w], f"h{i}", name=f"mm{i}")
                x = self.net.op("Add", [x, *bias], f"a{i}", name=f"add{i}") if bias else x
            x = self.activation(x, i, ("", "Relu", "Sigmoid", "Tanh", "LeakyRelu", "Softmax", "Clip"))
            x = self.net.op("Mul", [x, x], f"m{i}", name=f"mul{i}") if self.often(0.2) else x
        return x, shape

    def convolution(self) -> tuple[str, Shape]:
        shape: Shape = ("M", 8, 6, 6)
        x = self.net.input("x", shape)
        for i in range(self.choose.choice([1, 2])):
            deep = self.often(0.3)
            ins = [x, self.const(f"w{i}", 8, 1 if deep else 8, 3, 3)]
            ins += [self.const(f"b{i}", 8)] if self.often(0.7) else []
            x = self.net.op("Conv", ins, f"h{i}", name=f"conv{i}", pads=[1] * 4, group=8 if deep else 1)
            x = self.activation(x, i, ("", "Relu", "Sigmoid", "Clip", "MaxPool"))
        return self.net.op("GlobalAveragePool", [x], "pool", name="pool"), shape

    def attention(self) -> tuple[str, Shape]:
        shape: Shape = ("M", 4, WIDTH)
        x, net = self.net.input("x", shape), self.net
        q, k, v = (net.op("MatMul", [x, self.const(f"w{n}", WIDTH, WIDTH)], n, name=f"mm_{n}") for n in "qkv")
        s = net.op("MatMul", [q, net.op("Transpose", [k], "kt", name="turn", perm=[0, 2, 1])], "s", name="mm_s")
        return net.op("MatMul", [net.op("Softmax", [s], "p", name="soft", axis=-1), v], "o", name="mm_o"), shape

    def grow(self) -> tuple[ModelProto, Shape]:
        build = self.choose.choice(
            [lambda: self.perceptron(2), lambda: self.perceptron(3), self.convolution, self.attention]
        )
        x, shape = build()
        self.net.op("Identity", [x], "y", name="end")
        self.net.output("y")
        return self.net.model(), shape


def options(choose: random.Random) -> dict[str, Any]:
    """Options of quantize_static, at random."""
    kinds = ortq.QuantType
    out: dict[str, Any] = {
        "per_channel": choose.random() < 0.5,
        "reduce_range": choose.random() < 0.2,
        "weight_type": choose.choice([kinds.QInt8, kinds.QInt8, kinds.QUInt8]),
        "activation_type": choose.choice([kinds.QUInt8, kinds.QUInt8, kinds.QInt8, kinds.QUInt16]),
        "extra_options": {
            "ActivationSymmetric": choose.random() < 0.3,
            "WeightSymmetric": choose.random() < 0.7,
            "UseQDQContribOps": choose.random() < 0.2,
        },
    }
    if choose.random() < 0.3:
        out["op_types_to_quantize"] = choose.choice([["MatMul"], ["MatMul", "Gemm", "Conv"], ["Conv", "Relu"]])
    if choose.random() < 0.2:
        out["quant_format"] = ortq.QuantFormat.QOperator
    return out


def quantized(folder: Path, seed: int) -> list[Case]:
    """Networks that the tool can quantize as asked; it refuses some combinations."""
    choose, cases, tries = random.Random(seed), [], 0
    while len(cases) < COUNT:
        tries += 1
        assert tries < 20 * COUNT, "the tool refuses nearly everything: the test would judge nothing"
        grower = Grower(choose, len(cases))
        model, shape = grower.grow()
        onnx.save(model, folder / "float.onnx")
        how = options(choose)
        try:
            ortq.quantize_static(folder / "float.onnx", folder / "out.onnx", Samples(shape), **how)
        except (ValueError, RuntimeError, TypeError, AssertionError, NotImplementedError):
            continue  # the tool says in all these ways that it cannot quantize so
        feeds = [{"x": rows(shape, m)} for m in (1, 5)]
        name = f"{[n.op_type for n in model.graph.node]} {how}"
        cases.append(Case(name, onnx.load(folder / "out.onnx"), feeds))
    return cases


@pytest.mark.parametrize("seed", [1, 2])
def test_random_nets(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "disabled", True)
    cases = quantized(tmp_path, seed)
    measured = measure(cases)
    assert 5 < sum(bool(s.bad) for s in measured) < COUNT - 5
    faults = []
    with Worker() as worker:
        for case, seen in zip(cases, measured, strict=True):
            path = tmp_path / "case.onnx"
            onnx.save(case.model, path)
            for run in (True, False):
                _, findings, _ = verify_file(path, target("ort-cpu"), run=run, worker=worker)
                errors = [str(f) for f in findings if f.severity == "error"]
                if bool(errors) != bool(seen.bad):
                    faults.append(f"{case.name}, run={run}: the runtime shows {seen.bad or 'no fault'}, found {errors}")
    print(f"{2 * COUNT - len(faults)} of {2 * COUNT} verdicts agree with the runtime")
    assert not faults, "\n".join(faults)
