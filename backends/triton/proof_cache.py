"""Proofs are kept: compiling a model proves the kernels it uses at the cost of reading a few small files.

An entry holds as long as nothing that could change a proof has changed: any source or table of this folder, the
version of triton, the architecture, the case.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from qcompiler.backends.triton.claims import Claim
from qcompiler.backends.triton.proving import KernelFigures, Proof, needs_triton, prove_claim
from qcompiler.backends.triton.tiles import cache_path


@functools.cache
def sources_digest() -> str:
    """Of every file that a proof depends on, and of the version of triton."""
    import triton

    sha = hashlib.sha256(triton.__version__.encode())
    folder = Path(__file__).parent
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.json")]):
        sha.update(f"\n{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return sha.hexdigest()


def entry_path(claim: Claim, sm: int) -> Path | None:
    """Where the proof of a claim is kept; None where the cache is off (``QCOMPILER_CACHE=off``)."""
    tiles = cache_path(sm)
    if tiles is None:
        return None
    about = [
        claim.row,
        claim.case,
        claim.products,
        sorted(claim.outputs),
        sorted(claim.wide),
        claim.loop_weights,
        claim.load_bytes,
    ]
    key = hashlib.sha256(f"{sources_digest()}\n{sm}\n{json.dumps(about)}".encode()).hexdigest()[:32]
    return tiles.parent.parent / "proofs" / f"{key}.json"


def read_proof(text: str) -> Proof:
    """Inverse of ``json.dumps(asdict(proof))``; raises ValueError, KeyError or TypeError for other text."""
    found = json.loads(text)
    kernels = tuple(KernelFigures(**k) for k in found.pop("kernels"))
    return Proof(**{**found, "faults": tuple(found["faults"])}, kernels=kernels)


def proved(claims: Iterable[Claim], sm: int) -> list[Proof]:
    """As :func:`proving.prove`, from the cache where it holds the proof; failures are never kept."""
    needs_triton()
    return [_proved(claim, sm) for claim in claims if claim.least_sm <= sm]


def _proved(claim: Claim, sm: int) -> Proof:
    path = entry_path(claim, sm)
    if path is not None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # absent or damaged: proved anew
            return read_proof(path.read_text(encoding="utf-8"))
    proof = prove_claim(claim, sm)
    if path is not None and proof.holds:
        with contextlib.suppress(OSError):  # a full or locked disk keeps none
            _write(path, json.dumps(asdict(proof), indent=1) + "\n")
    return proof


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
