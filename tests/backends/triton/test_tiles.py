"""Tables of tiles: read and written, the nearest entry, the right table, the cache on disk before the shipped one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qcompiler.backends.triton import tiles
from qcompiler.backends.triton.architectures import architecture
from qcompiler.backends.triton.tiles import Entry, Tile, cached, read_table, shipped, tile_for, write_table
from qcompiler.errors import InputError

SMALL, LARGE = Tile(16, 64, 128, 4, 1), Tile(128, 128, 128, 8, 3)


@pytest.fixture(autouse=True)
def forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own for each test, read anew."""
    monkeypatch.setenv(tiles.ENVIRONMENT, str(tmp_path))
    cached.cache_clear()
    yield
    cached.cache_clear()


def test_a_table_is_read_as_it_was_written() -> None:
    table = {"a": (Entry(1, 64, 128, SMALL), Entry(64, 64, 128, LARGE)), "b": ()}
    assert read_table(write_table(table, "by hand")) == table


@pytest.mark.parametrize(
    "text", ["", "[]", '{"kernels": {"a": [{"m": 1}]}}', '{"kernels": {"a": [{"tile": {"x": 1}}]}}']
)
def test_a_damaged_table_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="a table of tiles cannot be read"):
        read_table(text)


def test_the_entry_of_the_next_m_and_the_nearest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = tuple(Entry(m, n, 1024, Tile(m, n, 128)) for m in (1, 16) for n in (1024, 8192))
    monkeypatch.setattr(tiles, "shipped", lambda sm: {"a": entries})
    assert tile_for("a", 90, 1, 1000, 1024) == Tile(1, 1024, 128)
    assert tile_for("a", 90, 2, 4096, 4096) == Tile(16, 8192, 128)
    assert tile_for("a", 90, 400, 16, 16) == Tile(16, 1024, 128)
    with pytest.raises(InputError, match="knows the kernel 'b'"):
        tile_for("b", 90, 1, 1, 1)


def test_what_was_tuned_here_comes_first_for_just_that_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "shipped", lambda sm: {"a": (Entry(16, 64, 128, SMALL),)})
    path = tiles.cache_path(90)
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_text(write_table({"a": (Entry(16, 512, 256, LARGE),)}, "tuned"))
    assert tile_for("a", 90, 3, 512, 256) == LARGE
    assert tile_for("a", 90, 3, 512, 512) == SMALL
    monkeypatch.setenv(tiles.ENVIRONMENT, "off")
    cached.cache_clear()
    assert tile_for("a", 90, 3, 512, 256) == SMALL


@pytest.mark.parametrize(("sm", "same"), [(80, 80), (86, 89), (89, 89), (90, 90), (100, 100), (120, 89)])
def test_a_chip_takes_tiles_that_fit_its_shared_memory(sm: int, same: int) -> None:
    assert shipped(sm) == shipped(same)
    assert architecture(same).shared <= architecture(sm).shared
    assert shipped(sm)
