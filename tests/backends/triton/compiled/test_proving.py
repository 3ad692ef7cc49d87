"""The claims of every family hold: all for sm_80 and sm_90, the first of each row for the others.

``QCOMPILER_FULL=1``, or ``qcompiler kernels --prove``, proves all of them for all architectures.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcompiler.backends.triton import proof_cache
from qcompiler.backends.triton.claims import Claim
from qcompiler.backends.triton.families import FAMILIES, claims
from qcompiler.backends.triton.proving import Proof, prove
from tests.backends.triton.compiled.broken import GOOD, SPILLING

ARCHITECTURES = (80, 89, 90, 100)
WHOLE = ARCHITECTURES if os.environ.get("QCOMPILER_FULL") else (80, 90)


def wanted(family: str, sm: int) -> list[Claim]:
    found = list(claims(sm, families=(family,)))
    first = {claim.row: claim for claim in reversed(found)}
    return found if sm in WHOLE else list(first.values())


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, sm: int) -> None:
    proofs = prove(wanted(family, sm), sm)
    assert proofs, f"{family} claims nothing for sm_{sm}"
    failed = [f"{p.row} {p.case}: {fault}" for p in proofs for fault in p.faults]
    assert not failed, "\n" + "\n".join(failed)


def test_cases_are_told_apart() -> None:
    for sm in ARCHITECTURES:
        names = [(c.row, c.case) for c in claims(sm)]
        assert len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)


def test_proofs_are_kept_and_failures_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))
    good, bad = proof_cache.proved([GOOD, SPILLING], 90)
    (kept,) = (tmp_path / "proofs").iterdir()
    assert proof_cache.read_proof(kept.read_text()) == good
    assert not bad.holds

    def refuse(claim: object, sm: int) -> Proof:
        raise AssertionError("proved although it was kept")

    monkeypatch.setattr(proof_cache, "prove_claim", refuse)
    assert proof_cache.proved([GOOD], 90) == [good]
    kept.write_text("{")
    with pytest.raises(AssertionError, match="although it was kept"):
        proof_cache.proved([GOOD], 90)
    monkeypatch.setenv("QCOMPILER_CACHE", "off")
    assert proof_cache.entry_path(GOOD, 90) is None
