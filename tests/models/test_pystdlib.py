"""The trained model: what is committed, its split, its loss against the baseline, its text."""

import numpy as np
import pytest

from qcompiler.models import pystdlib, scoring, stdlib_corpus
from qcompiler.models.decoder import Decoder


@pytest.fixture(scope="module")
def model() -> Decoder:
    return pystdlib.load()


def test_committed_files_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in pystdlib.FOLDER.iterdir()}
    assert set(sizes) == {
        "README.md",
        "config.json",
        "heldout.json",
        "model.safetensors",
        "tokenizer.json",
        "training_log.csv",
    }
    assert sum(sizes.values()) < 8_000_000


def test_loaded_model(model: Decoder) -> None:
    assert not model.training
    assert {str(p.dtype) for p in model.parameters()} == {"torch.float32"}
    assert not any(p.requires_grad for p in model.parameters())
    assert model.num_parameters() == pystdlib.record()["parameters"]
    assert model.config.vocab_size == pystdlib.tokenizer().vocab_size
    # The widths that a group size of 128 divides, so that 4-bit weights need no ragged group.
    assert model.config.hidden_size % 128 == 0
    assert model.config.intermediate_size % 128 == 0


def test_split_is_by_module_and_by_rule() -> None:
    sources = stdlib_corpus.module_sources()
    chosen = {name for name, path in sources.items() if stdlib_corpus.heldout_rule(name, path.stat().st_size)}
    assert set(stdlib_corpus.HELDOUT_MODULES) <= set(sources)
    # A later Python may add modules that the rule would pick; the list stays as it is.
    assert chosen >= {"http.client", "ssl", "socketserver"}
    assert pystdlib.record()["modules"] == list(stdlib_corpus.HELDOUT_MODULES)
    trained = stdlib_corpus.training_texts()
    assert not set(trained) & set(stdlib_corpus.HELDOUT_MODULES)
    assert {"argparse", "collections", "json.decoder"} <= set(trained)
    assert not any(part in {"test", "tests", "encodings"} for name in trained for part in name.split("."))


def test_heldout_tokens_spell_the_heldout_text() -> None:
    codec, texts = pystdlib.tokenizer(), pystdlib.heldout_text()
    stream = pystdlib.heldout_tokens()
    assert stream.dtype == np.int64
    assert (stream == codec.bos).sum() == len(texts)
    assert codec.decode(stream.tolist()) == "".join(texts.values())
    assert np.array_equal(pystdlib.heldout_tokens(100), stream[:100])


def test_loss_is_far_under_the_bigram(model: Decoder) -> None:
    """On 20 windows over all held-out modules; the recorded losses are over the whole text."""
    logits = pystdlib.torch_logits(model)
    record = pystdlib.record()["nats_per_token"]
    score = pystdlib.score(logits, limit=20)
    assert score.nats_per_token < 0.75 * record["bigram"]
    assert score.nats_per_token == pytest.approx(record["model"], rel=0.06)
    # Batches, the last one padded, change nothing but rounding.
    alone = pystdlib.perplexity(logits, limit=4, batch=1)
    assert pystdlib.perplexity(logits, limit=4, batch=3) == pytest.approx(alone, rel=1e-4)


def test_context_helps(model: Decoder) -> None:
    logits = pystdlib.torch_logits(model)
    short = pystdlib.score(logits, window=16, limit=96, batch=48)
    assert pystdlib.score(logits, limit=8).nats_per_token < short.nats_per_token - 0.2


def test_generation_is_repeatable_and_python(model: Decoder) -> None:
    logits = pystdlib.torch_logits(model)
    prompt = "class Reader:\n    def __init__(self, "
    greedy = pystdlib.generate(logits, prompt, max_tokens=24)
    assert greedy == pystdlib.generate(logits, prompt, max_tokens=24)
    assert "):" in greedy
    drawn = [pystdlib.generate(logits, prompt, max_tokens=12, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_calibration_rows_are_training_text() -> None:
    rows = pystdlib.calibration_rows(6, 64)
    assert rows.shape == (6, 64)
    assert rows.dtype == np.int64
    trained = list(stdlib_corpus.training_texts().values())
    for row in rows:
        assert any(pystdlib.tokenizer().decode(row[:-2].tolist()) in text for text in trained)
    with pytest.raises(ValueError, match="long enough"):
        pystdlib.calibration_rows(10**6)


def test_examples_fit_the_model(model: Decoder) -> None:
    _, (ids,), _ = pystdlib.example()
    assert tuple(ids.shape) == (2, 64)
    cached, (new, keys, values), _ = pystdlib.cached_example()
    assert tuple(new.shape) == (2, 1)
    assert [tuple(key.shape) for key in keys + values] == [(2, 2, 64, 32)] * 10
    logits = pystdlib.torch_logits(model)
    whole = scoring.windows(np.arange(66) % 7, 64)
    assert logits(whole[:, :-1]).shape == (1, 64, 1024)
    assert not cached.training
