"""Evidence from the runtime: what is measured, how it survives a runtime that crashes, and how much memory it takes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qcompiler.backends.onnx.evidence import OrtEvidence, verify_file
from qcompiler.backends.onnx.kernels import target
from qcompiler.backends.onnx.opening import MAPPED_OVER
from qcompiler.backends.onnx.worker import Worker
from qcompiler.target import DECODE, PREFILL, Phase
from tests.verify import corpus_nbits, corpus_ops
from tests.verify.build import Case, Net
from tests.verify.corpus_nbits import nbits
from tests.verify.corpus_qdq import INT4, weight_only
from tests.verify.corpus_types import plain
from tests.verify.corpus_w8a8 import static
from tests.verify.measure import measure

CPU = target("ort-cpu")


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as found:
        yield found


def saved(case: Case, folder: Path) -> Path:
    onnx.save(case.model, folder / "case.onnx")
    return folder / "case.onnx"


def errors(path: Path, **more: object) -> list[str]:
    _, findings, _ = verify_file(path, CPU, **more)  # type: ignore[arg-type]  # options by name
    return [f.code for f in findings if f.severity == "error"]


# -- what is measured ----------------------------------------------------------------------------------------


def test_a_fused_node_shows_its_measurements(worker: Worker, tmp_path: Path) -> None:
    result = OrtEvidence(CPU, [DECODE, PREFILL], worker=worker).collect(saved(nbits("a", bits=8), tmp_path))
    assert result.kind == "measured"
    assert not result.findings
    assert [(n.node, n.op_type, n.verdict, n.phase) for n in result.nodes] == [
        ("site", "MatMulNBits", "fused", "decode"),
        ("site", "MatMulNBits", "fused", "prefill"),
    ]
    for node, m in zip(result.nodes, (1, 17), strict=True):
        assert node.kernel == "ort-cpu/MatMulNBits.int8"
        assert node.facts["m"] == m
        assert node.facts["expanded_bytes"] == 4 * 128 * 256
        assert node.facts["temp_bytes"] < m * 256 * 2 + 1024
        assert node.facts["fallback_lines"] == 0
        assert node.facts["weight_packed"]
        assert 0 < node.facts["share_of_bound"] < 1


def test_an_expanded_weight_shows_in_memory_and_log(worker: Worker, tmp_path: Path) -> None:
    result = OrtEvidence(CPU, [DECODE], worker=worker).collect(saved(nbits("a", bits=8, acc=0), tmp_path))
    (node,) = result.nodes
    assert node.verdict == "dequant"
    assert node.facts["temp_bytes"] == node.facts["expanded_bytes"] == 4 * 128 * 256
    assert node.facts["fallback_lines"] == 1
    assert not node.facts["weight_packed"]
    assert [f.code for f in result.findings] == ["QC104"]


def test_wrong_numbers_are_far_outside_the_bound(worker: Worker, tmp_path: Path) -> None:
    result = OrtEvidence(CPU, [DECODE], worker=worker).collect(saved(nbits("a", scales="input"), tmp_path))
    (node,) = result.nodes
    assert node.verdict == "wrong"
    assert node.facts["share_of_bound"] > 10


def test_the_node_that_the_runtime_makes_is_seen(worker: Worker, tmp_path: Path) -> None:
    path = saved(static("a", out_q=True), tmp_path)
    sites, findings, evidence = verify_file(path, CPU, worker=worker)
    assert not findings
    (site,) = sites
    assert (site.name, site.op, site.n, site.k, site.scheme) == ("mm", "linear", 128, 256, "int8 channel sym")
    assert site.kernel == {"decode": "ort-cpu/QLinearMatMul.u8s8", "prefill": "ort-cpu/QLinearMatMul.u8s8"}
    assert site.bytes == {"codes": 32768, "scales": 512, "zeros": 1}
    assert {n.op_type for n in evidence.nodes} == {"QLinearMatMul"}


def test_a_float_model_has_no_sites(worker: Worker, tmp_path: Path) -> None:
    sites, findings, evidence = verify_file(saved(plain("a"), tmp_path), CPU, worker=worker)
    assert not sites
    assert not findings
    assert any("nothing quantized" in n for n in evidence.notes)


def test_inputs_that_cannot_be_made_up(worker: Worker, tmp_path: Path) -> None:
    """The nodes are run alone all the same."""
    case = nbits("a")
    graph = case.model.graph
    graph.input.append(helper.make_tensor_sequence_value_info("rest", TensorProto.FLOAT, None))
    sites, findings, evidence = verify_file(saved(case, tmp_path), CPU, worker=worker)
    assert not findings
    assert [s.evidence for s in sites] == ["measured"]
    assert any("run alone" in n for n in evidence.notes)


# -- chips and targets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chip", "case", "code"),
    [
        ("sse", lambda: nbits("a"), "QC206"),
        ("avx2", lambda: nbits("a"), None),
        ("avx2", lambda: static("a"), "QC303"),
        ("avx2vnni", lambda: static("a"), None),
        ("sse", lambda: static("a"), None),
    ],
    ids=["nbits-sse", "nbits-avx2", "int8-avx2", "int8-vnni", "int8-sse"],
)
@pytest.mark.parametrize("run", [True, False], ids=["run", "static"])
def test_another_chip_is_judged_by_its_rows(
    chip: str, case: Callable[[], Case], code: str | None, run: bool, worker: Worker, tmp_path: Path
) -> None:
    path = saved(case(), tmp_path)
    _, findings, evidence = verify_file(path, target(f"ort-cpu:{chip}"), run=run, worker=worker)
    assert {f.code for f in findings} == ({code} if code else set())
    if target(f"ort-cpu:{chip}").features != CPU.features:
        assert evidence.kind == "static"


@pytest.mark.parametrize(
    ("phases", "code"), [([DECODE], None), ([DECODE, PREFILL], "QC104"), ([Phase("batch", 16)], None)]
)
def test_cuda_is_judged_without_a_device(phases: list[Phase], code: str | None, worker: Worker, tmp_path: Path) -> None:
    path = saved(nbits("a", bs=128), tmp_path)
    sites, findings, evidence = verify_file(path, target("ort-cuda"), phases, worker=worker)
    assert evidence.kind == "static"
    assert {f.code for f in findings} == ({code} if code else set())
    assert [s.status for s in sites] == ["unfused" if code else "fused"]


def test_cuda_has_no_integer_kernels(worker: Worker, tmp_path: Path) -> None:
    """What the CPU provider fuses to QLinearMatMul stays three float nodes and a product there."""
    cuda, path = target("ort-cuda"), saved(static("a", out_q=True), tmp_path)
    _, findings, _ = verify_file(path, cuda, [DECODE], worker=worker)
    assert ("QC101", "w_dq") in {(f.code, f.op) for f in findings}
    _, findings, _ = verify_file(saved(weight_only("b", INT4, "block"), tmp_path), cuda, [DECODE], worker=worker)
    assert not findings


# -- a runtime that misbehaves -------------------------------------------------------------------------------


class Broken(Worker):
    """A worker whose process runs other Python code than the probe."""

    def __init__(self, code: str, timeout: float = 60.0) -> None:
        super().__init__(timeout)
        self.code = code

    def _started(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen([sys.executable, "-c", self.code], **pipes)  # type: ignore[call-overload]
        return self.process  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("code", "timeout", "words"),
    [
        ("import os; input(); os.kill(os.getpid(), 11)", 60.0, "signal SIGSEGV"),
        ("import sys; sys.exit(7)", 60.0, "status 7"),
        ("import time; time.sleep(60)", 0.5, "no answer in"),
    ],
    ids=["crash", "exit", "hang"],
)
def test_a_runtime_that_dies_is_a_finding(code: str, timeout: float, words: str, tmp_path: Path) -> None:
    with Broken(code, timeout) as worker:
        _, findings, _ = verify_file(saved(nbits("a"), tmp_path), CPU, worker=worker)
    (found,) = findings
    assert found.code == "QC902"
    assert "crashes" in found.message
    assert words in found.reason


def test_the_worker_starts_again_after_a_crash(worker: Worker, tmp_path: Path) -> None:
    path = saved(nbits("a"), tmp_path)
    assert errors(path, worker=worker) == []
    assert worker.process is not None
    worker.process.kill()
    worker.process.wait()
    assert errors(path, worker=worker) == ["QC902"]
    assert errors(path, worker=worker) == []


def test_a_file_that_does_not_load_names_the_node(worker: Worker, tmp_path: Path) -> None:
    case = nbits("a")
    case.model.graph.node[0].op_type = "MatMulNobody"
    _, findings, _ = verify_file(saved(case, tmp_path), CPU, worker=worker)
    assert [(f.code, f.op) for f in findings] == [("QC902", "site")]


# -- big artifacts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corpus", [corpus_nbits, corpus_ops], ids=["nbits", "ops"])
def test_what_is_opened_without_its_weights_is_judged_alike(corpus: object, worker: Worker, tmp_path: Path) -> None:
    cases = list(corpus.cases())  # type: ignore[attr-defined]
    differ = []
    for case, seen in zip(cases, measure(cases), strict=True):
        path = saved(case, tmp_path)
        result = OrtEvidence(CPU, max_bytes=0, worker=worker).collect(path)
        if any(f.severity == "error" for f in result.findings) != bool(seen.bad):
            differ.append(f"{case.name}: {seen.bad} against {[str(f) for f in result.findings]}")
    print(f"{len(cases) - len(differ)} of {len(cases)} judged alike without their weights")
    assert not differ, "\n".join(differ)


def big_artifact(folder: Path, layers: int, n: int, k: int) -> Path:
    """MatMulNBits one after another, their codes all zero in one sparse file, their scales not."""
    nodes, consts, offset = [], [], 0
    scales = np.linspace(0.01, 0.02, n * k // 128, dtype=np.float32).reshape(n, k // 128)
    with open(folder / "big.data", "wb") as f:
        for i in range(layers):
            for name, element, shape, data in (
                (f"b{i}", TensorProto.UINT8, (n, k // 128, 64), None),
                (f"s{i}", TensorProto.FLOAT, scales.shape, scales.tobytes()),
            ):
                size = int(np.prod(shape)) * (1 if data is None else 4)
                t = TensorProto(name=name, data_type=element, dims=shape, data_location=TensorProto.EXTERNAL)
                for key, value in (("location", "big.data"), ("offset", offset), ("length", size)):
                    t.external_data.add(key=key, value=str(value))
                consts.append(t)
                if data is not None:
                    f.seek(offset)
                    f.write(data)
                offset += -(-size // 4096) * 4096
            attrs = {"K": k, "N": n, "bits": 4, "block_size": 128, "accuracy_level": 4}
            ins, out = [f"x{i}", f"b{i}", f"s{i}"], [f"x{i + 1}"]
            nodes.append(helper.make_node("MatMulNBits", ins, out, f"site{i}", domain="com.microsoft", **attrs))
        f.truncate(offset)
    x = helper.make_tensor_value_info("x0", TensorProto.FLOAT, ["M", k])
    y = helper.make_tensor_value_info(f"x{layers}", TensorProto.FLOAT, ["M", n])
    graph = helper.make_graph(nodes, "big", [x], [y], consts)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "big.onnx")
    return folder / "big.onnx"


def private_bytes(pids: list[int]) -> int:
    """Anonymous memory of processes: mapped files do not count."""
    total = 0
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Anonymous:"))
    return total * 1024


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from /proc")
def test_a_big_artifact_is_judged_in_little_memory(tmp_path: Path) -> None:
    """540 MB of codes; opened whole, the runtime would hold them twice."""
    path = big_artifact(tmp_path, layers=64, n=4096, k=4096)
    before, peak, done = private_bytes([os.getpid()]), 0, threading.Event()
    with Worker() as worker:

        def watch() -> None:
            nonlocal peak
            while not done.is_set():
                child = [] if worker.process is None else [worker.process.pid]
                peak = max(peak, private_bytes([os.getpid(), *child]) - before)
                time.sleep(0.01)

        thread = threading.Thread(target=watch)
        thread.start()
        sites, findings, evidence = verify_file(path, CPU, worker=worker)
        done.set()
        thread.join()
    assert not findings
    assert {s.status for s in sites} == {"fused"}
    assert len(sites) == 64
    assert evidence.kind == "measured"
    assert peak < 300 << 20


def test_weights_that_the_runtime_packed_are_made_up(worker: Worker, tmp_path: Path) -> None:
    """Opened without its weights, a node that the optimizer made has codes that nobody can read."""
    path = saved(weight_only("a", INT4, "block"), tmp_path)
    result = OrtEvidence(CPU, max_bytes=0, worker=worker).collect(path)
    assert not result.findings
    assert [(n.node, n.verdict, n.facts["weight_made_up"]) for n in result.nodes] == [("mm", "fused", True)] * 2


def test_what_the_optimizer_made_of_a_larger_file_is_compared_with_its_weights(worker: Worker, tmp_path: Path) -> None:
    """Over MAPPED_OVER the optimized graph is written without weights; numbers cannot be compared with that."""
    k, layers = 1024, 2 * MAPPED_OVER // (1024 * 1024)
    net, x = Net(), "x"
    net.input("x", ("M", k))
    codes = np.random.default_rng(1).integers(-8, 8, (k, k))
    for i in range(layers):
        scale = net.const(f"s{i}", np.full((k // 128, k), 0.005 + 1e-4 * i, np.float32))
        ins = [net.const(f"w{i}", np.roll(codes, i), TensorProto.INT4), scale]
        f = net.op("DequantizeLinear", ins, f"f{i}", name=f"dq{i}", axis=0, block_size=128)
        x = net.op("MatMul", [x, f], f"y{i}", name=f"mm{i}")
    net.output(x)
    onnx.save(net.model(), tmp_path / "larger.onnx")
    assert (tmp_path / "larger.onnx").stat().st_size > MAPPED_OVER
    sites, findings, _ = verify_file(tmp_path / "larger.onnx", CPU, worker=worker)
    assert {f.code for f in findings} <= {"QC304"}
    assert {s.status for s in sites} == {"fused"}
