"""Hugging Face's generate over a compiled model: the same tokens, two compilations, memory given back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import qcompiler
from qcompiler.report.model import Report

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only wait for each other's threads
    yield
    torch.set_num_threads(threads)
    torch.compiler.reset()


def llama(*, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokens(model: Any, length: int, count: int, cache: str | None) -> Any:
    prompt = torch.arange(length)[None] % 96
    mode = {} if cache is None else {"cache_implementation": cache}
    with torch.no_grad():
        return model.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0, **mode)


@pytest.mark.parametrize("cache", [None, "static"])
def test_64_tokens_take_two_compilations(cache: str | None) -> None:
    """A cache that grows and one that does not; dynamo is left to decide which sizes are open."""
    model, reports = llama(), list[Report]()
    options = {"recipe": "w8a16", "inner": "eager", "report": reports, "release_weights": cache is None}
    model.forward = torch.compile(model.forward, backend="qcompiler", options=options)
    out = tokens(model, 7, 64, cache)
    assert out.shape == (1, 71)
    assert len(reports) == 2
    assert {s.status for r in reports for s in r.sites} == {"fused"}
    assert torch.equal(tokens(model, 7, 64, cache), out)
    assert len(reports) == 2


def test_both_roads_emit_the_same_tokens() -> None:
    """Ahead of time the model has no cache and reads the whole sequence for each token."""
    model, reports = llama(tied=True), list[Report]()
    ids = torch.arange(7)[None] % 96
    n = torch.export.Dim("n", min=2, max=64)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.inner(input_ids=ids, use_cache=False).logits
            return out

    artifact = qcompiler.compile(
        Logits().eval(), args=(ids,), dynamic_shapes=({1: n},), target="torch-cpu", recipe="w8a16"
    )
    ahead = ids
    for _ in range(8):
        ahead = torch.cat([ahead, torch.as_tensor(artifact(ahead)[0])[:, -1:].argmax(-1)], dim=1)
    model.compile(backend="qcompiler", options={"recipe": "w8a16", "inner": "eager", "report": reports})
    assert torch.equal(tokens(model, 7, 8, None), ahead)
    names = {s.name.removeprefix("inner."): s.kernel for s in artifact.report.sites}
    assert {s.name: s.kernel for s in reports[0].sites} == names


def test_another_prompt_costs_at_most_one_more_compilation() -> None:
    model, reports = llama(), list[Report]()
    options = {"recipe": "w8a16", "inner": "eager", "report": reports}
    model.forward = torch.compile(model.forward, backend="qcompiler", options=options)
    tokens(model, 7, 3, None)
    tokens(model, 11, 3, None)
    tokens(model, 13, 3, None)
    assert len(reports) == 3
