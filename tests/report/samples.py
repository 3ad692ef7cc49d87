"""Reports to test with: a small accepted one, a large one, and a rejected one."""

from qcompiler.report.model import (
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
from qcompiler.verify.findings import Finding

MATMUL = "ort-cpu/MatMulNBits.int8"
GATHER = "ort-cpu/GatherBlockQuantized"


def fused(name: str, n: int, k: int, sqnr_db: float | None, op: str = "linear") -> Site:
    """A site of int4 groups of 128 with zero points, in float before: 4 bits a weight, f32 scales, packed zeros."""
    groups = n * k // 128
    kernel = dict.fromkeys(("decode", "prefill"), MATMUL if op == "linear" else GATHER)
    sizes = {"codes": n * k // 2, "scales": 4 * groups, "zeros": groups // 2}
    return Site(name, op, n, k, 4 * n * k, "int4 g128 asym", "fused", None, kernel, "measured", sizes, sqnr_db)


def skipped(name: str, n: int, k: int, reason: str) -> Site:
    return Site(name, "linear", n, k, 4 * n * k, "", "skipped", reason)


def small() -> Report:
    """Two linears fused, the head skipped."""
    return Report(
        target="ort-cpu",
        source=Source("onnx", "model.onnx", "ab" * 32),
        recipe=RecipeInfo("w4a16", "insert-qdq weights='int4 g128 asym'; fuse-linear", "12cd"),
        sites=(
            fused("block.up", 512, 256, 20.25),
            fused("block.down", 256, 512, 21.5),
            skipped("head", 100, 256, "asked for by --skip 'head'"),
        ),
        timing=Timing(0.25, {"insert-qdq": 0.5, "fuse-linear": 1.0}, 0.125, 2.0),
        peak_rss_bytes=3 << 30,
        phases={"decode": 1, "prefill": 512},
        quality=Quality("sqnr_db", {"logits": OutputQuality(0.999875, 24.5, 0.0625)}, Perplexity(12.5, 12.75)),
        artifact=ArtifactInfo("out.onnx", 1 << 20, ("out.onnx", "out.onnx.data")),
        versions={"qcompiler": "0.1.0", "onnxruntime": "1.31.1"},
        notes=("layout int4 blocks are stored along K",),
    )


def decoder(layers: int = 8) -> Report:
    """A decoder: seven linears a layer, an embedding tied to the head."""
    sites = [fused("model.embed_tokens", 32000, 512, 22.0, "embedding")]
    for i in range(layers):
        attn, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        sites += [fused(f"{attn}.{p}_proj", 512, 512, 20.0 + i / 4) for p in "qkvo"]
        sites += [fused(f"{mlp}.{p}_proj", 1024, 512, 21.0 + i / 4) for p in ("gate", "up")]
        sites += [fused(f"{mlp}.down_proj", 512, 1024, 19.0 + i / 4)]
    head = fused("lm_head", 32000, 512, 22.0)
    head.tied_to = "model.embed_tokens"
    return Report("ort-cpu", Source("hf", "decoder"), RecipeInfo("w4a16", "...", "12cd"), (), (*sites, head))


def rejected() -> Report:
    """Someone else's graph: three dequantizes that feed float ops, and a float zero point."""
    reason = "the runtime expands the weight to float at every call"
    sites: list[Site] = []
    findings: list[Finding] = []
    for i in range(3):
        name = f"layers.{i}.fc"
        sizes = {"codes": 32768, "scales": 2048}
        why = "a dequantize feeds onnx.Gemm"
        sites.append(Site(name, "linear", 256, 256, 262144, "int4 g128 sym", "unfused", why, {}, "measured", sizes))
        message = f"'{name}' is dequantized into onnx.Gemm"
        findings.append(Finding("QC101", name, message, reason, "emit MatMulNBits instead"))
    findings.append(Finding("QC204", "layers.3.fc", "zero points are float", "", "use 'sym'", "warning"))
    return Report("ort-cpu", Source("onnx", "theirs.onnx", "cd" * 32), findings=tuple(findings), sites=tuple(sites))
