"""Fuse the dequantize of a table into the embedding lookup that reads it, where the target has a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.canonical import canonical_operands
from qcompiler.dtypes import F32
from qcompiler.ir import Graph, Op, Value
from qcompiler.pipeline import Context, Pass
from qcompiler.rewrite import Rewriter, apply_rules, rule
from qcompiler.target import Request
from qcompiler.views import EMBEDDING_OPS, as_embedding


@rule(*sorted(EMBEDDING_OPS))
def fuse_dequant_into_embedding(op: Op, rw: Rewriter) -> Value:
    """gather(q.dequantize(c, s, z), i)  ->  q.embedding(i, c, s, z)"""
    emb = rw.view(as_embedding)
    dq = rw.expect(emb.table, "q.dequantize")
    scheme, codes, scale, zero = canonical_operands(dq, rw, n_axis=0)
    if rw.target is not None:
        asked = Request("q.embedding", scheme, emb.n, emb.k, emb.result.tensor.dtype or F32)
        rw.require(*rw.target.why_not(asked, rw.phases))
    site = op.meta.get("site", op.label)
    return rw.op("q.embedding", emb.indices, codes, scale, zero, type=emb.result.type, scheme=scheme, site=site)


@dataclass(frozen=True)
class FuseEmbedding(Pass):
    """Fuse dequantized tables into ``q.embedding`` by the target's kernel rows."""

    name: ClassVar[str] = "fuse-embedding"

    def run(self, graph: Graph, ctx: Context) -> None:
        apply_rules(graph, [fuse_dequant_into_embedding], target=ctx.target, phases=ctx.phases, log=ctx.refusals)
