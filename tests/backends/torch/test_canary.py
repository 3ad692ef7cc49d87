"""The check inside ``.pt2`` files that torch's int4 kernels read the packing that the file holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompiler.backends.torch import canary, layouts
from qcompiler.backends.torch.capture import load
from qcompiler.backends.torch.fitting import width_here
from qcompiler.backends.torch.judge import sites_of
from qcompiler.backends.torch.program import open_module
from tests.backends.torch.lowered import SITES, lowered, written
from tests.support import ROOT

IDS = torch.arange(21).reshape(3, 7)
NAMES = [f"{canary.CANARY}.{name}" for name in ("x", "weight", "scales", "result")]
HERE = width_here()
avx512 = pytest.mark.skipif(HERE != "avx512", reason="torch runs no AVX-512 code here")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small network with int4 weights, for each vector width."""
    folder = tmp_path_factory.mktemp("widths")
    return {w: written(lowered("w4a16", f"torch-cpu:{w}"), folder / f"{w}.pt2") for w in layouts.ROWS}


def checks(program: torch.export.ExportedProgram) -> list[Any]:
    """The assertions in a program that the check makes."""
    return [n.args[1] for n in program.graph.nodes if n.target == torch.ops.aten._assert_async.msg]


def test_the_product_tells_packings_apart() -> None:
    for width in layouts.ROWS:
        t = canary.tensors(width)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(t["x"], t["weight"], canary.BLOCK, t["scales"])
        assert torch.equal(y, t["result"]) == (width == HERE)
    assert not torch.equal(canary.tensors("avx512")["weight"], canary.tensors("avx2")["weight"])


def test_plain_torch_raises_where_its_kernels_are_others(files: dict[str, Path]) -> None:
    for width, path in files.items():
        module = torch.export.load(path).module()
        if width == HERE:
            assert torch.equal(module(IDS), open_module(path)(IDS))
            continue
        with pytest.raises(RuntimeError) as told:
            module(IDS)
        assert str(told.value) == canary.sentence(width)
        assert f"packed for {width}, and torch runs other kernels here" in canary.sentence(width)


_CHILD = """
import json, sys, torch
ids, found = torch.arange(21).reshape(3, 7), []
for path in sys.argv[1:]:
    try:
        found.append(torch.export.load(path).module()(ids).flatten().tolist())
    except RuntimeError as e:
        found.append(str(e))
from pathlib import Path
from qcompiler.backends.torch.program import open_module
found += [open_module(Path(path))(ids).flatten().tolist() for path in sys.argv[1:]]
print(json.dumps([torch.backends.cpu.get_cpu_capability(), *found]))
"""


@avx512
def test_held_down_by_the_environment(files: dict[str, Path]) -> None:
    """A process that runs AVX2 code: plain torch refuses the AVX-512 file; opened here it is packed anew."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(files["avx512"]), str(files["avx2"])],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120, cwd=ROOT,
        env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    capability, refused, plain, repacked, ours = json.loads(done.stdout.splitlines()[-1])
    assert capability == "AVX2" and refused == canary.sentence("avx512")
    assert plain == repacked == ours


def test_it_is_no_part_of_the_graph(files: dict[str, Path], tmp_path: Path) -> None:
    """Captured again it is gone, written again it is there once; the calls of the model are all there are."""
    for width, path in files.items():
        program = torch.export.load(path)
        assert checks(program) == [canary.sentence(width)]
        assert [n for n in program.constants if canary.CANARY in n] == NAMES
        assert not any(canary.CANARY in n for n in program.state_dict)
        graph = load(path)
        assert not any(canary.CANARY in name for name in graph.consts)
        assert not any(op.loc.name == canary.LABEL or op.name == "aten._assert_async.msg" for op in graph.walk())
        assert sorted(s.name for s in sites_of(graph)) == sorted(SITES)
        again = torch.export.load(written(graph, tmp_path / "again.pt2"))
        assert checks(again) == [canary.sentence(width)]


def test_it_outlives_decompositions(files: dict[str, Path], tmp_path: Path) -> None:
    """What torch writes of it in smaller operators still raises, and is still no part of the model."""
    other = next(w for w in layouts.ROWS if w != HERE)
    core = torch.export.load(files[other]).run_decompositions()
    with pytest.raises(RuntimeError, match=f"packed for {other}"):
        core.module()(IDS)
    torch.export.save(core, tmp_path / "core.pt2")
    graph = load(tmp_path / "core.pt2")
    assert not any(canary.CANARY in name for name in graph.consts)
    assert sorted(s.name for s in sites_of(graph)) == sorted(SITES)


def test_left_alone_where_the_model_reads_it(files: dict[str, Path]) -> None:
    program = torch.export.load(files["avx2"])
    graph = load(program)
    value = graph.add_const(NAMES[0], next(iter(graph.consts.values())).payload)  # type: ignore[arg-type]
    graph.add_output(value)
    canary.uproot(graph)
    assert graph.consts[NAMES[0]] is value


def test_only_int4_weights_are_checked(tmp_path: Path) -> None:
    program = torch.export.load(written(lowered("w8a16"), tmp_path / "m.pt2"))
    assert not checks(program) and not any(canary.CANARY in n for n in program.constants)


@pytest.mark.slow
def test_inductor_keeps_it(files: dict[str, Path]) -> None:
    for width, path in files.items():
        module = torch.compile(torch.export.load(path).module())
        if width == HERE:
            assert module(IDS).shape == (3, 7, 50)
            continue
        with pytest.raises(RuntimeError, match=f"packed for {width}"):
            module(IDS)
