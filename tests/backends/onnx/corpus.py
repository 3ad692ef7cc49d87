"""Every ONNX model within reach, and what it computes: for tests that a model survives capture and emission."""

import ctypes
import functools
import math
import os

os.environ.setdefault("ALLOW_RELEASED_ONNX_OPSET_ONLY", "0")  # onnx's own tests are of the opset to come
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime as ort

from qcompiler.backends.onnx.emit import MAX_IR

ort.set_default_logger_severity(4)
KINDS = ("node", "simple", "light", "pytorch-converted", "pytorch-operator")
"""The kinds of onnx.backend.test whose models come with the package; "real" has to be downloaded."""
MAX_OPSET = 27
"""The newest opset of which ONNX Runtime 1.31 knows the operators."""
SIZES = (2, 1, 4, 8, 16, 3, 64, 512)
"""What unknown dimensions become; a model that runs with none of these counts as not run."""
MOST_ELEMENTS = 1 << 23
CHANGING = {"dummy_whisper_with_sequence_input_ids.onnx"}
"""ORT 1.31 computes one of several results from these, by what the memory held before."""

Source = Path | onnx.ModelProto


@dataclass(frozen=True)
class Case:
    """A model and, where its origin gives them, inputs by position."""

    name: str
    source: Source
    data: tuple[Any, ...] | None = field(default=None, repr=False)


def backend_cases(kind: str) -> Iterator[Case]:
    """The models of onnx.backend.test of one kind, with their first set of inputs."""
    import onnx.backend.test.loader as loader

    if kind == "light":  # files, not folders with data
        yield from file_cases(Path(loader.DATA_DIR) / kind)
        return
    for test in loader.load_model_tests(kind=kind):
        if test.model is not None:
            yield Case(
                f"{kind}/{test.name}", _loadable(test.model), tuple(test.data_sets[0][0]) if test.data_sets else None
            )
        elif test.model_dir is not None:
            folder = Path(test.model_dir)
            data = folder / "test_data_set_0"
            count = len(list(data.glob("input_*.pb")))
            model = folder / "model.onnx"
            yield Case(f"{kind}/{test.name}", model, _read_inputs(model, data, count) if count else None)


