"""The HTML page: complete, self-contained, and safe against what names may hold."""

import re
from html.parser import HTMLParser

import pytest

from qcompiler.dtypes import F32
from qcompiler.ir import Graph, TensorType
from qcompiler.payload import RandomPayload
from qcompiler.report.html import page
from qcompiler.report.model import Report, Source
from tests.report.samples import decoder, fused, rejected, small

VOID = {"meta", "input", "br"}
FOREIGN = re.compile(r"""(src|href|action)\s*=|url\(|@import|https?:|fetch\(|XMLHttpRequest""", re.IGNORECASE)


class Reader(HTMLParser):
    """Checks that tags nest; collects texts, tags and the keys that columns are sorted by."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th", "button") and self.rows:
            self.rows[-1].append(data)
        self.texts.append(data)


def graph(name: str = "w") -> Graph:
    """x @ w, both f32."""
    g = Graph()
    x = g.add_input("x", TensorType(F32, ("batch", 8)))
    w = g.add_const(name, RandomPayload(1, F32, (8, 8)))
    op = g.create("onnx.MatMul", [x, w], {"note": "<i>"}, [("y", TensorType(F32, ("batch", 8)))])
    g.add_output(op.result)
    return g


@pytest.mark.parametrize("report", [small(), decoder(), rejected(), None])
@pytest.mark.parametrize("given", [graph(), None])
def test_page_is_well_formed_and_asks_for_nothing(report: Report | None, given: Graph | None) -> None:
    text = page("a model", report, given)
    assert text.startswith("<!DOCTYPE html>")
    assert not FOREIGN.search(text)
    Reader(text)


def test_page_has_every_site_and_finding() -> None:
    read = Reader(page("theirs", rejected(), graph()))
    cells = [row[0] for row in read.rows if row]
    assert [c for c in cells if c.startswith("layers.")] == ["layers.0.fc", "layers.1.fc", "layers.2.fc"]
    assert {"QC101", "QC204", "rejected", "2 more like it"} <= set(read.texts)
    assert any("onnx.MatMul(%x, %w)" in t for t in read.texts)
    assert "1 op, 1 constant of 256 B" in read.texts


def test_names_are_text_not_markup() -> None:
    evil = '</td><script>alert("x")</script>'
    report = Report("t", Source("onnx", evil), sites=(fused(evil, 256, 256, None),), notes=(evil,))
    text = page(evil, report, graph(evil))
    assert evil not in text
    assert text.count("<script>") == 1
    assert any(t == evil for t in Reader(text).texts)


def test_tied_site_is_not_drawn_twice() -> None:
    text = page("decoder", decoder())
    assert text.count('class="before"') == 4  # the table, and three shapes of linears
    assert "(tied to model.embed_tokens)" in text
