"""Killed at any moment, a compilation leaves nothing or a complete artifact at OUT."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper

from tests.acceptance.graphs import model, weights, write

LAYERS, WIDTH, KILLS = 12, 768, 10


def chain() -> object:
    """Twelve layers: enough to write that a kill falls into the writing now and then."""
    nodes = [helper.make_node("MatMul", [f"x{i}", f"l{i}.weight"], [f"x{i + 1}"], name=f"l{i}") for i in range(LAYERS)]
    tensors = {f"l{i}.weight": weights(WIDTH, WIDTH, seed=i) for i in range(LAYERS)}
    return model(nodes, [("x0", ["n", WIDTH])], [(f"x{LAYERS}", ["n", WIDTH])], tensors)


@pytest.mark.slow
def test_ten_kills(tmp_path: Path) -> None:
    source = write(tmp_path / "m.onnx", chain())  # type: ignore[arg-type]
    out = tmp_path / "o" / "out.onnx"
    out.parent.mkdir()
    command = [
        sys.executable,
        "-m",
        "qcompiler",
        "compile",
        str(source),
        "-o",
        str(out),
        "--target",
        "ort-cpu",
        "--json",
    ]
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    whole = time.perf_counter() - begin
    rng = random.Random(0)
    found = []
    for _ in range(KILLS):
        for path in out.parent.iterdir():
            if path.is_file():
                path.unlink()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.2, 1.05) * whole)
        child.kill()
        child.wait()
        found.append(complete(out))
    print(f"of {KILLS} kills, {sum(found)} left a complete artifact, {KILLS - sum(found)} nothing")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert complete(out)
    assert not [p.name for p in out.parent.iterdir() if ".partial-" in p.name], (
        "a later run clears what a dead one left"
    )


def complete(out: Path) -> bool:
    """False when nothing is at ``out``; fails when there is something that is not whole."""
    if not out.exists():
        return False
    report = json.loads(out.with_name(out.name + ".report.json").read_text())
    assert report["verdict"] == "accepted"
    assert report["artifact"]["bytes"] == out.stat().st_size
    session = ort.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    y = session.run(None, {"x0": np.ones((1, WIDTH), np.float32)})[0]
    assert np.isfinite(y).all()
    return True
