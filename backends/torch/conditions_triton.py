"""What a call of our own Triton operators must satisfy beyond its kernel rows: shapes, types and layout agree.

The kernels trust these: a fragment of another form, or a scale row too few, would be read as other numbers.
"""

from __future__ import annotations

from qcompiler.backends.torch.held import LowBit, argument
from qcompiler.backends.torch.nodes_triton import A8_LINEAR, SLOTS, form_at, fragments, number_at, tensor_at
from qcompiler.backends.triton.forms import FORMS
from qcompiler.backends.triton.layouts import ROWS, TILE, padded, scale_rows
from qcompiler.backends.triton.rows import FUNCTIONS
from qcompiler.ir import Value

GROUPS = frozenset({0, 16, 32, 64, 128, 256, 512, 1024})


def _shape(value: Value | None) -> tuple[int, ...]:
    return (None if value is None else value.tensor.static_shape) or ()


def form_unknown(n: LowBit) -> str | None:
    """The form or the function behind the product is none that there is."""
    form, function = form_at(n.op, SLOTS[n.call]), _function(n)
    if form not in FORMS:
        return f"it names the form {form!r}, and there is none; known: {', '.join(FORMS)}"
    if function not in FUNCTIONS | {"none"}:
        return f"it names the function {function!r}; known: none, {', '.join(sorted(FUNCTIONS))}"
    return None


def _function(n: LowBit) -> str:
    if n.call == "qcompiler.wn_embedding":
        return "none"
    found = argument(n.op, SLOTS[n.call].form + 1)
    return "none" if found is None else str(found)


def group_wrong(n: LowBit) -> str | None:
    """A group that no kernel takes."""
    group = number_at(n.op, SLOTS[n.call].group)
    return None if group in GROUPS else f"its groups are of {group}; the kernels take 32, 64, 128 and its multiples"


def codes_wrong(n: LowBit) -> str | None:
    """Codes that are not what the form, N and K say."""
    slots = SLOTS[n.call]
    form, shape = form_at(n.op, slots), _shape(n.codes)
    element = None if n.codes is None else n.codes.tensor.dtype
    if not shape or element is None or form not in FORMS:
        return None
    if not fragments(slots, n.call, form):
        ok = len(shape) == 2 and shape[0] == n.n and element.name == form and (not n.k or shape[1] == n.k)
        return None if ok else f"its codes are {element}{list(shape)}, and {form} ones of {n.n}x{n.k} are asked for"
    words, rank = FORMS[form].words, 4 if slots.kind == "experts" else 3
    if len(shape) != rank or element.name != "int32" or shape[-1] != words or shape[-2] % ROWS:
        return (
            f"its codes are {element}{list(shape)}; {form} fragments are int32[K / {TILE}, N, {words}], N % {ROWS} == 0"
        )
    held, wanted = (shape[-2], shape[-3] * TILE), (padded(max(n.n, 1), ROWS), padded(max(n.k, 1), TILE))
    return None if held == wanted else f"its codes are of {held[0]}x{held[1]}, and N={n.n} K={n.k} needs {wanted}"


def parameters_wrong(n: LowBit) -> str | None:
    """Scales or zero points of another shape than the codes and the group ask for, or of a type that means nothing."""
    slots = SLOTS[n.call]
    group, form, shape = number_at(n.op, slots.group), form_at(n.op, slots), _shape(n.codes)
    if not shape or form not in FORMS or not fragments(slots, n.call, form):
        return None
    want = (*shape[:-3], scale_rows(shape[-3] * TILE, group), shape[-2])
    for what, value in (("scales", n.scales), ("zero points", n.zeros)):
        if value is not None and _shape(value) != want:
            return f"its {what} are {list(_shape(value))}, and groups of {group} need {list(want)}"
    if n.zeros is not None and FORMS[form].kind != "integer":
        return f"{form} codes have no zero points, and it is given some"
    zero = None if n.zeros is None else n.zeros.tensor.dtype
    if zero is not None and zero.name != "int16" and not zero.is_float:
        return f"its zero points are {zero}; whole ones are int16, shifted as the codes are"
    whole = form == "nvfp4"
    if n.call != A8_LINEAR and (n.whole is not None) != whole:
        return f"{form} codes {'need' if whole else 'have no'} factor of the whole tensor"
    return None


def parameters_change(n: LowBit) -> str | None:
    """Scales or zero points that are computed anew at each call."""
    for what, index in (("scales", SLOTS[n.call].scales), ("zero points", SLOTS[n.call].zeros)):
        value = tensor_at(n.op, index)
        if value is not None and value.payload is None:
            how = "an input" if value.owner is None else f"computed by {value.owner.name}"
            return f"its {what} '{value.name}' are {how}"
    return None
