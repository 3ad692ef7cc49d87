"""Round-to-nearest of a weight matrix, tile by tile: the bits of :mod:`qcompiler.numerics`, near the speed of memory.

Beside the codes, a byte a weight, only the tiles of each thread are held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler import spec
from qcompiler.clipping import (
    CHUNK,
    FACTORS,
    Clip,
    Floats,
    affine_params,
    best_factor,
    check_codes,
    raised,
    search_range,
    shrink_errors,
)
from qcompiler.dtypes import Array, dtype_of
from qcompiler.errors import BadWeights, InputError
from qcompiler.float_codes import encode
from qcompiler.payload import ArrayPayload, Payload
from qcompiler.scheme import Scheme
from qcompiler.tiling import COLUMNS, TILE, Buffers, Reader, Tile, each, processors, tiles


@dataclass(frozen=True)
class RtnResult:
    """What a weight became.

    ``codes`` are of the storage type of the scheme's dtype, one a byte, in the orientation asked for. ``scale`` (dtype
    of the weight) and ``zero`` (dtype of the codes, or of the weight for a float zero point; None when symmetric) have
    the shape that ``spec.scale_shape`` gives for that orientation. ``stats`` holds ``weights`` (how many), ``sum_sq``
    and ``sum_sq_error`` (of all the weights, and of what rounding took from them, to float32 accuracy), ``groups``,
    ``zero_groups`` (all zero), ``scale_min`` and ``scale_max`` (of the others), ``all_scales_equal`` (several groups,
    one scale).
    """

    codes: Array
    scale: Array
    zero: Array | None
    stats: dict[str, Any]


def quantize_weight(
    weight: Payload | Array,
    scheme: Scheme,
    *,
    clip: Clip = "absmax",
    transpose: bool = False,
    threads: int | None = None,
    floor: Array | None = None,
) -> RtnResult:
    """Codes, scales and zero points of the matrix ``weight`` (f16, bf16, f32 or f64), with figures about them.

    ``scheme.axis`` is the axis that groups run along, for channel granularity that of the channels, None per tensor.
    With ``transpose`` codes and parameters come out transposed, as those of the transposed weight under the other axis.
    ``threads`` defaults to the processors at hand, at most 4. Neither it nor the orientation of the weight changes a
    bit, but for a tie between two ranges where ``clip`` is ``mse`` and the granularity tensor. ``floor``, of the shape
    of the scales before any transposing, is what no scale may be below; see :func:`qcompiler.clipping.raised`.
    Raises BadWeights for NaN or infinity, InputError for a tensor that is no float matrix, or a scheme that is dynamic
    or makes no codes.
    """
    check_codes(scheme, clip)
    if scheme.dynamic:
        raise InputError(f"<{scheme}>: the parameters of a weight are computed once; drop 'dynamic'")
    payload = weight if isinstance(weight, Payload) else ArrayPayload(np.asarray(weight), dtype_of(weight.dtype))
    if len(payload.shape) != 2 or not payload.dtype.is_float:
        raise InputError(f"only float matrices are quantized here, not {payload.dtype}{list(payload.shape)}")
    job = _Job(payload, scheme, clip, transpose, threads or processors(), floor)
    job.run()
    return job.result()


Region = tuple[slice, slice]


def _multiple(count: int, unit: int) -> int:
    """``count`` rounded down to a multiple of ``unit``, but for the first."""
    return max(count // unit, 1) * unit


class _Job:
    """One weight on its way. ``along`` is the axis that a group runs along, ``size`` its length; the
    ``high`` groups of a block share their parameters.

    Where a tile holds whole groups (``local``), one reading does, unless their scales share a factor (``shared``); else
    the ranges of all tiles come first (and for ``mse`` their errors).
    """

    def __init__(
        self, weight: Payload, scheme: Scheme, clip: Clip, transpose: bool, threads: int, floor: Array | None
    ) -> None:
        self.scheme, self.clip, self.transpose, self.threads = scheme, clip, transpose, threads
        self.element = weight.dtype
        rows, cols = self.shape = weight.shape[0], weight.shape[1]
        spec.scale_shape(self.shape, scheme)  # refuses an axis that is not there
        axis = 0 if scheme.axis is None else scheme.axis % 2
        self.along = {"tensor": 0, "channel": 1 - axis, "group": axis, "block": axis}[scheme.granularity]
        block = scheme.granularity == "block"
        self.size = scheme.group[-1] if scheme.group else self.shape[self.along]
        self.high = scheme.group[0] if block else 1
        self.local = bool(scheme.group) or (scheme.granularity == "channel" and self.along == 1)
        self.shared = scheme.scale is not None and scheme.scale.name == "f8e4m3"
        count = -(-self.shape[self.along] // self.size) if scheme.group else 1
        other = -(-self.shape[1 - self.along] // self.high)
        whole = (count, other) if self.along == 0 else (other, count)
        none = np.zeros((1, 1) if scheme.granularity == "tensor" else whole)
        self.scale, self.zero = affine_params(none, none, scheme, weight.dtype)
        self.zero_groups = none == 0
        self.floor = None if floor is None else floor.astype(np.float64).reshape(none.shape)
        self.reader = Reader(weight)
        self.tiles = list(tiles(self.shape, *self._steps()))
        self.integer = scheme.dtype.is_integer
        self.codes = np.empty(
            (cols, rows) if transpose else (rows, cols), scheme.dtype.storage if self.integer else np.uint8
        )
        self.sums = np.zeros((len(self.tiles), 2))
        self.bad = np.zeros(len(self.tiles), np.int64)

    def run(self) -> None:
        if self.local and not self.shared:
            self._each(self.tiles, self._local)
            self._refuse_bad()
        else:
            if self.local:
                self._shared_params()
            else:
                self._whole_params()
            self._each(self.tiles, lambda tile, buffers: self._encode(self._read(tile, buffers), tile, buffers))

    def result(self) -> RtnResult:
        shape = spec.scale_shape(self.shape, self.scheme)

        def shaped(params: Array) -> Array:
            out = params.reshape(shape)
            return np.ascontiguousarray(out.T) if self.transpose and out.ndim == 2 else out

        codes = self.codes.view(self.scheme.dtype.storage)
        return RtnResult(codes, shaped(self.scale), None if self.zero is None else shaped(self.zero), self._stats())

    def _stats(self) -> dict[str, Any]:
        total, error = self.sums.sum(axis=0)
        scales = self.scale[~self.zero_groups].astype(np.float64)
        return {
            "weights": self.shape[0] * self.shape[1],
            "sum_sq": float(total),
            "sum_sq_error": float(error),
            "groups": self.scale.size,
            "zero_groups": int(np.count_nonzero(self.zero_groups)),
            "scale_min": float(scales.min()) if scales.size else 1.0,
            "scale_max": float(scales.max()) if scales.size else 1.0,
            "all_scales_equal": self.scale.size > 1 and bool((self.scale == self.scale.flat[0]).all()),
        }

    # -- tiles -----------------------------------------------------------------------------------------------

    def _steps(self) -> tuple[int, int]:
        """Rows and columns of a tile: whole groups, or whole chunks of groups that span tiles."""
        cols = self.shape[1]
        if self.along == 0:
            unit = self.size if self.local else CHUNK
            wide = _multiple(max(1, min(cols, max(TILE // unit, COLUMNS))), self.high)
            return max(1, TILE // (unit * wide)) * unit, wide
        most = max(TILE // (max(self.size, 1) * self.high), 1) * self.size
        wide = cols if self.scheme.granularity == "channel" else min(cols, most)
        return _multiple(max(1, TILE // max(wide, 1)), self.high), max(wide, 1)

    def _params(self, tile: Tile) -> Region:
        """Where the parameters of a tile's groups are."""
        if self.scheme.granularity == "tensor":
            return slice(0, 1), slice(0, 1)
        along, other = (tile.rows, tile.cols) if self.along == 0 else (tile.cols, tile.rows)
        groups = slice(along.start // self.size, -(-along.stop // self.size))
        if self.high > 1:
            other = slice(other.start // self.high, -(-other.stop // self.high))
        return (groups, other) if self.along == 0 else (other, groups)

    def _each(self, tasks: list[Any], step: Callable[[Any, Buffers], None]) -> None:
        largest = max((t.shape[0] * t.shape[1] for t in self.tiles), default=0)
        highest = max((t.shape[0] for t in self.tiles), default=0)
        each(tasks, step, lambda: Buffers(largest, highest, self.reader.work, self.codes.dtype), self.threads)

    def _read(self, tile: Tile, buffers: Buffers) -> Array:
        return self.reader.read(tile, buffers.floats(0, tile.shape))

    def _parts(self, a: Array) -> Iterator[tuple[Array, slice]]:
        """``a[R, C]`` as ``[R, G, size]`` (``[G, size, C]``), then the short last group; each with its groups."""
        length = a.shape[self.along]
        whole = length // self.size
        cut = whole * self.size
        for start, stop, groups in ((0, cut, slice(0, whole)), (cut, length, slice(whole, whole + 1))):
            if start == stop:
                continue
            size = min(self.size, stop - start)
            if self.along == 0:
                yield a[start:stop].reshape(-1, size, a.shape[1]), groups
            else:
                yield a[:, start:stop].reshape(a.shape[0], -1, size), groups

    # -- parameters ------------------------------------------------------------------------------------------

    def _local(self, tile: Tile, buffers: Buffers) -> None:
        """Parameters and codes of a tile that holds whole groups."""
        x = self._read(tile, buffers)
        lo, hi = self._ranges(x)
        if not self._finite(x, lo, hi, tile):
            return
        where = self._params(tile)
        if self.clip == "mse":
            lo, hi = self._searched(x, lo, hi)
        self._set_params(where, lo, hi)
        self._encode(x, tile, buffers)

    def _ranges(self, x: Array) -> tuple[Floats, Floats]:
        """Minimum and maximum of each group or block of a tile of whole ones."""
        lo, hi = self._extreme(np.minimum, x), self._extreme(np.maximum, x)
        if self.high > 1:
            starts = np.arange(0, lo.shape[1 - self.along], self.high)
            lo = np.minimum.reduceat(lo, starts, axis=1 - self.along)
            hi = np.maximum.reduceat(hi, starts, axis=1 - self.along)
        return lo, hi

    def _shared_params(self) -> None:
        """Ranges of all the groups, then their parameters, whose common factor is of all of them."""
        lo, hi = np.zeros(self.scale.shape), np.zeros(self.scale.shape)

        def ranges(tile: Tile, buffers: Buffers) -> None:
            x = self._read(tile, buffers)
            where = self._params(tile)
            lo[where], hi[where] = self._ranges(x)
            self._finite(x, lo[where], hi[where], tile)

        self._each(self.tiles, ranges)
        self._refuse_bad()
        self._set_params((slice(None), slice(None)), lo, hi)

    def _whole_params(self) -> None:
        """Ranges of groups that span tiles, then (for ``mse``) their errors, then the parameters."""
        bands = self.tiles[-1].band + 1 if self.tiles else 0
        found = np.zeros((2, bands, self.shape[1]))

        def ranges(tile: Tile, buffers: Buffers) -> None:
            x = self._read(tile, buffers)
            lo, hi = self._extreme(np.minimum, x), self._extreme(np.maximum, x)
            if self._finite(x, lo, hi, tile):
                found[:, tile.band, tile.cols] = lo[0], hi[0]

        self._each(self.tiles, ranges)
        self._refuse_bad()
        whole = (0, 1) if self.scheme.granularity == "tensor" else (0,)
        lo = np.minimum.reduce(found[0], axis=whole, initial=0.0).reshape(self.scale.shape)
        hi = np.maximum.reduce(found[1], axis=whole, initial=0.0).reshape(self.scale.shape)
        if self.clip == "mse":
            factor = best_factor(self._whole_errors(lo, hi)).reshape(self.scale.shape)
            lo, hi = lo * factor, hi * factor
        self._set_params((slice(None), slice(None)), lo, hi)

    def _whole_errors(self, lo: Floats, hi: Floats) -> Floats:
        """Squared errors ``[len(FACTORS), N]`` (``[.., 1]`` per tensor); the chunks of a column are added in order."""
        errors = np.zeros((len(FACTORS), self.shape[1]))
        strips: dict[int, list[Tile]] = {}
        for tile in self.tiles:
            strips.setdefault(tile.cols.start, []).append(tile)

        def add(strip: list[Tile], buffers: Buffers) -> None:
            for tile in strip:
                x, at = self._read(tile, buffers), self._params(tile)[1]
                for start in range(0, len(x), CHUNK):
                    part = x[start : start + CHUNK]
                    errors[:, tile.cols] += shrink_errors(part, lo[0, at], hi[0, at], self.scheme, self.element)

        self._each(list(strips.values()), add)
        return errors.sum(axis=1, keepdims=True) if self.scheme.granularity == "tensor" else errors

    def _extreme(self, op: np.ufunc, x: Array) -> Floats:
        """Minimum or maximum of each group of a tile, float64, shaped as its parameters."""
        if self.along == 0:
            return np.concatenate([op.reduce(part, axis=1) for part, _ in self._parts(x)]).astype(np.float64)
        # reduceat is several times faster than a reduction of short rows, and fastest on one long row
        if x.shape[1] % self.size == 0:
            found = op.reduceat(x.reshape(-1), np.arange(0, x.size, self.size)).reshape(x.shape[0], -1)
        else:
            found = op.reduceat(x, np.arange(0, x.shape[1], self.size), axis=1)
        return np.asarray(found, np.float64)

    def _finite(self, x: Array, lo: Floats, hi: Floats, tile: Tile) -> bool:
        """False, and the count noted, when the tile holds NaN or infinity."""
        limit = self.reader.limit
        if bool((lo > -limit).all() and (hi < limit).all()):
            return True
        self.bad[tile.number] = x.size - np.count_nonzero(np.abs(x) < limit)
        return False

    def _refuse_bad(self) -> None:
        if count := int(self.bad.sum()):
            raise BadWeights(count, self.shape[0] * self.shape[1])

    def _searched(self, x: Array, lo: Floats, hi: Floats) -> tuple[Floats, Floats]:
        """The ranges that lose least, for a tile of whole groups."""
        out = np.empty_like(lo), np.empty_like(hi)
        for part, groups in self._parts(x):
            at = (groups, slice(None)) if self.along == 0 else (slice(None), groups)
            columns = np.moveaxis(part, 1 + self.along, 0)  # one group a column
            flat = np.ascontiguousarray(columns).reshape(len(columns), -1)
            found = search_range(flat, lo[at].reshape(-1), hi[at].reshape(-1), self.scheme, self.element)
            for target, values in zip(out, found, strict=True):
                target[at] = values.reshape(columns.shape[1:])
        return out

    def _set_params(self, where: Region, lo: Floats, hi: Floats) -> None:
        self.zero_groups[where] = (lo == 0) & (hi == 0)
        if self.floor is not None:
            lo, hi = raised(lo, hi, self.floor[where], self.scheme)
        self.scale[where], zero = affine_params(lo, hi, self.scheme, self.element)
        if self.zero is not None and zero is not None:
            self.zero[where] = zero

    # -- codes -----------------------------------------------------------------------------------------------

    def _encode(self, x: Array, tile: Tile, buffers: Buffers) -> None:
        """Codes of a tile whose parameters are known, and its sums. ``x``, a buffer, is overwritten."""
        where, work = self._params(tile), self.reader.work
        steps, codes = x, buffers.floats(1, tile.shape)
        scale = self.scale[where] if self.high == 1 else self._each_row(self.scale[where], tile)
        zero = None if self.zero is None else self.zero[where].astype(work)
        if zero is not None and self.high > 1:
            zero = self._each_row(zero, tile)
        self._broadcast(np.divide, x, scale.astype(work), steps)
        squares = self._squares(steps)
        if not self.integer:
            narrow = buffers.codes(tile.shape)
            encode(steps, self.scheme.dtype, codes, narrow)
            self._store(narrow, tile)
        else:
            self._integers(steps, codes, zero, tile, buffers)
        np.subtract(steps, codes, out=steps)
        weights = np.square(scale.astype(np.float64))
        self.sums[tile.number] = np.sum(squares * weights), np.sum(self._squares(steps) * weights)

    def _integers(self, steps: Array, codes: Array, zero: Array | None, tile: Tile, buffers: Buffers) -> None:
        """Integer codes of ``steps``; what they stand for, in steps, goes to ``codes``."""
        if zero is not None and self.scheme.zero == "float":
            self._broadcast(np.add, steps, zero, steps)
            zero = None
        np.rint(steps, out=codes)
        if zero is not None:
            self._broadcast(np.add, codes, zero, codes)
        np.clip(codes, self.scheme.dtype.qmin, self.scheme.dtype.qmax, out=codes)
        if self.transpose:
            narrow = buffers.codes(tile.shape)
            np.copyto(narrow, codes, casting="unsafe")
            self._store(narrow, tile)
        else:
            self._store(codes, tile)
        if zero is not None:
            self._broadcast(np.subtract, codes, zero, codes)

    def _store(self, codes: Array, tile: Tile) -> None:
        if self.transpose:
            np.copyto(self.codes[tile.cols, tile.rows], codes.T)
        else:
            np.copyto(self.codes[tile.rows, tile.cols], codes, casting="unsafe")

    def _each_row(self, params: Array, tile: Tile) -> Array:
        """Parameters of blocks, once for each row (column) of a tile."""
        out: Array = np.repeat(params, self.high, 1 - self.along)
        length = tile.shape[1 - self.along]
        return out[:, :length] if self.along == 0 else out[:length]

    def _broadcast(self, op: np.ufunc, a: Array, params: Array, out: Array) -> None:
        """``op`` of each element of a tile and the parameter of its group."""
        for (part, groups), (target, _) in zip(self._parts(a), self._parts(out), strict=True):
            op(part, params[groups, None, :] if self.along == 0 else params[:, groups, None], out=target)

    def _squares(self, steps: Array) -> Array:
        """The sum of squares in each group of a tile."""
        sum_up = "glc,glc->gc" if self.along == 0 else "rgl,rgl->rg"
        return np.concatenate([np.einsum(sum_up, part, part) for part, _ in self._parts(steps)], axis=self.along)
