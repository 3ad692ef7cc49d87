"""The trained decoder that ships with the package: a small language model of Python source code.

It was trained by :mod:`qcompiler.models.train_pystdlib` on the standard library's own sources, all but ten
held-out modules. The weights are in ``pystdlib/`` beside this file; the texts come from the running Python.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import nn

from qcompiler.models import scoring, stdlib_corpus
from qcompiler.models.builders import Example
from qcompiler.models.builders import cached_example as _cached_example
from qcompiler.models.builders import decoder_example as _decoder_example
from qcompiler.models.decoder import Decoder, DecoderConfig
from qcompiler.models.scoring import LogitsFn, Score
from qcompiler.models.tokenizer import Tokenizer

__all__ = [
    "FOLDER",
    "WINDOW",
    "cached_example",
    "calibration_rows",
    "example",
    "generate",
    "heldout_text",
    "heldout_tokens",
    "load",
    "perplexity",
    "record",
    "score",
    "tokenizer",
    "torch_logits",
]

FOLDER = Path(__file__).resolve().parent / "pystdlib"
"""Where the weights, configuration, tokenizer and training record are."""

WINDOW = 256
"""The number of tokens the model was trained on at a time."""

_EXAMPLE_TEXT = '''def read_lines(path, encoding="utf-8"):
    """Return the lines of the file at *path* without their line ends."""
    with open(path, encoding=encoding) as file:
        return [line.rstrip("\\n") for line in file]
'''


def load() -> Decoder:
    """Return the trained decoder: eval mode, float32 (stored as float16), no gradients."""
    config = DecoderConfig.from_dict(json.loads((FOLDER / "config.json").read_text(encoding="utf-8")))
    with torch.random.fork_rng(devices=[]):
        model = Decoder(config)
    state = {name: value.float() for name, value in load_file(FOLDER / "model.safetensors").items()}
    if config.tie_embeddings:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


@cache
def tokenizer() -> Tokenizer:
    """Return the model's tokenizer."""
    return Tokenizer.load(FOLDER / "tokenizer.json")


def record() -> dict[str, Any]:
    """Return the training record: sizes, and the held-out losses of the model and of the bigram baseline."""
    values: dict[str, Any] = json.loads((FOLDER / "heldout.json").read_text(encoding="utf-8"))
    return values


def heldout_text() -> dict[str, str]:
    """Return the held-out modules' sources by name, as the running Python has them."""
    return stdlib_corpus.heldout_texts()


@cache
def _heldout_stream() -> scoring.IdArray:
    """Tokenize the held-out modules once, each after a start mark: int64 ``[N]``."""
    codec = tokenizer()
    ids = [value for text in heldout_text().values() for value in (codec.bos, *codec.encode(text))]
    return np.array(ids, dtype=np.int64)


def heldout_tokens(limit: int | None = None) -> scoring.IdArray:
    """Return the held-out modules as one stream int64 ``[N]``, each module after a start mark.

    ``limit`` keeps the first tokens only.
    """
    return _heldout_stream()[:limit].copy()


def calibration_rows(count: int = 16, window: int = WINDOW) -> scoring.IdArray:
    """Return ``count`` rows int64 ``[count, window]`` of training text, for calibrating a quantized model.

    The rows come from modules spread over the training list, one row a module; held-out text is never used.
    """
    codec = tokenizer()
    texts = [text for text in stdlib_corpus.training_texts().values() if len(text) > 8 * window]
    if count > len(texts):
        raise ValueError(f"count is {count}, but only {len(texts)} training modules are long enough")
    rows = []
    for index in np.linspace(0, len(texts) - 1, count).round().astype(int):
        middle = texts[index][len(texts[index]) // 2 - 4 * window :]
        rows.append(codec.encode(middle[: 8 * window])[:window])
    return np.array(rows, dtype=np.int64)


def _token_bytes() -> npt.NDArray[np.int64]:
    """Byte length of each token, int64 ``[V]``; 0 for the start mark."""
    codec = tokenizer()
    return np.array([len(codec.decode_bytes([value])) for value in range(codec.vocab_size)], dtype=np.int64)


def score(logits_fn: LogitsFn, *, limit: int | None = None, window: int = WINDOW, batch: int = 8) -> Score:
    """Score a model on the held-out modules, cut into windows of ``window`` tokens.

    ``logits_fn`` maps token ids int64 ``[batch, window]`` to logits ``[batch, window, V]``; a PyTorch module
    (see :func:`torch_logits`) and an ONNX Runtime session serve alike. ``limit`` bounds the number of windows,
    then spread evenly over the text. The whole text is about 400 windows.
    """
    rows = scoring.windows(_heldout_stream(), window, limit)
    return scoring.score_windows(logits_fn, rows, _token_bytes(), batch)


def perplexity(logits_fn: LogitsFn, *, limit: int | None = None, window: int = WINDOW, batch: int = 8) -> float:
    """Return the per-token perplexity on the held-out modules; arguments as :func:`score`."""
    return score(logits_fn, limit=limit, window=window, batch=batch).perplexity


def torch_logits(module: nn.Module) -> LogitsFn:
    """Wrap a module of ids to logits as the numpy callable that :func:`score` and :func:`generate` take."""

    def call(ids: scoring.IdArray) -> npt.NDArray[np.floating]:
        with torch.inference_mode():
            logits: npt.NDArray[np.floating] = module(torch.from_numpy(ids)).float().numpy()
        return logits

    return call


def generate(
    logits_fn: LogitsFn,
    prompt: str = "",
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
) -> str:
    """Continue ``prompt`` and return the new text.

    A temperature of 0 is greedy; otherwise tokens are drawn with ``seed``, from the ``top_k`` likeliest when
    that is given. ``logits_fn`` sees ids int64 ``[1, S]``, ``S`` up to :data:`WINDOW`, and is called once a
    token. The text ends early where the model starts a new document.
    """
    codec = tokenizer()
    ids = scoring.sample(
        logits_fn,
        [codec.bos, *codec.encode(prompt)],
        max_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        window=WINDOW,
        stop=codec.bos,
    )
    return codec.decode(ids)


def _example_ids(batch: int, length: int) -> torch.Tensor:
    """Repeat a snippet of code to fill int64 ``[batch, length]`` ids."""
    ids = tokenizer().encode(_EXAMPLE_TEXT)
    needed = batch * length
    return torch.tensor((ids * (needed // len(ids) + 1))[:needed]).reshape(batch, length)


def example() -> Example:
    """Return ``(module, example_args, dynamic_shapes)``: the decoder and int64 ``[2, 64]`` ids, both dynamic."""
    return _decoder_example(load(), _example_ids(2, 64))


def cached_example() -> Example:
    """Return the cache form with one new token after 64; batch and cache length are dynamic."""
    return _cached_example(load(), _example_ids(2, 65), past=64)
