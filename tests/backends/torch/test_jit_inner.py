"""What runs a graph of torch.compile: inductor, its code searched for expanded weights, or torch itself."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import qcompiler
from qcompiler.backends.torch.jit import compiling as jit_compile
from qcompiler.backends.torch.jit import inner as jit_inner
from qcompiler.report.model import Report
from tests.backends.torch.test_generated import PYTHON, K, N
from tests.backends.torch.test_jit import BOUND, compiled, distance, fresh, statuses

__all__ = ["fresh"]  # the fixture of every test of torch.compile, used by itself


def test_inductor_takes_the_graph_with_open_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels stay calls of the graph that inductor compiles; an open batch takes one compilation."""
    pytest.importorskip("torch._inductor.cpp_builder").get_cpp_compiler()
    model, reports = nn.Sequential(nn.Linear(64, 32), nn.ReLU()).eval(), list[Report]()
    searched: list[str] = []
    monkeypatch.setattr(jit_compile, "inductor_expands", lambda text, _: searched.append(text) or [])
    options = {"recipe": "w8a16", "inner": "inductor", "report": reports}
    run = torch.compile(model, backend="qcompiler", dynamic=True, options=options)
    for rows in (3, 5):
        x = torch.randn(rows, 64)
        assert distance(run(x), model(x)) < BOUND
    assert len(reports) == 1
    assert statuses(reports[0]) == {"0": "fused"}
    (code,) = searched
    assert "_weight_int8pack_mm" in code


def test_an_activation_at_an_odd_address_is_copied_before_a_kernel_of_aligned_vectors() -> None:
    """In a process of its own: what inductor leaves out ends in a segmentation fault."""
    pytest.importorskip("torch._inductor.cpp_builder").get_cpp_compiler()
    program = """
import torch
model = torch.nn.Linear(64, 64).eval().bfloat16()
run = torch.compile(model, backend="qcompiler", options={"recipe": "w8a16", "inner": "inductor"})
memory = torch.randn(8 * 64 + 1).bfloat16()
x = memory[1:].view(8, 64)
assert x.data_ptr() % 32
with torch.no_grad():
    print(float((run(x) - model(x)).abs().max()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert float(done.stdout) < BOUND


def test_code_that_expands_a_weight_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code is inductor's own for a dequantize that nothing fused, put in the place of what it made here."""

    def expanding(*_: Any) -> jit_inner.Runner:
        return jit_inner.Runner(lambda inputs: inputs, PYTHON)

    monkeypatch.setattr(jit_compile, "inner_compile", expanding)
    with pytest.raises(qcompiler.RejectedError, match=r"QC104.*expanded weight"):
        compiled(nn.Linear(K, N, bias=False).eval(), recipe="w8a16")(torch.ones(2, K))


def test_without_a_compiler_the_graph_runs_eagerly_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit_compile, "default_inner", lambda: ("eager", "torch.compile: no C++ compiler"))
    reports: list[Report] = []
    torch.compile(nn.Linear(64, 32).eval(), backend="qcompiler", options={"report": reports})(torch.ones(2, 64))
    assert "torch.compile: no C++ compiler" in reports[0].notes
