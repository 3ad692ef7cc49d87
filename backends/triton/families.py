"""The families of kernels, every claim that they make, and the proof of all of them for a target."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from qcompiler.backends.triton.rows import LEAST_SM, NAME
from qcompiler.errors import InputError

if TYPE_CHECKING:
    from qcompiler.backends.base import Progress
    from qcompiler.backends.triton.claims import Claim
    from qcompiler.backends.triton.proving import Proof

FAMILIES = ("weight_only_integer", "weight_only_float", "quantizing", "scaled", "embedding", "kv_cache", "grouped")
"""Modules of this folder; each has ``claims(sm)``."""


def claims(sm: int, rows: str = "*", families: tuple[str, ...] = FAMILIES) -> Iterator[Claim]:
    """What the kernels claim for compute capability ``sm``; ``rows`` is a glob over names of rows."""
    importlib.import_module("torch")  # first: its import registers the operators of every family
    for name in families:
        module = importlib.import_module(f"qcompiler.backends.triton.{name}")
        for claim in module.claims(sm):
            if claim.least_sm <= sm and fnmatchcase(claim.row, rows):
                yield claim


def architecture_word(target: str) -> int:
    """90 of ``torch-cuda:sm_90``, 80 where none is given; raises InputError for another target or word."""
    name, _, arch = target.partition(":")
    if name != NAME:
        raise InputError(
            f"the kernels of {name} are not ours to compile; those of {NAME} can be proved: --target {NAME}:sm_90"
        )
    word = arch.removeprefix("sm_")
    if arch and (word == arch or not word.isdecimal() or int(word) < LEAST_SM):
        raise InputError(f"{target!r} names no architecture from sm_{LEAST_SM} on, such as {NAME}:sm_90")
    return int(word) if arch else LEAST_SM


def prove_target(target: str, progress: Progress | None = None) -> list[Proof]:
    """Prove every claim for ``torch-cuda:sm_NN``; a few minutes, less where triton's cache holds the kernels. Raises
    InputError where triton is absent."""
    sm = architecture_word(target)
    from qcompiler.backends.triton.proving import needs_triton, prove_claim

    needs_triton()
    wanted = list(claims(sm))
    if progress is not None:
        progress.stage(f"proving kernels for sm_{sm}")
    proofs = []
    for done, claim in enumerate(wanted, 1):
        proofs.append(prove_claim(claim, sm))
        if progress is not None:
            progress.advance(done, len(wanted), "claims")
    return proofs
