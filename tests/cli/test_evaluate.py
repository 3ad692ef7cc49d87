"""Evaluation in Python: which metrics apply, that they are what they say, labels, sites, streaming, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import qcompiler
from qcompiler.errors import InputError
from qcompiler.evaluating import Evaluation, evaluate
from tests import realmodels
from tests.backends.onnx.build import f32, model_of
from tests.support import require_data

Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def digits() -> tuple[Path, Arrays]:
    path = require_data("mnist/mnist-8.onnx", "mnist/t10k-images-idx3-ubyte.gz")
    images, labels = realmodels._digits()
    return path, {"Input3": images[1000:1200].astype(np.float32), "label": labels[1000:1200]}


@pytest.fixture(scope="module")
def digits_w8(digits: tuple[Path, Arrays], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("digits") / "w8.onnx"
    qcompiler.compile(digits[0], recipe="w8a16", out=out)
    return out


def sessions(*paths: Path) -> list[Any]:
    import onnxruntime as ort

    return [ort.InferenceSession(str(p), providers=["CPUExecutionProvider"]) for p in paths]


def test_digits(digits: tuple[Path, Arrays], digits_w8: Path, tmp_path: Path) -> None:
    """Every figure against the same formula over all outputs at once."""
    reference, arrays = digits
    np.savez(tmp_path / "d.npz", **arrays)
    found = evaluate(digits_w8, reference, tmp_path / "d.npz", per_site=True)
    want, got = (
        np.concatenate([s.run(None, {"Input3": x[None]})[0] for x in arrays["Input3"]]).astype(np.float64)
        for s in sessions(reference, digits_w8)
    )
    figures = found.outputs["Plus214_Output_0"]
    cosines = (want * got).sum(1) / np.linalg.norm(want, axis=1) / np.linalg.norm(got, axis=1)
    assert found.samples == 200
    assert figures.cosine == pytest.approx(cosines.mean())
    assert figures.least_cosine == pytest.approx(cosines.min())
    assert figures.sqnr_db == pytest.approx(10 * np.log10((want**2).sum() / ((want - got) ** 2).sum()))
    assert figures.max_abs == np.abs(want - got).max()
    assert found.top1 is not None and found.kl is not None
    assert found.top1.agreement == np.mean(want.argmax(1) == got.argmax(1))
    accuracy = [np.mean(x.argmax(1) == arrays["label"]) for x in (want, got)]
    assert [found.top1.reference_accuracy, found.top1.accuracy] == accuracy
    assert found.top1.labelled == 200
    assert found.kl.of == "logits"
    assert set(found.left_out) == {"ppl"}
    assert "no token ids" in found.left_out["ppl"]
    assert [(s.op, s.tensor) for s in found.sites] == [
        ("Conv", "Convolution28_Output_0"),
        ("Conv", "Convolution110_Output_0"),
        ("MatMulNBits", "Plus214_Output_0"),
    ]
    # The convolutions are float in both; the runtime itself is asked for them, so nothing differs.
    assert [s.sqnr_db for s in found.sites[:2]] == [999.0, 999.0]
    assert found.sites[2].sqnr_db == pytest.approx(figures.sqnr_db, abs=0.1)  # that tensor is the output


def test_a_model_is_itself(digits: tuple[Path, Arrays]) -> None:
    reference, arrays = digits
    found = evaluate(reference, reference, arrays, limit=20)
    assert found.samples == 20
    assert found.outputs["Plus214_Output_0"].sqnr_db == 999.0
    assert found.outputs["Plus214_Output_0"].max_abs == 0
    assert found.top1 is not None and found.top1.agreement == 1
    assert found.top1.accuracy == found.top1.reference_accuracy == np.mean(
        [sessions(reference)[0].run(None, {"Input3": x[None]})[0].argmax() == y
         for x, y in zip(arrays["Input3"][:20], arrays["label"][:20], strict=True)]
    )  # fmt: skip
    assert found.kl is not None and found.kl.mean_nats == found.kl.largest_nats == 0
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["schema"] == 1


@pytest.mark.parametrize(
    ("metrics", "outputs", "keys"),
    [
        (["cosine"], (True, False), set()),
        (["sqnr"], (False, True), set()),
        (["top1"], None, {"top1"}),
        (["kl", "sqnr"], (False, True), {"kl"}),
    ],
)
def test_only_what_is_asked_for(
    digits: tuple[Path, Arrays], metrics: list[str], outputs: tuple[bool, bool] | None, keys: set[str]
) -> None:
    reference, arrays = digits
    found = evaluate(reference, reference, arrays, metrics=metrics, limit=2).to_json()
    assert {"top1", "kl", "perplexity"} & set(found) == keys
    assert found["left_out"] == {}
    figures = [(o["cosine"] is not None, o["sqnr_db"] is not None) for o in found["outputs"].values()]
    assert figures == ([outputs] if outputs else [])


def test_labels_in_every_form(digits: tuple[Path, Arrays], tmp_path: Path) -> None:
    reference, arrays = digits
    x, y = arrays["Input3"][:4], arrays["label"][:4]
    np.savez(tmp_path / "d.npz", Input3=x, labels=y)
    rows = [{"Input3": a.tolist(), "label": int(b)} for a, b in zip(x, y, strict=True)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    forms: list[Any] = [
        {"Input3": x, "label": y},
        [{"Input3": a, "labels": b} for a, b in zip(x, y, strict=True)],
        [{"Input3": a[None], "labels": np.array([b])} for a, b in zip(x, y, strict=True)],
        tmp_path / "d.npz",
        tmp_path / "d.jsonl",
    ]
    found = [evaluate(reference, reference, form).top1 for form in forms]
    assert found[0] is not None and found[0].labelled == 4
    assert all(f == found[0] for f in found)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (np.full(3, 10), "label 10 is none of the 10 classes"),
        (np.full(3, 0.5), "labels are float64; they must be whole numbers"),
        (np.zeros((3, 2), np.int64), "label"),
    ],
)
def test_bad_labels(digits: tuple[Path, Arrays], label: Any, said: str) -> None:
    reference, arrays = digits
    with pytest.raises(InputError, match=said):
        evaluate(reference, reference, {"Input3": arrays["Input3"][:3], "label": label})


# -- language models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The trained model of this repository, float and in eight bits."""
    folder = tmp_path_factory.mktemp("language")
    reference = realmodels.model("pystdlib").fetch(folder)
    qcompiler.compile(reference, recipe="w8a16", out=folder / "w8.onnx")
    return reference, folder / "w8.onnx"


