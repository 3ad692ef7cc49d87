"""What FX calls and passes, as text and back: targets as op names, argument atoms.

``aten.linear.default`` is an operator overload, ``higher_order.cond`` one that takes subgraphs,
``py.operator.add`` arithmetic on sizes. Text never names anything outside torch's operator registry and the
short table of Python functions.
"""

from __future__ import annotations

import builtins
import importlib
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

from qcompiler.errors import InputError
from qcompiler.ir import Atom

_OPERATOR = (
    "add sub mul truediv floordiv mod pow neg pos abs eq ne lt le gt ge and_ or_ not_ xor invert lshift rshift "
    "getitem index"
)
_MATH = (
    "floor ceil trunc sqrt log log2 log10 exp pow sin cos tan sinh cosh tanh asin acos atan atan2 isfinite isinf "
    "isnan fabs copysign gcd"
)
_BUILTINS = "max min abs int float bool round pow"
_TORCH = (
    "sym_int sym_float sym_max sym_min sym_not sym_ite sym_sum _sym_sqrt _sym_floor _sym_ceil _sym_log2 _sym_cos "
    "_sym_sin _sym_tan _sym_cosh _sym_sinh _sym_tanh _sym_acos _sym_asin _sym_atan _sym_exp"
)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"py.{name}.{word}": getattr(home, word)
    for name, home, words in (
        ("operator", operator, _OPERATOR),
        ("math", math, _MATH),
        ("builtins", builtins, _BUILTINS),
        ("torch", torch, _TORCH),
    )
    for word in words.split()
    if hasattr(home, word)
}
_NAMES = {function: name for name, function in reversed(FUNCTIONS.items())}
_CONSTANTS: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def op_name(target: Any) -> str:
    """The IR's name for what a ``call_function`` node calls; InputError when it is none of the known kinds."""
    if isinstance(target, OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return f"{namespace}.{name}.{target._overloadname}"
    if isinstance(target, HigherOrderOperator):
        return f"higher_order.{target._name}"
    try:
        found = _NAMES.get(target)
    except TypeError:
        found = None
    if found is None:
        module = getattr(target, "__module__", None) or "?"
        called = getattr(target, "__qualname__", None) or repr(target)
        raise InputError(f"a call of {module}.{called} cannot be captured: it is neither an operator nor arithmetic")
    return found


def target_of(name: str) -> Callable[..., Any]:
    """Inverse of :func:`op_name`; InputError when torch has no such operator here."""
    if (function := FUNCTIONS.get(name)) is not None:
        return function
    namespace, _, rest = name.partition(".")
    if namespace == "higher_order":
        importlib.import_module("torch._higher_order_ops")  # some register themselves only then
        found = getattr(torch.ops.higher_order, rest, None)
        if isinstance(found, HigherOrderOperator):
            return found
        raise InputError(f"this torch has no higher-order operator {rest!r}")
    base, _, overload = rest.rpartition(".")
    packet = getattr(getattr(torch.ops, namespace, None), base, None) if base else None
    found = getattr(packet, overload, None)
    if not isinstance(found, OpOverload):
        raise InputError(
            f"torch has no operator {name!r} in this process; import the package that registers it, or check the name"
        )
    return found


def to_atom(value: Any) -> Atom | None:
    """``value`` as an atom, None when it is of no kind that calls carry."""
    for kind, type_ in _CONSTANTS.items():
        if isinstance(value, type_):
            return Atom(f"torch.{kind}", str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        return Atom("torch.device", str(value))
    if isinstance(value, complex):
        return Atom("complex", repr(value))
    if isinstance(value, OpOverload):
        return Atom("torch.op", op_name(value))
    return None


def from_atom(atom: Atom) -> Any:
    """Inverse of :func:`to_atom`; InputError for an atom that is not torch's or not of this torch."""
    kind = atom.kind.removeprefix("torch.")
    if kind in _CONSTANTS:
        value = getattr(torch, atom.text, None)
        if not isinstance(value, _CONSTANTS[kind]):
            raise InputError(f"this torch has no {kind} {atom.text!r}")
        return value
    try:
        if atom.kind == "torch.device":
            return torch.device(atom.text)
        if atom.kind == "complex":
            return complex(atom.text)
    except (RuntimeError, ValueError) as e:
        raise InputError(f"{atom.kind} {atom.text!r} cannot be read") from e
    if atom.kind == "torch.op":
        return target_of(atom.text)
    raise InputError(f"{atom.kind}{atom.text!r} means nothing to torch")
