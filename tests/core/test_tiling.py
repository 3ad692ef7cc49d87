"""Tiles of a matrix: each element once, wide copies exact, the first error ends the work."""

import numpy as np
import pytest

from qcompiler import tiling


def test_every_f16_is_widened_exactly() -> None:
    raw = np.arange(65536, dtype=np.uint16).view(np.float16)
    out = np.empty(65536, np.float32)
    tiling.widen_f16(raw, out)
    finite = np.isfinite(raw)
    assert out[finite].tobytes() == raw[finite].astype(np.float32).tobytes()
    assert (np.abs(out[~finite]) >= 65536).all()


@pytest.mark.parametrize(("shape", "high", "wide"), [((7, 9), 3, 4), ((6, 8), 3, 4), ((1, 1), 5, 5), ((0, 4), 1, 1)])
def test_tiles_cover_a_matrix_once(shape: tuple[int, int], high: int, wide: int) -> None:
    seen = np.zeros(shape, int)
    found = list(tiling.tiles(shape, high, wide))
    for i, tile in enumerate(found):
        assert tile.number == i
        assert tile.band == tile.rows.start // high
        assert tile.shape == seen[tile.rows, tile.cols].shape
        seen[tile.rows, tile.cols] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_error_ends_the_work(threads: int) -> None:
    done: list[int] = []

    def step(task: int, buffers: tiling.Buffers) -> None:
        if task == 5:
            raise ValueError("task 5")
        done.append(task)

    buffers = tiling.Buffers(1, 1, np.dtype(np.float32), np.dtype(np.int8))
    with pytest.raises(ValueError, match="task 5"):
        tiling.each(range(100_000), step, lambda: buffers, threads)
    assert len(done) < 100_000 - 1