def _loadable(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` with the newest opset and IR version that ORT knows; operators rarely change in one opset."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.ir_version = min(model.ir_version, MAX_IR)
    for entry in copy.opset_import:
        if not entry.domain:
            entry.version = min(entry.version, MAX_OPSET)
    return copy


def _read_inputs(model: Path, folder: Path, count: int) -> tuple[Any, ...] | None:
    proto = onnx.load(model)
    held = {t.name for t in proto.graph.initializer}
    types = [i.type for i in proto.graph.input if i.name not in held]
    out: list[Any] = []
    for i in range(count):
        data = (folder / f"input_{i}.pb").read_bytes()
        kind = types[i].WhichOneof("value") if i < len(types) else "tensor_type"
        if kind == "tensor_type":
            out.append(onnx.numpy_helper.to_array(onnx.TensorProto.FromString(data)))
        elif kind == "sequence_type":
            out.append(onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(data)))
        else:
            return None
    return tuple(out)


def file_cases(folder: Path) -> Iterator[Case]:
    """Every .onnx file under ``folder``."""
    for path in sorted(folder.rglob("*.onnx")):
        yield Case(path.relative_to(folder).as_posix(), path)


# -- running ---------------------------------------------------------------------------------------------------


def session(source: Source) -> ort.InferenceSession:
    """An ORT session that changes nothing about the graph and runs on one thread."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    model = source.SerializeToString() if isinstance(source, onnx.ModelProto) else os.fspath(source)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


_NUMPY = {
    "float": np.float32,
    "double": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "bool": np.bool_,
    **{k: np.dtype(k).type for k in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
}


def random_feeds(sess: ort.InferenceSession, size: int, seed: int = 7) -> dict[str, Any]:
    """Inputs of the declared types; every unknown dimension is ``size``. Raises KeyError for types it cannot make."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Any] = {}
    for info in sess.get_inputs():
        text = info.type
        sequence = text.startswith("seq(")
        if text.startswith("optional("):
            feeds[info.name] = None
            continue
        element = text.removeprefix("seq(").removeprefix("tensor(").rstrip(")")
        shape = [d if isinstance(d, int) and d >= 0 else size for d in info.shape or ()] if not sequence else [size]
        if math.prod(shape) > MOST_ELEMENTS:
            raise ValueError(f"an input of {shape}")
        array: Any
        if element == "string":
            array = np.array([f"s{i}" for i in range(int(np.prod(shape)))], object).reshape(shape)
        elif element in ("float", "double", "float16", "bfloat16"):
            array = rng.standard_normal(shape).astype(_NUMPY[element])
        else:
            array = rng.integers(0, 2, shape).astype(_NUMPY[element])
        feeds[info.name] = [array] if sequence else _foreign(array)
    return feeds


def given_feeds(sess: ort.InferenceSession, data: tuple[Any, ...]) -> dict[str, Any]:
    """``data`` by position, wrapped where ORT cannot tell the type from NumPy's."""
    feeds: dict[str, Any] = {}
    for info, value in zip(sess.get_inputs(), data, strict=False):
        if isinstance(value, onnx.TensorProto):
            value = onnx.numpy_helper.to_array(value)
        feeds[info.name] = _foreign(value) if isinstance(value, np.ndarray | np.generic) else value
    return feeds


def _foreign(value: Any) -> Any:
    """An array as it is, or as an OrtValue where NumPy has no such type of its own."""
    array = np.asarray(value)
    if array.dtype.type.__module__ == "numpy":
        return array
    code = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(f"uint{8 * array.itemsize}"), code)


def digest(value: Any) -> Any:
    """A value of any ORT type in a form that ``==`` compares bit by bit, NaN included."""
    if isinstance(value, np.ndarray):
        data = value.tolist() if value.dtype.kind in "OSU" else value.tobytes()
        return (str(value.dtype), value.shape, data)
    if isinstance(value, list | tuple):
        return [digest(v) for v in value]
    if isinstance(value, Mapping):
        return {k: digest(v) for k, v in value.items()}
    if isinstance(value, float):
        return np.float64(value).tobytes()
    return value


def run(sess: ort.InferenceSession, feeds: Mapping[str, Any]) -> Any:
    """What the session computes, as :func:`digest`."""
    outputs = [o.type for o in sess.get_outputs()]
    plain = all(re.search(r"\((string|bool|double|float(16)?|u?int(8|16|32|64))[),]", t) for t in outputs)
    if plain and not any(isinstance(v, ort.OrtValue) for v in feeds.values()):
        return digest(sess.run(None, dict(feeds)))
    wrapped = {k: v if isinstance(v, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(v) for k, v in feeds.items()}
    return [_raw(v) for v in sess.run_with_ort_values(None, wrapped)]


def _raw(value: ort.OrtValue) -> Any:
    """The bytes of a tensor of a type that NumPy lacks."""
    if not value.is_tensor():
        raise TypeError(value.data_type())
    size = value.tensor_size_in_bytes()
    return (value.data_type(), tuple(value.shape()), ctypes.string_at(value.data_ptr(), size) if size else b"")


@dataclass(frozen=True)
class Reference:
    """What a model computes from some inputs; ``stable`` when a second session computed the same bits."""

    feeds: Mapping[str, Any]
    outputs: Any
    stable: bool


def random_ops(source: Source) -> bool:
    """True when an operator of the model may draw random numbers."""
    model = source if isinstance(source, onnx.ModelProto) else onnx.load(source, load_external_data=False)
    names = re.compile(r"Random|Dropout|Multinomial|Bernoulli|Sampling")
    return any(names.search(n.op_type) for part in (model.graph, *model.functions) for n in part.node)


def reference(case: Case) -> Reference | str:
    """What ORT computes for ``case``, or in a few words why it computes nothing."""
    try:
        sess = session(case.source)
    except Exception as e:
        return f"ORT does not load it: {str(e)[:160]}"
    attempts: list[Callable[[], dict[str, Any]]] = [functools.partial(random_feeds, sess, s) for s in SIZES]
    if case.data is not None:
        attempts.insert(0, functools.partial(given_feeds, sess, case.data))
    why = ""
    for attempt in attempts:
        try:
            feeds = attempt()
            outputs = run(sess, feeds)
        except Exception as e:
            why = why or str(e)[:160]
            continue
        again = (run(session(case.source), feeds) for _ in range(8 if random_ops(case.source) else 1))
        stable = Path(case.name).name not in CHANGING and all(o == outputs for o in again)
        return Reference(feeds, outputs, stable)
    return f"ORT does not run it: {why}"
