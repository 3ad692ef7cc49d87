"""Every verdict against the runtime's own behaviour, graph by graph: with the runtime open, and foretold without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import onnx
import pytest

from qcompiler.backends.onnx.evidence import verify_file
from qcompiler.backends.onnx.kernels import target
from qcompiler.backends.onnx.worker import Worker
from qcompiler.verify.findings import Finding
from tests.verify import corpus_graphs, corpus_nbits, corpus_ops, corpus_qdq, corpus_types, corpus_w8a8
from tests.verify.build import Case
from tests.verify.measure import Seen, measure

CORPORA = (corpus_nbits, corpus_qdq, corpus_w8a8, corpus_graphs, corpus_types, corpus_ops)
TOTAL = 359


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as found:
        yield found


def label(finding: Finding) -> str:
    """The op's name in the file; inlining a function appends a number to it."""
    return finding.op.partition("__")[0]


def faults_of(case: Case, seen: Seen, errors: Sequence[Finding]) -> list[str]:
    """What is wrong with a verdict: it disagrees, blames the wrong op, or does not say why or what to do."""
    out = []
    if bool(errors) != bool(seen.bad):
        found = "; ".join(map(str, errors)) or "accepted"
        out.append(f"{case.name}: the runtime shows {seen.bad or 'a fused graph'} ({seen.ops}), the verdict is {found}")
    out += [
        f"{case.name}: {f.code} blames '{f.op}', not one of {case.blame}" for f in errors if label(f) not in case.blame
    ]
    out += [f"{case.name}: {f.code} gives no reason or no fix" for f in errors if not (f.reason and f.fix)]
    return out


@pytest.mark.parametrize("corpus", CORPORA, ids=lambda m: m.__name__.rpartition("_")[2])
def test_verdicts_agree_with_the_runtime(corpus: ModuleType, worker: Worker, tmp_path: Path) -> None:
    cases = list(corpus.cases())
    assert len({c.name for c in cases}) == len(cases)
    seen = measure(cases)
    assert any(s.bad for s in seen)
    assert not all(s.bad for s in seen)
    chip = target("ort-cpu")
    for run in (True, False):
        faults = []
        for case, shown in zip(cases, seen, strict=True):
            path = tmp_path / "case.onnx"
            onnx.save(case.model, path)
            _, findings, _ = verify_file(path, chip, run=run, worker=worker)
            faults += faults_of(case, shown, [f for f in findings if f.severity == "error"])
        print(
            f"{corpus.__name__}: {len(cases) - len(faults)} of {len(cases)} verdicts agree with the runtime, run={run}"
        )
        assert not faults, "\n".join(faults)


def test_the_corpus_is_whole() -> None:
    """A case that is lost would not be missed otherwise."""
    assert sum(len(list(corpus.cases())) for corpus in CORPORA) == TOTAL
