"""The report as a value: its JSON form, its verdict, and what it refuses."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.checking import CheckedPass
from qcompiler.errors import InputError, StructureError
from qcompiler.report.model import (
    EXACT_DB,
    ArtifactInfo,
    OutputQuality,
    Perplexity,
    Quality,
    RecipeInfo,
    Report,
    Source,
    Timing,
)
from qcompiler.sites import Site
from qcompiler.verify.findings import CODES, Finding
from tests.report.samples import decoder, rejected, small

# The keys that the public contract names, written down once more: acceptance reads them.
TOP = "schema verdict target recipe source findings sites totals timing peak_rss_bytes"
TOTALS = "sites fused skipped unfused fused_weight_share bytes_before bytes_after metadata_bytes bits_per_weight"
SITE = "name op n k scheme status kernel evidence bytes sqnr_db reason"

texts = st.text(max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False, min_value=0, max_value=1e9)
counts = st.integers(0, 1 << 40)
any_floats = st.none() | st.floats()
sites = st.builds(
    Site,
    name=texts,
    op=st.sampled_from(["linear", "embedding", "conv"]),
    n=counts,
    k=counts,
    before=counts,
    scheme=texts,
    status=st.sampled_from(["fused", "skipped", "unfused"]),
    reason=st.none() | texts,
    kernel=st.dictionaries(texts, texts, max_size=2),
    evidence=st.sampled_from(["static", "measured"]),
    bytes=st.dictionaries(st.sampled_from(["codes", "scales", "zeros", "sums"]), counts),
    sqnr_db=any_floats,
    tied_to=st.none() | texts,
)
findings = st.builds(
    Finding,
    code=st.sampled_from(sorted(CODES)),
    op=texts,
    message=texts,
    reason=texts,
    fix=texts,
    severity=st.sampled_from(["error", "warning", "info"]),
)
qualities = st.builds(
    Quality,
    metric=texts,
    outputs=st.dictionaries(texts, st.builds(OutputQuality, any_floats, any_floats, any_floats), max_size=2),
    perplexity=st.none() | st.builds(Perplexity, numbers, numbers),
)
checks = st.builds(
    CheckedPass,
    number=counts,
    name=texts,
    kind=st.sampled_from(["exact", "lossy", "layout"]),
    samples=counts,
    compared=counts,
    error=numbers,
    bound=numbers,
    drift=st.none() | numbers,
    seconds=numbers,
    note=texts,
)
reports = st.builds(
    Report,
    target=texts,
    source=st.builds(Source, texts, texts, texts),
    recipe=st.builds(RecipeInfo, texts, texts, texts),
    findings=st.lists(findings, max_size=3),
    sites=st.lists(sites, max_size=4, unique_by=lambda s: s.name),
    timing=st.builds(Timing, numbers, st.dictionaries(texts, numbers, max_size=2), numbers, numbers),
    peak_rss_bytes=counts,
    phases=st.dictionaries(texts, st.integers(1, 4096), max_size=2),
    quality=st.none() | qualities,
    artifact=st.none() | st.builds(ArtifactInfo, texts, counts, st.lists(texts, max_size=2).map(tuple)),
    versions=st.dictionaries(texts, texts, max_size=2),
    notes=st.lists(texts, max_size=2),
    checks=st.lists(checks, max_size=2),
)


@given(reports)
def test_json_round_trip(report: Report) -> None:
    assert Report.from_json(json.loads(report.text())) == report


def test_strategy_covers_every_field() -> None:
    """A field that the round trip above does not vary could be lost without anybody noticing."""
    drawn = {"target", "source", "recipe", "findings", "sites", "timing", "peak_rss_bytes", "phases"}
    assert {f.name for f in fields(Report)} == drawn | {"quality", "artifact", "versions", "notes", "checks"}


@pytest.mark.parametrize("report", [small(), decoder(), rejected()])
def test_keys_of_the_contract(report: Report) -> None:
    data = report.to_json()
    assert list(data)[: len(TOP.split())] == TOP.split()
    assert list(data["totals"]) == TOTALS.split()
    assert set(data["recipe"]) == {"name", "text", "hash"}
    assert set(data["source"]) == {"kind", "path", "sha256"}
    assert set(data["timing"]) == {"capture_s", "passes_s", "emit_s", "evidence_s"}
    for site in data["sites"]:
        assert set(site) - {"tied_to"} == set(SITE.split())
        assert set(site["bytes"]) == {"codes", "scales", "zeros", "before"}
    for finding in data["findings"]:
        assert set(finding) == {"code", "severity", "op", "message", "reason", "fix"}


def test_file_round_trip(tmp_path: Path) -> None:
    path = small().save(tmp_path / "out.onnx.report.json")
    assert Report.load(path) == small()
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx.report.json"]


def test_verdict_follows_sites_and_findings() -> None:
    source = Source("onnx")
    warning = Finding("QC304", "x", "equal scales", severity="warning")
    left = Site("a", "linear", 1, 1, 4, status="unfused", reason="no kernel")
    assert Report("t", source, findings=(warning,)).accepted
    assert not Report("t", source, findings=(Finding("QC101", "x", "left"),)).accepted
    assert Report("t", source, sites=(left,)).verdict == "rejected"


def test_pending_site_is_refused() -> None:
    with pytest.raises(StructureError, match="'a' ended neither"):
        Report("t", Source("onnx"), sites=(Site("a", "linear", 1, 1, 4),))


def test_later_changes_of_a_site_do_not_reach_the_report() -> None:
    site = Site("a", "linear", 2, 2, 16, status="fused", bytes={"codes": 2}, weight=object())
    report = Report("t", Source("onnx"), sites=(site,))
    site.status, site.bytes["codes"] = "unfused", 99
    assert report.accepted
    assert report.sites[0].bytes == {"codes": 2, "scales": 0, "zeros": 0}
    assert report.sites[0].weight is None


def test_numbers_that_json_lacks() -> None:
    exact = Site("a", "linear", np.int64(2), np.int64(3), np.int64(24), status="skipped", sqnr_db=math.inf)  # type: ignore[arg-type]
    quality = Quality("cosine", {"y": OutputQuality(math.nan, -math.inf, math.inf)})
    data = json.loads(Report("t", Source("onnx"), sites=(exact,), quality=quality).text())
    assert data["sites"][0]["sqnr_db"] == EXACT_DB
    assert data["sites"][0]["n"] == 2
    assert data["quality"]["outputs"]["y"] == {"cosine": None, "sqnr_db": -EXACT_DB, "max_abs": None}


def _without(key: str) -> dict[str, Any]:
    data = small().to_json()
    del data[key]
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "not a report of schema 1"),
        ({"schema": 2}, "its schema is 2"),
        (_without("sites"), "key 'sites' is missing"),
        (small().to_json() | {"sites": [{"name": "a"}]}, "key 'status' is missing"),
        (small().to_json() | {"sites": 3}, "damaged"),
        (small().to_json() | {"findings": [{"code": "QC101", "severity": "fatal"}]}, "one of error, warning, info"),
    ],
)
def test_what_is_no_report(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Report.from_json(data)


def test_keys_of_a_later_version_are_left_out() -> None:
    data = small().to_json()
    data["colour"] = "blue"
    data["sites"][0]["colour"] = data["source"]["colour"] = "blue"
    assert Report.from_json(data) == small()


@pytest.mark.parametrize(("text", "message"), [(None, "there is no report"), ("{", "is no report")])
def test_what_is_no_report_file(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        Report.load(path)
