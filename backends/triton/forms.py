"""Forms: how codes of a scheme lie in a weight-only kernel's memory, as one word that operators carry.

A form is the word of the code type (``int4``, ``uint4``, ``int8``, ``uint8``, ``int2``, ``uint2``, ``f8e4m3``,
``f8e5m2``, ``nf4``, ``f4e2m1``), or ``mxfp4`` (f4e2m1 with scales in e8m0) and ``nvfp4`` (f4e2m1 with scales in e4m3
and one f32 for the whole tensor). Integer codes are stored unsigned, signed ones shifted by half their range, and whole
zero points likewise; ``value = (stored - zero) * scale``, with the shift as the zero of a signed symmetric form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qcompiler.errors import InputError

Kind = Literal["integer", "float", "codebook"]


@dataclass(frozen=True)
class Form:
    """``bits`` of a code; ``shift`` is added to a code before it is stored (integers), and is its zero point where the
    scheme has none."""

    name: str
    bits: int
    kind: Kind
    shift: int = 0

    @property
    def words(self) -> int:
        """int32 words that hold the codes of 128 weights."""
        return 4 * self.bits


FORMS: dict[str, Form] = {
    f.name: f
    for f in (
        Form("int8", 8, "integer", 128),
        Form("uint8", 8, "integer"),
        Form("int4", 4, "integer", 8),
        Form("uint4", 4, "integer"),
        Form("int2", 2, "integer", 2),
        Form("uint2", 2, "integer"),
        Form("f8e4m3", 8, "float"),
        Form("f8e5m2", 8, "float"),
        Form("f4e2m1", 4, "float"),
        Form("mxfp4", 4, "float"),
        Form("nvfp4", 4, "float"),
        Form("nf4", 4, "codebook"),
    )
}


def form_called(name: str) -> Form:
    """The form; raises InputError that lists the known ones."""
    found = FORMS.get(name)
    if found is None:
        raise InputError(f"no form of codes is called {name!r}; known: {', '.join(FORMS)}")
    return found
