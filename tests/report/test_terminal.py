"""The report as text: golden pages, and how long tables are shortened."""

import io
from contextlib import redirect_stdout
from dataclasses import replace

import pytest

from qcompiler.report.model import Report, Source
from qcompiler.report.terminal import ROWS, print_report, report_text, site_rows
from qcompiler.report.words import (
    bytes_text,
    decibel_text,
    finding_groups,
    human_bytes,
    human_seconds,
    kernel_text,
    quality_lines,
    site_groups,
)
from qcompiler.sites import Site
from qcompiler.verify.findings import Finding, Severity
from tests.report.samples import decoder, fused, rejected, skipped, small
from tests.support import Golden


@pytest.mark.parametrize(("name", "report"), [("small", small()), ("decoder", decoder()), ("rejected", rejected())])
def test_golden(golden: Golden, name: str, report: Report) -> None:
    golden(f"report/{name}.txt", report_text(report, width=110))


def test_verdict_is_the_last_line() -> None:
    assert report_text(small()).splitlines()[-1] == "verdict: accepted"
    assert report_text(rejected()).splitlines()[-1] == "verdict: rejected, 3 errors"


def test_nothing_but_a_verdict() -> None:
    assert "no site" in report_text(Report("ort-cpu", Source("onnx", "empty.onnx")))


def test_short_table_is_whole() -> None:
    sites = [fused(f"layer.{i}", 256, 256, 20.0) for i in range(ROWS)]
    assert len(site_rows(sites, "ort-cpu")) == ROWS


def test_long_table_has_a_row_a_group_and_counts_the_rest() -> None:
    sites = [fused(f"layer.{i}", 256, 256, 20.0 + i) for i in range(ROWS + 1)]
    first, rest = site_rows(sites, "ort-cpu")
    assert first[0] == "layer.0"
    assert rest[0] == f"... and {ROWS} more like it"
    assert rest[-1] == f"21.0 to {20 + ROWS}.0"
    assert rest[3] == bytes_text(ROWS * sites[0].before, ROWS * sum(sites[0].bytes.values()))


def test_every_site_is_counted_in_the_rows() -> None:
    """Rows and the numbers in the lines for the rest add up to the sites, whatever is shortened."""
    sites = [fused(f"wide.{i}", 128 * (1 + i % 40), 256, None) for i in range(200)]
    rows = site_rows(sites, "ort-cpu")
    more = [int(row[0].split()[2]) for row in rows if row[0].startswith("...")]
    assert len(rows) - len(more) + sum(more) == len(sites)


def test_what_did_not_fuse_is_never_shortened_away() -> None:
    sites = [fused(f"wide.{i}", 128 * (1 + i), 256, None) for i in range(100)]
    tiny = [skipped("tiny", 1, 1, "asked for"), Site("left", "linear", 2, 2, 16, status="unfused", reason="no kernel")]
    names = [row[0] for row in site_rows([*sites, *tiny], "ort-cpu")]
    assert {"tiny", "left"} <= set(names)


def test_sites_that_differ_in_what_runs_are_not_alike() -> None:
    a, b, c, d = (fused(n, 256, 256, None) for n in "abcd")
    b.kernel = {"decode": "ort-cpu/other", "prefill": "ort-cpu/other"}
    c.evidence = "static"
    assert [len(g) for g in site_groups([a, b, c, d])] == [2, 1, 1]


def test_findings_that_differ_in_names_and_numbers_are_alike() -> None:
    def left(op: str, n: int, fix: str = "skip it") -> Finding:
        return Finding("QC203", op, f"linear {n}x256 feeds '{op}.out'", f"needs N % 8 == 0, got {n}", fix)

    given = [left("a", 10), left("b", 20), left("c", 20, "pad it"), replace(left("d", 10), severity="warning")]
    assert [[f.op for f in g] for g in finding_groups(given)] == [["a", "b"], ["c"], ["d"]]


def test_findings_stand_in_order_of_severity() -> None:
    kinds: list[Severity] = ["info", "warning", "error"]
    given = [Finding("QC101", kind, "left", severity=kind) for kind in kinds]
    assert [g[0].op for g in finding_groups(given)] == ["error", "warning", "info"]


def test_markup_in_names_is_text() -> None:
    site = fused("block[bold]:smile:[/bold]", 256, 256, None)
    assert "block[bold]:smile:[/bold]" in report_text(Report("t", Source("onnx"), sites=(site,)))


def test_plain_output_has_no_control_codes() -> None:
    out = io.StringIO()
    with redirect_stdout(out):
        print_report(rejected())
    assert "\x1b" not in out.getvalue()
    assert "layers.0.fc" in out.getvalue()


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (5 << 40, "5.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_human_bytes(size: int, text: str) -> None:
    assert human_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0071, "7 ms"), (0.9999, "1.00 s"), (59.5, "59.50 s"), (99.999, "1 min 40 s"), (200.2, "3 min 20 s")],
)
def test_human_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(("db", "text"), [(None, "-"), (21.44, "21.4"), (-3.0, "-3.0"), (999.0, "exact")])
def test_decibel_text(db: float | None, text: str) -> None:
    assert decibel_text(db) == text


def test_kernel_text() -> None:
    assert kernel_text({}, "ort-cpu") == "-"
    assert kernel_text({"decode": "ort-cpu/A", "prefill": "ort-cpu/A"}, "ort-cpu:avx2") == "A"
    assert kernel_text({"decode": "ort-cpu/A", "prefill": "ort-cpu/B"}, "ort-cpu") == "decode: A, prefill: B"


def test_quality_names_the_worst_output() -> None:
    from qcompiler.report.model import OutputQuality, Quality

    outputs = {
        "a": OutputQuality(1.0, 40.0, 0.01),
        "b": OutputQuality(0.9, 10.0, 1.0),
        "c": OutputQuality(1.0, 50.0, 0.1),
    }
    (line,) = quality_lines(Report("t", Source("onnx"), quality=Quality("sqnr_db", outputs)))
    assert line.startswith("against the float model, worst of 3 outputs, 'b': SQNR 10.0 dB, cosine 0.900000")


@pytest.mark.parametrize("width", [60, 80, 100, 109, 110, 140])
def test_nothing_is_cut_off(width: int) -> None:
    """Cells wrap but keep their text: each word of the last column, which a table too wide would lose, is there."""
    text = report_text(decoder(), width=width)
    assert max(map(len, text.splitlines())) <= width
    words = text.split()
    for row in site_rows(decoder().sites, "ort-cpu"):
        assert set(row[-1].split()) <= set(words), row
    assert "…" not in text
