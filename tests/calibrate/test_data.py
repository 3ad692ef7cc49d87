"""Data in every form, as batches of what a graph takes; and the sentence that each mistake gets."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qcompiler.calibrate import batching
from qcompiler.calibrate.data import open_data
from qcompiler.calibrate.tokens import encoder_beside
from qcompiler.errors import InputError
from qcompiler.ir import Graph
from qcompiler.reader import parse
from tests.support import require_data


def graph(*inputs: str) -> Graph:
    """A graph with inputs such as ``x : f32[n, 3]``."""
    lines = "".join(f"  input %{text}\n" for text in inputs)
    return parse(f"graph @g dialect=onnx {{\n{lines}  return\n}}\n")


def walk(given: object, *inputs: str) -> list[dict[str, np.ndarray]]:
    return list(open_data(given).batches(graph(*inputs).inputs))


def shapes(batches: list[dict[str, np.ndarray]]) -> list[tuple[int, ...]]:
    return [b["x"].shape for b in batches]


def saved(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


X = np.arange(20 * 6, dtype=np.float32).reshape(20, 6)


# -- forms -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_several_inputs(save: Callable[..., None], tmp_path: Path) -> None:
    ids = np.arange(20)
    save(tmp_path / "d.npz", x=X, ids=ids)
    found = walk(tmp_path / "d.npz", "x : f32[b, 6]", "ids : int64[b]")
    assert [b["x"].shape for b in found] == [(16, 6), (4, 6)]
    np.testing.assert_array_equal(np.concatenate([b["x"] for b in found]), X)
    np.testing.assert_array_equal(np.concatenate([b["ids"] for b in found]), ids)


def test_npz_is_read_a_slice_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first sample is there before the second one is read."""
    import zipfile

    path = saved(tmp_path / "d.npz", x=np.zeros((64, 1 << 16), np.float32))
    total = 0
    real = zipfile.ZipExtFile.read

    def counted(self: zipfile.ZipExtFile, n: int | None = -1) -> bytes:
        nonlocal total
        got = real(self, n)
        total += len(got)
        return got

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
    batches = open_data(path).batches(graph("x : f32[1, 65536]").inputs)
    next(batches)
    assert total < 3 << 18


