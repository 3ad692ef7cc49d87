"""The tokenizer that lies beside a model, for data given as text."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcompiler.calibrate.forms import Encode
from qcompiler.errors import InputError

INSTEAD = "give an .npz with input_ids, or package.module:function that yields input dicts"


def encoder_beside(source: Any) -> Encode:
    """What turns text into token ids for the model at ``source``: its directory, or a file in it, holds the tokenizer.

    ``tokenizer.json`` is read by the package tokenizers, ``tokenizer.model`` by sentencepiece, neither of which this
    package needs otherwise. Raises InputError that says what to give instead.
    """
    path = Path(source) if isinstance(source, str | Path) else None
    folder = None if path is None else path if path.is_dir() else path.parent if path.is_file() else None
    if folder is None:
        raise InputError(f"text needs the tokenizer of a model directory, and this source is none; {INSTEAD}")
    if (file := folder / "tokenizer.json").is_file():
        return _tokenizers(file)
    if (file := folder / "tokenizer.model").is_file():
        return _sentencepiece(file)
    raise InputError(f"text needs a tokenizer, and {folder} holds no tokenizer.json or tokenizer.model; {INSTEAD}")


def _library(name: str, file: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"reading {file} needs the package {name}: pip install {name}; or {INSTEAD}") from None


def _tokenizers(file: Path) -> Encode:
    library = _library("tokenizers", file)
    try:
        tokenizer = library.Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises bare Exception
        raise InputError(f"{file} cannot be read by the package tokenizers: {e}; {INSTEAD}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str) -> Sequence[int]:
        ids: Sequence[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _sentencepiece(file: Path) -> Encode:
    library = _library("sentencepiece", file)
    try:
        processor = library.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as e:
        raise InputError(f"{file} cannot be read by the package sentencepiece: {e}; {INSTEAD}") from None

    def encode(text: str) -> Sequence[int]:
        ids: Sequence[int] = processor.encode(text)
        return ids

    return encode
