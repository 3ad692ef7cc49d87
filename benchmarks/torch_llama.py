"""A llama with a static key/value cache, run by one process for each variant; the parent gives the turns.

``python benchmarks/torch_llama.py VARIANT JSON`` builds the model, answers ``{"ready": ...}`` when it has run once at
both sizes, and then one line of JSON for each line of input: ``decode COUNT`` (seconds of COUNT tokens, one after the
other), ``prefill`` (seconds of one prompt), ``memory``.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qcompiler.backends.onnx.stopwatch import rest


def status(field: str) -> int:
    """Bytes that the system counts for this process: ``VmRSS`` now, ``VmHWM`` the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


@dataclass(frozen=True)
class Size:
    """Sizes of the model, of the prompt, and of the cache; decoding walks from the prompt's end to the cache's."""

    layers: int = 22
    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 32000
    prompt: int = 128
    cache: int = 264


TINY = Size(2, 64, 128, 4, 2, 96, 8, 24)


def build(size: Size, dtype: Any) -> Any:
    """The model in eval mode, weights random, made in ``dtype`` from the start so that memory is only its own."""
    import torch
    from torch import Tensor, nn

    from qcompiler.models.decoder import Decoder, DecoderConfig

    class StaticLlama(nn.Module):
        """Logits ``[1, 1, V]`` of the last of ``ids [1, S]`` at ``position [S]``; the cache is written in place."""

        def __init__(self) -> None:
            super().__init__()
            self.decoder = Decoder(
                DecoderConfig(
                    size.vocab,
                    size.hidden,
                    size.intermediate,
                    size.layers,
                    size.heads,
                    size.kv_heads,
                    size.cache,
                )
            )
            for i in range(size.layers):
                for name in ("keys", "values"):
                    zeros = torch.zeros(1, size.kv_heads, size.cache, size.hidden // size.heads)
                    self.register_buffer(f"{name}{i}", zeros, persistent=False)

        def forward(self, ids: Tensor, position: Tensor) -> Tensor:
            decoder = self.decoder
            cos, sin = decoder.rope_cos[position], decoder.rope_sin[position]
            mask = torch.arange(size.cache)[None, :] <= position[:, None]
            x = decoder.embedding(ids)
            for i, layer in enumerate(decoder.layers):
                q, k, v = layer.attention.project(layer.attention_norm(x), cos, sin)
                keys, values = getattr(self, f"keys{i}"), getattr(self, f"values{i}")
                keys.index_copy_(2, position, k)
                values.index_copy_(2, position, v)
                x = x + layer.attention.attend(q, keys, values, mask)
                x = x + layer.feed_forward(layer.feed_forward_norm(x))
            logits: Tensor = decoder.head(decoder.norm(x[:, -1:]))
            return logits

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = StaticLlama()
    finally:
        torch.set_default_dtype(before)
    return model.to(dtype).eval().requires_grad_(False)


def linear_weights(size: Size) -> int:
    """Weights of the linear layers: what one token reads."""
    kv = size.hidden * size.kv_heads // size.heads
    layer = 2 * size.hidden * size.hidden + 2 * size.hidden * kv + 3 * size.hidden * size.intermediate
    return size.layers * layer + size.vocab * size.hidden


class Serving:
    """One variant of the model, warm at both sizes."""

    def __init__(self, variant: Any, size: Size, logits: str) -> None:
        import torch
        from torch_variants import released

        self.torch, self.size, self.variant = torch, size, variant
        self.baseline = status("VmRSS")
        begin = time.perf_counter()
        model = build(size, variant.dtype)
        self.weights = sum(p.numel() for p in model.parameters())
        built = time.perf_counter()
        self.model = variant.made(model)
        del model
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, size.vocab, (1, size.cache), generator=generator)
        self.at = size.prompt
        with torch.no_grad(), variant.patched():
            found = self.prompt()
            self.step(size.prompt)
        compiled = time.perf_counter()
        if logits:
            torch.save(found.float(), logits)
        del found
        for _ in range(2):
            self.prefill()
            self.decode(2)
        released()
        self.told = {
            "build_s": round(built - begin, 2),
            "compile_s": round(compiled - built, 2),
            "weights": self.weights,
            "baseline_bytes": self.baseline,
        }

    def prompt(self) -> Any:
        n = self.size.prompt
        return self.model(self.ids[:, :n], self.torch.arange(n))

    def step(self, at: int) -> Any:
        return self.model(self.ids[:, at : at + 1], self.torch.tensor([at]))

    def decode(self, count: int) -> list[float]:
        out = []
        with self.torch.no_grad():
            for _ in range(count):
                begin = time.perf_counter()
                self.step(self.at)
                out.append(time.perf_counter() - begin)
                self.at = self.at + 1 if self.at + 1 < self.size.cache else self.size.prompt
        return out

    def prefill(self) -> list[float]:
        with self.torch.no_grad():
            begin = time.perf_counter()
            self.prompt()
            return [time.perf_counter() - begin]

    def memory(self) -> dict[str, int]:
        return {"resident_bytes": status("VmRSS"), "peak_bytes": status("VmHWM")}

    def answer(self, line: str) -> dict[str, Any]:
        word, _, count = line.strip().partition(" ")
        gc.collect()
        gc.disable()
        try:
            if word == "decode":
                return {"seconds": self.decode(int(count))}
            return {"seconds": self.prefill()} if word == "prefill" else self.memory()
        finally:
            gc.enable()
            rest()  # threads go on spinning after a run; the next process has the processor for itself


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what torch prints must not mix with the answers
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    given = json.loads(sys.argv[2])
    import torch
    from torch_variants import by_name

    import qcompiler  # noqa: F401  # part of every baseline, so that all of them are alike

    torch.set_num_threads(given["threads"])
    try:
        serving = Serving(by_name(sys.argv[1]), Size(**given["size"]), given["logits"])
        ready: dict[str, Any] = {"ready": serving.told | serving.memory()}
    except Exception as e:  # whatever a variant cannot do is a line of the table
        ready = {"failed": f"{type(e).__name__}: {e}"[:400]}
    answers.write(json.dumps(ready) + "\n")
    answers.flush()
    if "failed" in ready:
        return
    for line in sys.stdin:
        answers.write(json.dumps(serving.answer(line)) + "\n")
        answers.flush()


def job(size: Size, threads: int, logits: str) -> str:
    """The second argument of the process."""
    return json.dumps({"size": asdict(size), "threads": threads, "logits": logits})


if __name__ == "__main__":
    main()