def test_npy_is_the_only_input(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", X)
    assert shapes(walk(tmp_path / "d.npy", "x : f32[b, 6]")) == [(16, 6), (4, 6)]
    with pytest.raises(InputError, match=r"one input; these are x f32\[b, 6\], m f32\[b\]"):
        walk(tmp_path / "d.npy", "x : f32[b, 6]", "m : f32[b]")


def test_jsonl(tmp_path: Path) -> None:
    lines = [json.dumps({"x": [[1, 2.5, 3]], "ids": [7]}), "", json.dumps({"x": [[4, 5, 6]], "ids": [8]})]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    found = walk(tmp_path / "d.jsonl", "x : f32[1, 3]", "ids : int64[1]")
    assert [b["x"].tolist() for b in found] == [[[1.0, 2.5, 3.0]], [[4.0, 5.0, 6.0]]]
    assert found[0]["x"].dtype == np.float32
    assert found[0]["ids"].dtype == np.int64


def rows() -> list[dict[str, np.ndarray]]:
    return [{"x": row} for row in X]


def generated():  # type: ignore[no-untyped-def]
    yield from rows()


GIVEN: dict[str, object] = {
    "a list of dicts": rows(),
    "a dict of arrays": {"x": X},
    "a generator": generated(),
    "a function that yields": generated,
    "a function that returns a list": rows,
    "a function that returns arrays": lambda: {"x": X},
    "package.module:function": "calibration_module:rows",
}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import numpy as np\n\ndef rows():\n    X = np.arange(120, dtype=np.float32).reshape(20, 6)\n"
    code += "    return ({'x': r} for r in X)\n\ndef broken():\n    yield {'x': 1}\n    raise KeyError('boom')\nN = 3\n"
    (tmp_path / "calibration_module.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "calibration_module", raising=False)


@pytest.mark.usefixtures("module")
def test_every_form_gives_the_same_again_and_again() -> None:
    digests = set()
    for name, given in GIVEN.items():
        data = open_data(generated() if name == "a generator" else given)
        digests.add(data.digest())
        for _ in range(2):
            found = list(data.batches(graph("x : f32[b, 6]").inputs))
            np.testing.assert_array_equal(np.concatenate([b["x"] for b in found]), X, err_msg=name)
            assert data.count == len(found) == 2
    assert len(digests) == 1
    assert open_data({"x": X + 1}).digest() not in digests


def test_files_have_digests_of_their_bytes(tmp_path: Path) -> None:
    first = open_data(saved(tmp_path / "a.npz", x=X)).digest()
    assert open_data(saved(tmp_path / "b.npz", x=X + 1)).digest() != first


def test_torch_tensors_are_arrays() -> None:
    import torch

    (batch,) = walk([{"x": torch.ones(2, 3)}], "x : f32[2, 3]")
    assert batch["x"].shape == (2, 3)


# -- text --------------------------------------------------------------------------------------------------------


def test_text_beside_a_tokenizer(tmp_path: Path) -> None:
    model = require_data("lm/stories260K/hf/tokenizer.json").parent
    (tmp_path / "t.txt").write_text("Once upon a time there was a little cat. " * 200)
    data = open_data(tmp_path / "t.txt", encode=lambda: encoder_beside(model), windows=3)
    found = list(
        data.batches(
            graph("input_ids : int64[1, 32]", "attention_mask : int64[1, 32]", "position_ids : int64[1, s]").inputs
        )
    )
    assert len(found) == 3
    for batch in found:
        assert batch["input_ids"].shape == (1, 32)
        assert batch["attention_mask"].tolist() == [[1] * 32]
        assert batch["position_ids"].tolist() == [list(range(32))]
    assert len({b["input_ids"].tobytes() for b in found}) > 1
    (long,) = open_data(tmp_path / "t.txt", encode=lambda: encoder_beside(model), windows=1).batches(
        graph("input_ids : int64[b, s]").inputs
    )
    assert long["input_ids"].shape == (1, 256)
    with pytest.raises(InputError, match="past does not follow from text"):
        list(data.batches(graph("input_ids : int64[b, s]", "past : f32[b, 4]").inputs))
    with pytest.raises(InputError, match="takes input_ids"):
        list(data.batches(graph("x : f32[b, s]").inputs))


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("text")
    (tmp_path / "m.onnx").write_bytes(b"")
    for source, words in (
        (tmp_path, "holds no tokenizer.json or tokenizer.model"),
        (tmp_path / "m.onnx", "holds no tokenizer.json"),
        ("package.module:function", "this source is none"),
        (object(), "this source is none"),
    ):
        with pytest.raises(InputError, match=words) as error:
            open_data(tmp_path / "t.txt", encode=lambda s=source: encoder_beside(s))
        assert "give an .npz with input_ids" in str(error.value)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json cannot be read"):
        encoder_beside(tmp_path)


# -- batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [False, True], ids=["without batch axis", "with batch axis"])
def test_the_batch_follows_the_model(axis: bool) -> None:
    samples = [{"x": row[None] if axis else row} for row in X]
    assert shapes(walk(samples, "x : f32[1, 6]")) == [(1, 6)] * 20
    assert shapes(walk(samples, "x : f32[4, 6]")) == [(4, 6)] * 5
    assert shapes(walk(samples, "x : f32[n, 6]")) == [(16, 6), (4, 6)]
    assert shapes(walk(samples, "x : f32[?, 6]")) == [(16, 6), (4, 6)]


def test_columns_may_hold_whole_inputs() -> None:
    """An array with one axis more than the input has a whole input for each sample."""
    assert shapes(walk({"x": X.reshape(10, 2, 6)}, "x : f32[n, 6]")) == [(16, 6), (4, 6)]
    assert shapes(walk({"x": X.reshape(10, 2, 6)}, "x : f32[2, 6]")) == [(2, 6)] * 10


def test_a_big_sample_is_cut_for_a_fixed_batch() -> None:
    assert shapes(walk([{"x": X}], "x : f32[5, 6]")) == [(5, 6)] * 4


def test_batches_are_bounded_in_bytes() -> None:
    wide = np.zeros((6, batching.BATCH_BYTES // 4 // 2), np.float32)
    assert [s[0] for s in shapes(walk({"x": wide}, "x : f32[n, k]"))] == [2, 2, 2]


@pytest.mark.parametrize(
    "inputs",
    [
        ("x : f32[n, 6]", "h : f32[2, 6]"),  # the second has no batch axis
        ("x : f32[n, 6]", "h : f32[m, 6]"),  # two open sizes
        ("x : f32[?, 6]", "h : f32[?, 6]"),  # nobody says that they are one
        ("x : f32[n, 6]", "h : f32[n, n]"),  # the open size is another axis too
    ],
)
def test_samples_stay_apart_where_they_cannot_be_joined(inputs: tuple[str, ...]) -> None:
    h = np.zeros((1, 1) if "n, n" in inputs[1] else (2, 6) if "[2" in inputs[1] else (1, 6), np.float32)
    samples = [{"x": row[None], "h": h} for row in X[:3]]
    assert shapes(walk(samples, *inputs)) == [(1, 6)] * 3


def test_lengths_that_differ_stay_apart() -> None:
    samples = [{"x": np.zeros((1, k), np.float32)} for k in (3, 3, 4, 4, 3)]
    assert shapes(walk(samples, "x : f32[n, k]")) == [(2, 3), (2, 4), (1, 3)]


def test_scalars_and_unknown_shapes() -> None:
    found = walk({"x": X, "t": np.arange(20.0, dtype=np.float32)}, "x : f32[*]", "t : f32[]")
    assert shapes(found) == [(1, 6)] * 20
    assert found[3]["t"].shape == ()


def test_inputs_with_a_default_may_be_left_out() -> None:
    g = parse("graph @g dialect=onnx {\n  input %x : f32[n, 6]\n  input %w : f32[2] = dense(1.0, 2.0)\n  return\n}\n")
    assert [sorted(b) for b in open_data({"x": X}).batches(g.inputs)] == [["x"], ["x"]]


@pytest.mark.parametrize(
    ("data", "element", "wanted"),
    [
        (np.ones((2, 3)), "f32", np.float32),
        (np.ones((2, 3), np.float32), "f16", np.float16),
        (np.ones((2, 3), np.int32), "int64", np.int64),
        (np.ones((2, 3), np.uint8), "int8", np.int8),
        ([[1, 2, 3]], "f32", np.float32),
        ([[True, False]], "bool", np.bool_),
    ],
)
def test_element_types_that_lose_nothing_are_cast(data: object, element: str, wanted: type) -> None:
    for batch in walk([{"x": data}], f"x : {element}[n, k]"):
        assert batch["x"].dtype == wanted


# -- mistakes ----------------------------------------------------------------------------------------------------

F = "x : f32[n, 6]"
MISTAKES: dict[str, tuple[object, tuple[str, ...], str]] = {
    "a missing name": ({"y": X}, (F,), r"has no x and has y, which .*; the inputs are x f32\[n, 6\]"),
    "a missing input": ([{"x": X}], (F, "m : f32[n]"), r"sample 1 has no m; the inputs are x f32\[n, 6\], m f32\[n\]"),
    "floats for integers": ([{"x": X[0]}], ("x : int64[n, 6]",), "is int64, the data holds f32; convert it"),
    "bytes for floats": ([{"x": X.astype(np.uint8)}], (F,), "is f32, the data holds uint8"),
    "integers too big": ([{"x": np.array([300])}], ("x : int8[n]",), "is int8, the data holds int64"),
    "another width": ([{"x": X[0]}, {"x": X[:, :5]}], (F,), r"sample 2: input x .*\[n, 6\].*\[20, 5\]: axis 1 differs"),
    "another rank": ([{"x": X[None, None]}], (F,), "of another rank"),
    "sizes that disagree": ([{"x": X, "m": X[:3, 0]}], (F, "m : f32[n]"), r"n = 3 on axis 0, and input x has n = 20"),
    "a remainder": ({"x": X}, ("x : f32[8, 6]",), "takes 8 samples at a time, and 4 are left"),
    "lengths that disagree": ({"x": X, "m": X[:3, 0]}, (F, "m : f32[n]"), "x has 20, m has 3"),
    "a number for an array": ({"x": np.float32(1)}, (F,), "is a single number"),
    "no samples at all": (7, (F,), "gave a int"),
    "text": (["hello"], (F,), "an input dict is wanted, not a str"),
    "ragged rows": ([{"x": [[1], [1, 2]]}], (F,), "is no array"),
    "objects": ([{"x": np.array([None, 1])}], (F,), "its rows differ in length|is no array"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name: str) -> None:
    given, inputs, words = MISTAKES[name]
    with pytest.raises(InputError, match=words) as error:
        walk(given, *inputs)
    assert "\n" not in str(error.value)


def test_a_function_that_fails(module: None) -> None:
    with pytest.raises(InputError, match="calibration_module:broken failed: KeyError: 'boom'"):
        walk("calibration_module:broken", "x : f32[]")
    for text, words in (
        ("calibration_module:absent", "has no function absent"),
        ("calibration_module:N", "has no function N"),
        ("no_such_module_here:f", "there is no module no_such_module_here"),
    ):
        with pytest.raises(InputError, match=words):
            open_data(text)


def test_files_that_are_no_data(tmp_path: Path) -> None:
    def write(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    good = saved(tmp_path / "good.npz", x=X).read_bytes()
    cases = [
        (tmp_path / "absent.npz", "there is no file .*; data is an .npz, .npy"),
        (write("d.csv", b"1,2"), "no data in a known form"),
        (write("d.npz", b"no archive"), "no .npz file, or a damaged one"),
        (write("cut.npz", good[: len(good) // 2]), "no .npz file, or a damaged one"),
        (write("d.npy", b"no array"), "cannot be read as an array"),
        (write("d.jsonl", b'{"x": [1, 2, 3, 4, 5, 6]}\n{"x"'), "line 2: no JSON"),
        (write("l.jsonl", b"[1, 2]"), "line 1: an object of inputs is wanted, not a list"),
        (write("b.jsonl", b"\xff\xfe"), "cannot be read"),
        (saved(tmp_path / "f.npz", x=np.asfortranarray(X)), "is in Fortran order"),
        (saved(tmp_path / "o.npz", x=np.array([{}, 1])), "holds Python objects"),
    ]
    for path, words in cases:
        with pytest.raises(InputError, match=words) as error:
            walk(path, F)
        assert re.search(r"^[^\n]+$", str(error.value))


def test_a_truncated_member_is_told(tmp_path: Path) -> None:
    import io
    import zipfile

    buffer = io.BytesIO()
    np.save(buffer, X)
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", buffer.getvalue()[:-100])
    with pytest.raises(InputError, match="ends before its 20 samples do"):
        walk(tmp_path / "d.npz", F)