def windows(count: int) -> Any:
    from qcompiler.models import pystdlib, scoring

    return scoring.windows(pystdlib.heldout_tokens(), 255, limit=count)


def test_perplexity_is_that_of_the_scoring(language: tuple[Path, Path]) -> None:
    """Rows of 256 tokens: the same targets as windows of 255 and one more."""
    from qcompiler.models import pystdlib, scoring

    rows = windows(6)
    ones = np.ones(pystdlib.tokenizer().vocab_size, np.int64)  # every target counts
    found = evaluate(language[1], language[0], {"input_ids": rows})
    expected = [
        scoring.score_windows(lambda ids, s=s: s.run(None, {"input_ids": ids})[0], rows, ones)
        for s in sessions(*language)
    ]
    assert found.perplexity is not None and found.top1 is not None and found.kl is not None
    assert found.left_out == {}
    assert found.perplexity.tokens == expected[0].tokens == 6 * 255
    # The runtime sums in another order for another number of rows; logits are float32.
    assert found.perplexity.reference == pytest.approx(expected[0].perplexity, rel=1e-4)
    assert found.perplexity.compiled == pytest.approx(expected[1].perplexity, rel=1e-3)
    assert found.perplexity.reference != found.perplexity.compiled
    assert (found.top1.rows, found.top1.accuracy, found.kl.rows) == (6 * 256, None, 6 * 256)
    assert 0 < (found.kl.mean_nats or 0) < 0.05


