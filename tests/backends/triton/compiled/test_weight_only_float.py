"""PTX that decodes NF4, run by hand: no machine without a GPU runs it, and the interpreter takes another way."""

from __future__ import annotations

import re

import pytest

from qcompiler.backends.triton import layouts_float
from qcompiler.backends.triton.device import unpack_float

WORD = 0xFFFFFFFF


def prmt(a: int, b: int, selector: int) -> int:
    """PTX ISA, ``prmt.b32``, default mode."""
    octets = (b << 32 | a).to_bytes(8, "little")
    out = 0
    for i in range(4):
        nibble = selector >> (4 * i) & 15
        octet = octets[nibble & 7]
        out |= ((0xFF if octet >> 7 else 0) if nibble & 8 else octet) << (8 * i)
    return out


def run(ptx: str, *arguments: int) -> int:
    """What ``$0`` is after a block of mov, shr, xor and prmt; ``$1`` and so on are ``arguments``."""
    held = {f"${i + 1}": value for i, value in enumerate(arguments)} | {"%nsmid": 132}

    def value(word: str) -> int:
        return held[word] if word in held else int(word) & WORD

    for line in filter(None, (s.strip() for s in ptx.strip("{} ").split(";"))):
        if line.startswith(".reg"):
            continue
        name, *operands = re.split(r"[ ,]+", line)
        values = [value(word) for word in operands[1:]]
        held[operands[0]] = {
            "mov.u32": lambda a: a,
            "shr.u32": lambda a, b: a >> b,
            "xor.b32": lambda a, b: a ^ b,
            "prmt.b32": prmt,
        }[name](*values)
    return held["$0"]


@pytest.mark.parametrize("bf16", [True, False])
def test_four_lookups_are_those_of_the_table(bf16: bool) -> None:
    bits = layouts_float.nf4_bits(bf16)
    for plane in range(2):
        words = [unpack_float.table_word(bf16, plane, number) for number in range(4)]
        ptx = unpack_float.lookup_ptx(*words)
        for first in range(0, 16, 4):
            nibbles = sum((first + i) << (4 * i) for i in range(4))
            wanted = sum((bits[first + i] >> (8 * plane) & 0xFF) << (8 * i) for i in range(4))
            assert run(ptx, nibbles, nibbles ^ 0x88888888) == wanted


def test_two_planes_make_two_pairs() -> None:
    """The selectors of the last permutation: low bytes 0 and 1 with high bytes 0 and 1, then 2 and 3."""
    low, high = 0x33221100, 0x77665544
    assert prmt(low, high, 0x5140) == 0x55114400
    assert prmt(low, high, 0x7362) == 0x77336622
