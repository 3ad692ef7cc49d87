"""Artifacts in a process that has only ``import qcompiler`` and torch; and the command line from source to verdict."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import qcompiler
from qcompiler.backends.torch.sources import Sample
from qcompiler.errors import InputError
from tests.support import ROOT

RECIPES = ("w4a16", "w8a8-dynamic")


class Tiny(nn.Module):
    """A table, a linear read by two, a product with the table's rows; batch and sequence open."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(48, 64)
        self.up = nn.Linear(64, 96)
        self.gate = nn.Linear(64, 96)
        self.down = nn.Linear(96, 48, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        out: Tensor = self.down(torch.relu(self.gate(x)) * self.up(x))
        return out


def tiny() -> Sample:
    torch.manual_seed(0)
    ids = torch.randint(0, 48, (2, 5))
    return Sample(Tiny().eval(), (ids,), ({0: Dim("batch"), 1: Dim("sequence", max=64)},))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, qcompiler.Artifact]:
    folder = tmp_path_factory.mktemp("artifacts")
    module, args, shapes = tiny()
    return {
        recipe: qcompiler.compile(
            module, target="torch-cpu", recipe=recipe, args=args, dynamic_shapes=shapes, out=folder / f"{recipe}.pt2"
        )
        for recipe in RECIPES
    }


_ALONE = """
import json, sys
{imports}
found = {{}}
for path in sys.argv[1:]:
    module = torch.export.load(path).module()
    found[path] = [module(torch.arange(b * s).reshape(b, s) % 48).flatten().tolist() for b, s in ((1, 1), (3, 7))]
print(json.dumps(found))
"""
ORDERS = {"ours first": "import qcompiler\nimport torch", "torch first": "import torch\nimport qcompiler"}


@pytest.mark.parametrize("order", list(ORDERS))
def test_artifacts_run_with_import_qcompiler_alone(order: str, artifacts: dict[str, qcompiler.Artifact]) -> None:
    paths = [str(a.path) for a in artifacts.values()]
    done = subprocess.run(
        [sys.executable, "-c", _ALONE.format(imports=ORDERS[order]), *paths],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    module = tiny().module
    for artifact in artifacts.values():
        for (batch, sequence), theirs in zip(((1, 1), (3, 7)), found[str(artifact.path)], strict=True):
            ids = torch.arange(batch * sequence).reshape(batch, sequence) % 48
            (ours,) = artifact(ids)
            assert ours.flatten().tolist() == theirs
            close = nn.functional.cosine_similarity(ours.flatten(), module(ids).detach().flatten(), dim=0)
            assert close > 0.97  # 4 bits on normal weights: 20 dB a layer


def test_the_artifact_opens_as_a_module(artifacts: dict[str, qcompiler.Artifact]) -> None:
    artifact = artifacts["w4a16"]
    assert artifact.report.accepted and artifact.report.source.kind == "module"
    assert artifact.module is artifact.module
    assert isinstance(artifact.module, nn.Module)
    with pytest.raises(InputError, match=r"has no \.session; what opens it is \.module"):
        _ = artifact.session
    with pytest.raises(InputError, match=r"element type torch\.float32"):
        artifact(torch.ones(2, 5))


def test_saved_artifacts_and_their_verdict(artifacts: dict[str, qcompiler.Artifact], tmp_path: Path) -> None:
    """A saved copy is verified as what was compiled: the same sites under the same names."""
    path = artifacts["w8a8-dynamic"].save(tmp_path / "copy.pt2")
    report = qcompiler.verify(path, target="torch-cpu", run=False)
    assert report.accepted and report.source.kind == "pt2"
    names = {"table", "up", "gate", "down"}
    assert {s.name for s in report.sites} == {s.name for s in artifacts["w8a8-dynamic"].report.sites} == names
    from qcompiler import api

    assert {s.name for s in api.inspect(path).report.sites} == names


@pytest.mark.parametrize(
    ("target", "settings", "said"),
    [
        ("torch-cpu", {"emit.format": "qdq"}, r"emit\.format is not for \.pt2 artifacts; they take emit\.aot"),
        ("torch-cpu", {"emit.external": True}, r"emit\.external is not for \.pt2 artifacts"),
        ("ort-cpu", {"emit.aot": True}, r"emit\.aot is not for \.onnx artifacts; they take emit\.external, emit"),
    ],
)
def test_options_of_other_artifacts(target: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        qcompiler.compile("tests.zoo:mlp", target=target, settings=settings)


# -- the command line ------------------------------------------------------------------------------------------


def test_command_line_from_function_to_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qcompiler.cli import status

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        ended = status(list(arguments))
        return ended, *capsys.readouterr()

    out = str(tmp_path / "m.pt2")
    source = "tests.backends.torch.test_fresh_process:tiny"
    code, text, err = run("compile", source, "-o", out, "--target", "torch-cpu", "--json")
    assert (code, err) == (0, "")
    report = json.loads(text)
    assert (report["verdict"], report["target"], report["source"]["kind"]) == ("accepted", "torch-cpu", "function")
    assert json.loads(Path(f"{out}.report.json").read_text())["verdict"] == "accepted"
    code, text, _ = run("verify", out, "--target", "torch-cpu", "--json", "--no-run")
    assert code == 0 and json.loads(text)["totals"]["fused"] == 4
    code, text, _ = run("plan", source, "--target", "torch-cpu", "--json")
    assert code == 0 and {s["kernel"]["decode"] for s in json.loads(text)["sites"]} >= {"torch-cpu/int4pack"}
    code, text, _ = run("inspect", out, "--text")
    assert code == 0 and "aten._weight_int4pack_mm_for_cpu.default" in text and "[batch, sequence" in text
    code, text, err = run("compile", "model.onnx", "-o", out, "--target", "torch-cpu")
    assert code == 2 and "is an ONNX model, and torch targets take torch models" in err
    code, text, err = run("compile", source, "-o", str(tmp_path / "m.onnx"), "--target", "torch-cpu")
    assert code == 2 and "artifacts for torch-cpu are .pt2 files" in err
    code, text, _ = run("kernels", "--target", "torch-cpu")
    assert code == 0 and "torch-cpu/int4pack" in text


def test_each_pass_is_checked(tmp_path: Path) -> None:
    """``--check`` without data: inputs are made up for the program, and the kernels keep their bounds."""
    module, args, shapes = tiny()
    out = tmp_path / "m.pt2"
    artifact = qcompiler.compile(
        module, target="torch-cpu", recipe="w4a16", args=args, dynamic_shapes=shapes, out=out, check=True
    )
    by_name = {c.name: c for c in artifact.report.checks}
    assert artifact.report.accepted
    assert by_name["choose-layout"].compared and 0 < by_name["choose-layout"].error <= by_name["choose-layout"].bound
