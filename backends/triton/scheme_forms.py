"""Which form codes of a scheme take in a kernel's memory, and which scheme an operator's arguments tell of."""

from __future__ import annotations

from qcompiler import dtypes
from qcompiler.backends.triton.forms import FORMS
from qcompiler.errors import InputError, RecipeError
from qcompiler.scheme import Granularity, Scheme, ZeroKind

_SCALED = {"f8e8m0": "mxfp4", "f8e4m3": "nvfp4"}
"""Type of the scales of f4e2m1 codes -> the form that has a name of its own."""


def form_of(scheme: Scheme) -> str:
    """The form of codes of ``scheme``; raises InputError where it has none.

    Only scales of f4e2m1 codes are kept in a type of their own; what others have is exact in the type of the weight.
    """
    own = scheme.scale is not None and scheme.dtype.name == "f4e2m1"
    name = _SCALED[scheme.scale.name] if own and scheme.scale is not None else scheme.dtype.name
    if name not in FORMS:
        raise InputError(f"codes of <{scheme}> have no form among the kernels' own: {', '.join(FORMS)}")
    return name


def group_of(scheme: Scheme) -> int:
    """The ``group`` argument of the weight-only operators: weights along K that share a scale, 0 for all of K."""
    return scheme.group[-1] if scheme.granularity in ("group", "block") else 0


def scheme_told(form: str, group: int, zero: ZeroKind, per: Granularity = "channel") -> Scheme | None:
    """The scheme of codes in ``form``, as arguments tell it; ``per`` where ``group`` is 0. None for one that cannot be.

    Of a tensor's one scale, and of blocks, the kernels hold a copy a row, so they read as channels and groups.
    """
    code = {"mxfp4": "f4e2m1", "nvfp4": "f4e2m1"}.get(form, form)
    if form not in FORMS:
        return None
    extra = {kept: name for name, kept in _SCALED.items()}.get(form)
    scale = None if extra is None else dtypes.TABLE[extra]
    sizes = (group,) if group else ()
    try:
        return Scheme(dtypes.TABLE[code], "group" if group else per, zero == "none", sizes, zero=zero, scale=scale)
    except RecipeError:
        return None