def test_labels_of_tokens_are_targets(language: tuple[Path, Path]) -> None:
    """Labels one a token, shifted as the ids are; negative ones do not count."""
    rows = windows(2)
    labels = rows.copy()
    labels[:, :200] = -100
    found = evaluate(language[0], language[0], {"input_ids": rows, "labels": labels})
    whole = evaluate(language[0], language[0], {"input_ids": rows[:, 199:], "labels": rows[:, 199:]})
    assert found.perplexity is not None and found.top1 is not None and whole.top1 is not None
    assert found.perplexity.tokens == found.top1.labelled == 2 * 56
    assert (found.top1.rows, whole.top1.labelled) == (2 * 256, 2 * 56)
    (session,) = sessions(language[0])
    logits = session.run(None, {"input_ids": rows})[0]
    right = logits[:, 199:-1].argmax(-1) == rows[:, 200:]
    assert found.top1.accuracy == right.mean()


@pytest.mark.slow
def test_text_with_the_tokenizer_of_the_source(tmp_path: Path) -> None:
    """A directory as the reference, text as data."""
    folder = require_data("lm/stories260K/hf", "text/tinystories-sample.txt")
    text = require_data("text/tinystories-sample.txt")
    reference = realmodels.model("stories260K").fetch(tmp_path)
    found = evaluate(reference, folder, text, metrics=["ppl"], limit=8)
    assert found.samples == 8
    assert found.perplexity is not None and found.perplexity.tokens == 8 * 255
    # Its own card says 4.5 in windows that begin with a mark; these do not.
    assert 4.0 < (found.perplexity.reference or 0) < 5.0
    assert found.perplexity.reference == pytest.approx(found.perplexity.compiled)


def test_a_model_that_sees_the_next_token_has_no_perplexity() -> None:
    reference = require_data("onnx/bert_toy_optimized.onnx")
    feeds = realmodels.model("bert-toy").held(4)
    found = evaluate(reference, reference, feeds)
    assert "earlier logits change with the last token" in found.left_out["ppl"]
    assert found.top1 is not None and found.top1.output == "prediction_scores"
    with pytest.raises(InputError, match=r"--metric ppl does not apply: earlier logits change"):
        evaluate(reference, reference, feeds, metrics=["ppl"])
    other = evaluate(reference, reference, feeds, output="seq_relationship_score")
    assert other.top1 is not None and (other.top1.output, other.top1.rows) == ("seq_relationship_score", 4)


# -- small models ----------------------------------------------------------------------------------------------------


