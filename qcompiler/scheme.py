"""How a tensor is quantized, as one frozen value with a one-line text form: ``int4 g128 asym``.

Words follow compressed-tensors: granularity is ``tensor``, ``channel``, ``group``, ``block`` or ``token``; a symmetric
scheme has no zero point; ``dynamic`` parameters are computed at run time from each input.

The laws that :meth:`Scheme.validate` enforces, and only these:
  - ``group`` granularity has a group size that is a power of two in 16..1024; no other granularity has one
    (``block`` has two sizes).
  - ``token`` granularity is dynamic; ``dynamic`` is tensor, token or blocks of one row, ``b1xM``.
  - float and codebook codes are symmetric; a float zero point needs integer codes.
  - scales have the dtype of the tensor. ``scale=`` names a narrower type that they are values of, with the group size
    of its standard: ``f8e8m0`` (powers of two) for float codes in groups of 32, as OCP Microscaling Formats v1.0;
    ``f8e4m3`` (times a power of two for the whole tensor) for f4e2m1 codes in groups of 16, as NVFP4.

A block ``bNxM`` is N output features by M along the reduction axis, whatever the orientation of the matrix.

``axis`` is the axis along which groups run (the reduction axis K of a weight), or the channel axis for ``channel``.
It belongs to the tensor at hand, not to the text that a user writes, so a recipe never spells it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from qcompiler.dtypes import TABLE, DType, dtype
from qcompiler.errors import RecipeError

Granularity = Literal["tensor", "channel", "group", "block", "token"]
ZeroKind = Literal["none", "int", "float"]

SCALES: dict[str, tuple[tuple[str, ...], int, str]] = {
    "f8e8m0": (("f4e2m1", "f8e4m3", "f8e5m2"), 32, "OCP Microscaling Formats"),
    "f8e4m3": (("f4e2m1",), 16, "NVFP4"),
}
"""Scale type -> the codes it goes with, their group size, and the standard that says so."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """A quantization scheme. ``value = (code - zero) * scale`` for integer codes, ``code * scale`` for float ones.

    Codes of a codebook (``nf4``) are indices of its table: ``value = table[code] * scale``.
    """

    dtype: DType
    granularity: Granularity = "tensor"
    symmetric: bool = True
    group: tuple[int, ...] = ()
    axis: int | None = None
    dynamic: bool = False
    zero: ZeroKind = "none"
    scale: DType | None = None

    def __post_init__(self) -> None:
        if not self.symmetric and self.zero == "none":
            object.__setattr__(self, "zero", "int")
        self.validate()

    def validate(self) -> None:
        """Raise RecipeError naming the law that is broken."""
        text = self._text_unchecked()
        if self.granularity == "group":
            if len(self.group) != 1 or self.group[0] not in (16, 32, 64, 128, 256, 512, 1024):
                raise RecipeError(f"{text}: a group size is a power of two in 16..1024, not {self.group}")
        elif self.granularity == "block":
            if len(self.group) != 2 or min(self.group) < 1:
                raise RecipeError(f"{text}: a block has two positive sizes, not {self.group}")
        elif self.group:
            raise RecipeError(f"{text}: granularity {self.granularity} takes no group size")
        if self.granularity == "token" and not self.dynamic:
            raise RecipeError(f"{text}: per-token parameters exist only at run time; add the word 'dynamic'")
        rows = self.granularity == "block" and self.group[0] == 1
        if self.dynamic and self.granularity not in ("tensor", "token") and not rows:
            raise RecipeError(f"{text}: dynamic quantization is per tensor or per token, or in blocks b1xM of a row")
        if not self.symmetric and not self.dtype.is_integer:
            raise RecipeError(f"{text}: {self.dtype} codes have no zero point; write 'sym'")
        if self.symmetric != (self.zero == "none"):
            raise RecipeError(f"{text}: a zero point belongs to an asymmetric scheme, and only to it")
        self._validate_scale(text)

    def _validate_scale(self, text: str) -> None:
        """The laws of a scale type."""
        if self.scale is None:
            return
        law = SCALES.get(self.scale.name)
        if law is None:
            raise RecipeError(f"{text}: scales are f8e8m0 or f8e4m3, or, without 'scale=', of the dtype of the tensor")
        codes, size, known = law
        if self.dtype.name not in codes or self.group_size != size:
            raise RecipeError(
                f"{text}: {self.scale} scales belong to {' or '.join(codes)} codes in groups of {size} ({known}); "
                f"write '{codes[0]} g{size} sym scale={self.scale}', or leave 'scale=' out"
            )

    @property
    def bits(self) -> int:
        return self.dtype.bits

    @property
    def group_size(self) -> int | None:
        """Group size along K, or None when the parameters span the whole axis."""
        return self.group[0] if self.granularity == "group" else None

    def groups(self, k: int) -> int:
        """How many scales a row of ``k`` weights has; the last group may be short."""
        return -(-k // self.group[0]) if self.granularity == "group" else 1

    def with_axis(self, axis: int | None) -> Scheme:
        return replace(self, axis=axis)

    def _text_unchecked(self) -> str:
        words = [self.dtype.name]
        match self.granularity:
            case "group":
                words.append("g" + ",".join(map(str, self.group)))
            case "block":
                words.append("b" + "x".join(map(str, self.group)))
            case other:
                words.append(other)
        words.append({"none": "sym", "int": "asym", "float": "asymf"}[self.zero])
        if self.dynamic:
            words.append("dynamic")
        if self.scale is not None:
            words.append(f"scale={self.scale}")
        if self.axis is not None:
            words.append(f"axis={self.axis}")
        return " ".join(words)

    def __str__(self) -> str:
        """The one-line text; :func:`parse_scheme` reads it back."""
        return self._text_unchecked()

    @property
    def text(self) -> str:
        """The text without the axis, as recipes and reports print it."""
        return str(self.with_axis(None))


def parse_scheme(text: str) -> Scheme:
    """Read ``DTYPE [tensor|channel|token|gN|bNxM] [sym|asym|asymf] [dynamic] [scale=TYPE] [axis=N]``.

    Raises RecipeError that names the word or the law that is broken.
    """
    words = text.split()
    if not words:
        raise RecipeError("an empty scheme; write for example 'int4 g128 asym'")
    try:
        element: DType = dtype(words[0])
    except Exception as e:
        raise RecipeError(f"scheme {text!r}: {e}") from None
    granularity: Granularity = "tensor"
    group: tuple[int, ...] = ()
    symmetric, dynamic, axis = True, False, None
    zero: ZeroKind = "none"
    scale: DType | None = None
    for word in words[1:]:
        if word in ("tensor", "channel", "token"):
            granularity = word  # type: ignore[assignment]  # narrowed by the tuple above
        elif m := re.fullmatch(r"g(\d+)", word):
            granularity, group = "group", (int(m[1]),)
        elif m := re.fullmatch(r"b(\d+)x(\d+)", word):
            granularity, group = "block", (int(m[1]), int(m[2]))
        elif word == "sym":
            symmetric, zero = True, "none"
        elif word in ("asym", "asymf"):
            symmetric, zero = False, "int" if word == "asym" else "float"
        elif word == "dynamic":
            dynamic = True
        elif m := re.fullmatch(r"axis=(-?\d+)", word):
            axis = int(m[1])
        elif word.removeprefix("scale=") in TABLE and word.startswith("scale="):
            scale = TABLE[word.removeprefix("scale=")]
        else:
            raise RecipeError(
                f"scheme {text!r}: unknown word {word!r}; "
                "known: tensor, channel, token, gN, bNxM, sym, asym, asymf, dynamic, scale=f8e8m0|f8e4m3, axis=N"
            )
    return Scheme(element, granularity, symmetric, group, axis, dynamic, zero, scale)


@dataclass(frozen=True, slots=True)
class Alternatives:
    """Schemes in order of wish, ``uint8 tensor asym dynamic | int8 token sym dynamic``: a target gets the first that it
    has a kernel for. What is quantized the same on all targets, as weights are, has no alternatives."""

    schemes: tuple[Scheme, ...]

    def __post_init__(self) -> None:
        if len(self.schemes) < 2 or len(set(self.schemes)) < len(self.schemes):
            raise RecipeError(f"'{self.text}': alternatives are two schemes or more, each another one")

    @property
    def text(self) -> str:
        return " | ".join(s.text for s in self.schemes)


def parse_alternatives(text: str) -> Alternatives:
    """Read ``SCHEME | SCHEME ...``; raises RecipeError."""
    return Alternatives(tuple(parse_scheme(part) for part in text.split("|")))
