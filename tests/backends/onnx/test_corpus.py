"""Every model within reach computes the same bits after capture and emission, and prints the same after parsing."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.backends.onnx.corpus import Case, backend_cases, file_cases
from tests.backends.onnx.roundtrip import roundtrip
from tests.backends.onnx.roundtrip_all import scratch
from tests.support import require_data

# What the corpus holds on purpose and no compiler should accept.
BROKEN = {
    "icm-31000000518082.onnx": "element type",
    "model_with_external_initializer_come_from_user.onnx": "absent",
    "test_evil_weights.onnx": "absent",
    "corrupt-model.onnx": "not a readable ONNX model",
}


def check(cases: Iterable[Case], *, at_least: int, external: bool | None = None) -> None:
    """All ``cases`` survive; at least ``at_least`` of them because ORT computes the same bits from both models."""
    counts: Counter[str] = Counter()
    bad = []
    for case in cases:
        with scratch() as folder:
            outcome = roundtrip(case, Path(folder), external=external)
        counts[outcome.verdict] += 1
        expected = BROKEN.get(Path(case.name).name)
        if outcome.verdict == "wrong" or (outcome.verdict == "refused") != (expected is not None):
            bad.append(f"{case.name}: {outcome}")
        elif expected is not None and expected not in outcome.detail:
            bad.append(f"{case.name}: refused for another reason: {outcome.detail}")
    ran = counts["equal"] + counts["wrong"]
    print(f"bit-equal outputs: {counts['equal']} of {ran}; compared as graphs only: {counts['structure']}")
    assert not bad, "\n".join(bad)
    assert counts["equal"] >= at_least


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the numbers that onnx's own tests compute
def test_onnx_node_models() -> None:
    cases = list(backend_cases("node"))[::3]  # roundtrip_all takes them all
    check(cases, at_least=len(cases) * 9 // 10)


@pytest.mark.parametrize("kind", ["simple", "light", "pytorch-converted", "pytorch-operator"])
def test_onnx_other_models(kind: str) -> None:
    cases = list(backend_cases(kind))
    assert cases
    check(cases, at_least=len(cases) * 2 // 3)


@pytest.mark.parametrize("external", [False, True])
def test_trained_models(external: bool) -> None:
    folder = require_data("onnx")
    check(file_cases(folder), at_least=8, external=external)


def test_mnist() -> None:
    check(file_cases(require_data("mnist")), at_least=1)


@pytest.mark.slow
def test_onnxruntime_models() -> None:
    cases = list(file_cases(require_data("ort_corpus")))
    check(cases, at_least=len(cases) * 8 // 10)
