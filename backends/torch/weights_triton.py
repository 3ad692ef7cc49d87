"""The weight that a call of our own Triton operators holds, in float64: what its codes and scales mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from qcompiler import dtypes, float_codes
from qcompiler.backends.torch.held import argument
from qcompiler.backends.torch.nodes_triton import A8_LINEAR, BLOCK, SLOTS, form_at, fragments, number_at
from qcompiler.backends.triton import layouts
from qcompiler.backends.triton.forms import form_called
from qcompiler.dtypes import Array
from qcompiler.ir import Op, Value

Arrays = Callable[[Value], Array | None]
Floats = NDArray[np.float64]


def weight_of(op: Op, arrays: Arrays, rows: int | None = None) -> Floats | None:
    """``[n, K]`` of a linear or a table, its first ``rows`` where given; None where ``arrays`` does not know it all.

    Padding of K is among the columns. Raises InputError for tensors that do not fit each other.
    """
    call = op.name.rpartition(".")[0]
    slots = SLOTS[call]
    form, group = form_at(op, slots), max(number_at(op, slots.group), 0)
    codes, scales = _array(op, slots.codes, arrays), _array(op, slots.scales, arrays)
    if codes is None or scales is None:
        return None
    if not fragments(slots, call, form):
        return _rowwise(codes, scales, form, rows)
    n, k = min(rows or codes.shape[1], codes.shape[1]), codes.shape[0] * layouts.TILE
    cut = layouts.padded(n, layouts.ROWS)
    held = decoded(layouts.unpack_codes(np.ascontiguousarray(codes[:, :cut]), form, cut, k), form)
    zeros = _array(op, slots.zeros, arrays)
    if zeros is not None:
        laid = layouts.unpack_zeros(zeros, zeros.shape[1], k, group, form)[:cut].astype(np.float64)
        held -= _spread(laid, group, k)
    scale = layouts.unpack_scales(scales, scales.shape[1], k, group)[:cut]
    scale = scale.view(ml_dtypes.float8_e8m0fnu) if form == "mxfp4" else scale
    held *= _spread(np.nan_to_num(scale.astype(np.float64)), group, k)
    whole = _array(op, slots.whole, arrays) if slots.whole >= 0 else None
    return (held * float(whole.reshape(-1)[0]) if whole is not None else held)[:n]


def decoded(codes: Array, form: str) -> Floats:
    """The values of canonical codes."""
    known = form_called(form)
    if known.kind == "integer":
        return codes.astype(np.float64)
    element = dtypes.TABLE[{"mxfp4": "f4e2m1", "nvfp4": "f4e2m1"}.get(form, form)]
    return np.asarray(float_codes.decode(codes, element), np.float64)


def _rowwise(codes: Array, scales: Array, form: str, rows: int | None) -> Floats:
    """Of 8-bit codes ``[N, K]`` with one scale, one a row, or one a block."""
    n, k = codes.shape
    wide = scales.astype(np.float64)
    if wide.ndim == 2:
        wide = np.repeat(np.repeat(wide, BLOCK, axis=0)[:n], BLOCK, axis=1)[:, :k]
    else:
        wide = np.broadcast_to(wide.reshape(-1, 1), (n, 1))
    return decoded(codes[:rows], form) * wide[:rows]


def _spread(parameters: Floats, group: int, k: int) -> Floats:
    return np.repeat(parameters, group, axis=1)[:, :k] if group else parameters


def _array(op: Op, index: int, arrays: Arrays) -> Array | None:
    found = argument(op, index) if index >= 0 else None
    return arrays(found) if isinstance(found, Value) else None


def among(op: Op, operands: Any) -> Arrays:
    """The arrays of a call that are given in the order of its operands."""
    known: Mapping[Value, Array] = {v: a for v, a in zip(op.operands, operands, strict=True) if v is not None}
    return known.get


def is_ours(op: Op) -> bool:
    """A product or a lookup whose weight :func:`weight_of` reads."""
    call = op.name.rpartition(".")[0]
    return call in SLOTS and SLOTS[call].kind != "experts"


def activation_of(op: Op, arrays: Arrays) -> Floats | None:
    """``[M, K]`` of a linear: floats, or codes times their scales. None where ``arrays`` does not know it."""
    x = _array(op, 0, arrays)
    if x is None:
        return None
    flat = x.reshape(-1, x.shape[-1]).astype(np.float64)
    if op.name.rpartition(".")[0] != A8_LINEAR:
        return flat
    scale = _array(op, 1, arrays)
    if scale is None:
        return None
    wide = scale.astype(np.float64).reshape(-1, scale.shape[-1] if scale.ndim else 1)
    block = number_at(op, 10)
    return flat * (np.repeat(wide, block, axis=1)[:, : flat.shape[1]] if block > 0 else wide)
