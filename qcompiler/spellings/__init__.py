"""Spellings of quantization that other tools write, each decoded into the pair form; one file a family.

Every rule keeps scales and codes as they are. ``RULES`` are all of them, in the order in which they are tried.
"""

from __future__ import annotations

from qcompiler.rewrite import Rule
from qcompiler.spellings import arithmetic, convolutions, functions, integers, lookups, nbits, qdq, torch_ops

RULES: tuple[Rule, ...] = (
    *qdq.RULES,
    *torch_ops.RULES,
    *nbits.RULES,
    *integers.RULES,
    *convolutions.RULES,
    *functions.RULES,
    *lookups.RULES,
    *arithmetic.RULES,
)
