"""Codes of a weight that a simplifier has folded back to float: its values still lie on the lattice of its scales.

``value = (code - zero) * scale`` rounded once, so the values of one group are whole multiples ``k`` of one number. Of a
group whose magnitudes are ``u_1 < u_2 < ..``, a scale ``s`` is found such that ``round(k_i * s) == u_i`` for whole
``k_i`` of at most 255: the smallest gap is a multiple of ``s``, so ``s`` is that gap divided by 1, 2, 3 ...; each
``u_i`` then allows ``s`` in ``[u_i - h_i, u_i + h_i] / k_i`` with ``h_i`` half a unit in the last place, and any number
of the weight's type in the intersection gives back every value, which is checked bit for bit. Trained float weights
have no such ``s``: the chance that 16 random numbers of 24 bits do is below 2^-100.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompiler.dtypes import TABLE, Array, DType

LEVELS = 255
"""The largest multiple: codes of 8 bits minus a zero point of 8 bits."""
GROUPS = (1024, 512, 256, 128, 64, 32, 16)


@dataclass(frozen=True)
class Lattice:
    """Rows ``[R, L]`` as ``k * scale``: ``group`` 0 for one scale a row, else the length of a group along L.

    ``scale`` is ``[R, G]`` in the weight's type; ``zero`` is ``[R, G]`` or None; codes are ``k + zero`` in ``element``.
    """

    element: DType
    group: int
    scale: Array
    zero: Array | None


def step_of(values: Array, levels: int = LEVELS) -> Array | None:
    """The scale (a 0-d array of the type of ``values``) whose multiples ``values`` are, bit for bit; None without one.

    All zeros have the scale 1.
    """
    u = np.unique(np.abs(values))
    u = u[u > 0]
    if not u.size:
        return np.ones((), values.dtype)
    if u.size > levels or not np.isfinite(u[-1]):
        return None
    wide = u.astype(np.float64)
    half = np.spacing(u).astype(np.float64) / 2
    gap = min(wide[0], np.diff(wide).min(initial=np.inf))
    slack = float(np.spacing(u[-1])) / gap + 1e-9
    for parts in range(1, levels + 1):
        middle = wide[-1] / gap * parts
        first, last = int(np.ceil(middle * (1 - slack) - 1e-3)), int(np.floor(middle * (1 + slack) + 1e-3))
        if first > levels:
            return None
        for top in range(max(first, 1), min(last, levels) + 1):
            k = np.rint(wide / (wide[-1] / top))
            if k[0] < 1:
                continue
            low, high = ((wide - half) / k).max(), ((wide + half) / k).min()
            for candidate in _between(low, high, values.dtype) if low <= high * (1 + 1e-6) else ():
                if np.array_equal(k.astype(values.dtype) * candidate, u):
                    return np.asarray(candidate)
    return None


def _between(low: float, high: float, kind: np.dtype) -> list[Array]:
    """A few numbers of type ``kind`` from ``low`` to ``high``, those at the ends and in the middle."""
    found = np.unique(np.array([(low + high) / 2, low, high]).astype(kind))
    near = np.concatenate([found, np.nextafter(found, kind.type(np.inf)), np.nextafter(found, kind.type(0))])
    return [c for c in np.unique(near) if c > 0]


def multiples(rows: Array, scale: Array, group: int) -> Array:
    """``k`` of ``rows[R, L]`` on the lattice, int16."""
    wide = np.repeat(scale, group, axis=1)[:, : rows.shape[1]] if group else scale
    return np.rint(rows.astype(np.float64) / wide.astype(np.float64)).astype(np.int16)


def find(rows: Array) -> Lattice | None:
    """The lattice of ``rows[R, L]``: one scale a row where that serves, else the longest groups that do.

    The 11 bits of f16 may lie on a lattice by chance, so there the one of the fewest bytes is taken.
    """
    if rows.ndim != 2 or min(rows.shape) < 1 or not rows.any():
        return None
    best: tuple[int, Lattice] | None = None
    for group in (0, *(g for g in GROUPS if g < rows.shape[1])):
        scale = _scales(rows, group)
        made = None if scale is None else _coded(rows, scale, group)
        if made is None:
            continue
        if rows.dtype != np.float16:
            return made
        size = made.element.bits * rows.shape[1] + (16 + made.element.bits) * made.scale.shape[1]
        if best is None or size < best[0]:
            best = size, made
    return None if best is None else best[1]


def _scales(rows: Array, group: int) -> Array | None:
    width = group or rows.shape[1]
    out = np.empty((len(rows), -(-rows.shape[1] // width)), rows.dtype)
    for r, row in enumerate(rows):
        for g in range(out.shape[1]):
            step = step_of(row[g * width : (g + 1) * width])
            if step is None:
                return None
            out[r, g] = step
    return out


def _coded(rows: Array, scale: Array, group: int) -> Lattice | None:
    """The narrowest code type that holds the multiples, with zero points where they are needed."""
    k = multiples(rows, scale, group)
    width = group or rows.shape[1]
    pads = np.pad(k, ((0, 0), (0, -k.shape[1] % width))).reshape(len(k), -1, width)
    low, high = np.minimum(pads.min(axis=2), 0), np.maximum(pads.max(axis=2), 0)
    for bits in (2, 4, 8):
        signed, unsigned = TABLE[f"int{bits}"], TABLE[f"uint{bits}"]
        if signed.qmin <= low.min() and high.max() <= signed.qmax:
            return Lattice(signed, group, scale, None)
        if (high - low).max() <= unsigned.qmax:
            return Lattice(unsigned, group, scale, (-low).astype(unsigned.storage))
    return None


def codes_of(rows: Array, found: Lattice) -> Array:
    """The codes ``[R, L]`` in the storage of their type."""
    k = multiples(rows, found.scale, found.group)
    if found.zero is not None:
        zero = found.zero.astype(np.int16)
        k = k + (np.repeat(zero, found.group, axis=1)[:, : k.shape[1]] if found.group else zero)
    return k.astype(found.element.storage)
