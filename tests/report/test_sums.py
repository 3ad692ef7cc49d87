"""The sums of a report, against figures counted by hand."""

import pytest

from qcompiler.report.sums import totals
from qcompiler.sites import Site
from tests.report.samples import decoder, fused, rejected, skipped


def test_no_sites() -> None:
    t = totals([])
    assert (t.sites, t.fused_weight_share, t.bytes_before, t.bits_per_weight) == (0, 0.0, 0, None)


def test_counted_by_hand() -> None:
    """int4 with f32 scales and packed 4-bit zeros in groups of 128: (4*128 + 32 + 4) / 128 bits a weight."""
    t = totals([fused("a", 256, 256, None), skipped("b", 256, 768, "too small")])
    assert (t.sites, t.fused, t.skipped, t.unfused) == (2, 1, 1, 0)
    assert t.bits_per_weight == 548 / 128
    assert t.fused_weight_share == 0.25
    assert t.bytes_before == 4 * 256 * 1024
    assert t.bytes_after == 256 * 256 * 548 // 128 // 8 + 4 * 256 * 768
    assert t.metadata_bytes == 512 * 4 + 512 // 2


@pytest.mark.parametrize("repeated", [True, False], ids=["tied site repeats the bytes", "tied site has none"])
def test_tied_storage_counts_once(repeated: bool) -> None:
    table = fused("table", 1024, 256, None, "embedding")
    head = fused("head", 1024, 256, None)
    head.tied_to = "table"
    if not repeated:
        head.before, head.bytes = 0, {}
    alone, both = totals([table]), totals([table, head])
    assert (both.sites, both.fused) == (2, 2)
    assert both.bytes_before == alone.bytes_before
    assert both.bytes_after == alone.bytes_after
    assert both.metadata_bytes == alone.metadata_bytes
    assert both.bits_per_weight == alone.bits_per_weight


def test_tied_weight_is_fused_only_when_every_site_is() -> None:
    table, head = fused("table", 1024, 256, None, "embedding"), skipped("head", 1024, 256, "asked for")
    head.tied_to = "table"
    t = totals([table, head])
    assert (t.fused, t.skipped) == (1, 1)
    assert t.fused_weight_share == 0.0
    assert t.bits_per_weight is None


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_ties_through_others_and_in_a_ring(order: tuple[int, ...]) -> None:
    chain = [fused(n, 128, 128, None) for n in "abc"]
    chain[1].tied_to, chain[2].tied_to = "a", "b"
    assert totals([chain[i] for i in order]).bytes_before == 4 * 128 * 128
    chain[0].tied_to = "c"
    assert totals([chain[i] for i in order]).bytes_before == 4 * 128 * 128


def test_tie_to_a_site_that_is_not_there() -> None:
    pair = [fused(n, 128, 128, None) for n in "ab"]
    pair[0].tied_to = pair[1].tied_to = "gone"
    assert totals(pair).bytes_before == 4 * 128 * 128


def test_unfused_codes_are_stored_but_not_fused() -> None:
    t = totals(rejected().sites)
    assert (t.unfused, t.fused_weight_share, t.bits_per_weight) == (3, 0.0, None)
    assert t.bytes_after == 3 * (32768 + 2048)
    assert t.metadata_bytes == 3 * 2048


def test_whole_decoder() -> None:
    """8 layers of 4*512*512 + 3*1024*512 weights and a table of 32000*512, which the head shares."""
    t = totals(decoder().sites)
    assert t.sites == 58
    assert t.fused_weight_share == 1.0
    assert t.bytes_before == 4 * (8 * (4 * 512 * 512 + 3 * 1024 * 512) + 32000 * 512)


def test_no_weights_at_all_is_no_division() -> None:
    t = totals([Site("empty", "linear", 0, 0, 0, status="fused")])
    assert (t.fused_weight_share, t.bits_per_weight) == (0.0, None)
