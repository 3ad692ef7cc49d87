"""The training script on a library of three small modules."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qcompiler.models import stdlib_corpus, train_pystdlib
from qcompiler.models.decoder import Decoder, DecoderConfig
from qcompiler.models.train_pystdlib import Corpus

CODE = (
    "def add(left, right):\n    return left + right\n\n\nclass Adder:\n    def run(self):\n        return add(1, 2)\n"
)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    for name in ("one.py", "pack/__init__.py", "pack/two.py", "ssl.py", "test/skipped.py", "encodings/cp1.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(CODE * 12)
    (root / "empty.py").write_text("\n")
    return root


@pytest.fixture
def corpus(library: Path) -> Corpus:
    return train_pystdlib.gather(280, library)


def test_modules_are_named_and_split(library: Path) -> None:
    assert list(stdlib_corpus.module_sources(library)) == ["empty", "one", "pack", "pack.two", "ssl"]
    assert list(stdlib_corpus.training_texts(library)) == ["one", "pack", "pack.two"]
    assert list(stdlib_corpus.heldout_texts(library)) == ["ssl"]


def test_gathered_streams(corpus: Corpus) -> None:
    assert len(corpus.training) == 3
    assert corpus.training_bytes == 3 * corpus.heldout_bytes == 36 * len(CODE)
    assert corpus.heldout[0] == corpus.tokenizer.bos
    assert corpus.token_bytes[corpus.heldout].sum() == corpus.heldout_bytes


def test_training_lowers_the_loss_and_writes_results(corpus: Corpus, tmp_path: Path) -> None:
    config = DecoderConfig(280, 32, 64, 1, 2, 1, max_positions=32, tie_embeddings=True)
    flags = "--steps 60 --every 20 --batch 8 --window 16 --warmup 5 --eval-windows 8 --rate 1e-2 --full-precision"
    options = train_pystdlib._options(["--out", str(tmp_path), *flags.split()])
    model = train_pystdlib.train(config, corpus, options)
    with (tmp_path / "training_log.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [int(row["step"]) for row in rows] == [20, 40, 60]
    assert float(rows[-1]["heldout_loss"]) < 0.5 * np.log(280)
    stored = load_file(tmp_path / "model.safetensors")
    assert {str(value.dtype) for value in stored.values()} == {"torch.float16"}
    assert "head.weight" not in stored
    again = Decoder(config)
    again.load_state_dict({**stored, "head.weight": stored["embedding.weight"]})
    ids = torch.arange(16)[None]
    # Weights rounded to float16 (11 bits) move logits of order ten by about a hundredth.
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=0.05)