def saved(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def product(path: Path, *, scale: float = 1.0, name: str = "x", out: str = "y", softmax: bool = False) -> Path:
    """y = scale * x W, with a softmax behind it where asked."""
    w = scale * np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    nodes = [helper.make_node("MatMul", [name, "w"], ["m" if softmax else out], "fc")]
    nodes += [helper.make_node("Softmax", ["m"], [out], axis=-1)] if softmax else []
    tensor = onnx.numpy_helper.from_array(w, "w")
    return saved(model_of(nodes, [f32(name, "batch", 4)], [f32(out, "batch", 3)], [tensor]), path)


X = np.random.default_rng(1).standard_normal((50, 4)).astype(np.float32)


def test_probabilities_are_taken_as_they_are(tmp_path: Path) -> None:
    """The divergence of probabilities is that of the logits they were made of."""
    logits = [product(tmp_path / f"l{s}.onnx", scale=s) for s in (1.0, 0.8)]
    shares = [product(tmp_path / f"p{s}.onnx", scale=s, softmax=True) for s in (1.0, 0.8)]
    a, b = evaluate(logits[1], logits[0], {"x": X}).kl, evaluate(shares[1], shares[0], {"x": X}).kl
    assert a is not None and b is not None
    assert (a.of, b.of, a.rows) == ("logits", "probabilities", 50)
    assert b.mean_nats == pytest.approx(a.mean_nats, rel=1e-4)


def test_other_names_are_matched_by_place(tmp_path: Path) -> None:
    found = evaluate(product(tmp_path / "b.onnx", name="in", out="out"), product(tmp_path / "a.onnx"), {"x": X})
    assert found.outputs["y"].sqnr_db == 999.0
    assert found.notes[:2] == ("inputs are matched by place: x = in", "outputs are matched by place: y = out")


def test_samples_may_differ_in_length(tmp_path: Path) -> None:
    """Figures by sample, whatever its shape; what is kept is sums alone."""
    node = helper.make_node("Sin", ["x"], ["y"])
    a = saved(model_of([node], [f32("x", "batch", "length")], [f32("y", "batch", "length")]), tmp_path / "a.onnx")
    found = evaluate(a, a, ({"x": np.ones((1, n), np.float32)} for n in range(2, 9)))
    assert found.samples == 7


def test_samples_are_streamed(tmp_path: Path) -> None:
    """The data is walked as it is used, and not beyond the limit."""
    path, drawn = product(tmp_path / "a.onnx"), []

    def data() -> Iterator[Arrays]:
        for i in range(10_000):
            drawn.append(i)
            yield {"x": X[i % 50][None]}

    assert evaluate(path, path, data, limit=100).samples == 100
    assert len(drawn) < 200


def test_figures_that_do_not_exist(tmp_path: Path) -> None:
    node = helper.make_node("Log", ["x"], ["y"])
    path = saved(model_of([node], [f32("x", "batch", 4)], [f32("y", "batch", 4)]), tmp_path / "a.onnx")
    found = evaluate(path, path, {"x": -np.ones((2, 4), np.float32)})
    assert found.outputs["y"].cosine is None
    assert "output y holds NaN or infinity, so figures of it do not exist" in found.notes
    json.dumps(found.to_json(), allow_nan=False)


def test_outputs_that_are_no_floats_are_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Sin", ["x"], ["y"])]
    outputs = [helper.make_tensor_value_info("s", onnx.TensorProto.INT64, [2]), f32("y", "batch", 4)]
    path = saved(model_of(nodes, [f32("x", "batch", 4)], outputs), tmp_path / "a.onnx")
    assert "outputs that are no floats are not compared: s" in evaluate(path, path, {"x": X}).notes


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a, wide = product(tmp_path / "a.onnx"), tmp_path / "wide.onnx"
    node = helper.make_node("Sin", ["x"], ["y"])
    saved(model_of([node], [f32("x", "batch", 4)], [f32("y", "batch", 4)]), wide)
    two = [helper.make_node("Add", ["x", "z"], ["y"])]
    saved(model_of(two, [f32("x", "batch", 4), f32("z", "batch", 4)], [f32("y", "batch", 4)]), tmp_path / "two.onnx")
    (tmp_path / "a.pt2").write_bytes(b"x")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    cases: list[tuple[tuple[Any, Any, Any], dict[str, Any], str]] = [
        ((wide, a, {"x": X}), {}, r"output y has shape \[\d+, 3\] in a.onnx and \[\d+, 4\] in wide.onnx"),
        ((tmp_path / "two.onnx", a, {"x": X}), {}, "a.onnx and two.onnx have different inputs"),
        ((tmp_path / "gone.onnx", a, {"x": X}), {}, "there is no file"),
        ((a, tmp_path / "gone.onnx", {"x": X}), {}, "there is no file"),
        ((tmp_path / "a.pt2", a, {"x": X}), {}, "a.onnx is an ONNX model, and torch targets take torch models"),
        ((tmp_path / "bad.onnx", a, {"x": X}), {}, "not a readable ONNX model"),
        ((a, a, {"z": X}), {}, "has no x and has z, which the model does not take; the inputs are x f32"),
        ((a, a, {"x": X[:0]}), {}, "holds no sample"),
        ((a, a, {"x": X}), {"metrics": ["bleu"]}, "no metric 'bleu'; there are ppl, kl, cosine, sqnr, top1"),
        ((a, a, {"x": X}), {"metrics": ["ppl"]}, "--metric ppl does not apply: the model takes no token ids"),
        ((a, a, {"x": X}), {"output": "z"}, "there is no float output 'z'; there are y"),
    ]
    for given, options, said in cases:
        with pytest.raises(InputError, match=said):
            evaluate(*given, **options)


def test_artifacts_and_the_public_name(tmp_path: Path) -> None:
    reference = product(tmp_path / "a.onnx")
    artifact = qcompiler.compile(reference, recipe="w8a16", settings={"insert-qdq.weights": "int8 channel sym"})
    found = qcompiler.evaluate(artifact, reference, {"x": X})
    assert isinstance(found, Evaluation)
    assert 20 < (found.outputs["y"].sqnr_db or 0) <= 999
