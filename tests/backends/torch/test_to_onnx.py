"""nn.Module -> ONNX -> ONNX Runtime: same numbers on two shapes, names kept, quiet, one sentence on failure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from qcompiler.backends.torch.archive import open_program
from qcompiler.backends.torch.sources import with_forward
from qcompiler.backends.torch.to_onnx import export_onnx
from qcompiler.errors import InputError
from tests.backends.torch.exports import ZOO, program, sample, second
from tests.support import FULL
from tests.zoo import token_ids

TOLERANCE = 1e-5  # of the largest value
MODELS = ZOO if FULL else ("mlp", "cnn", "llama_tied", "gpt2", "bert", "vit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where exported models are kept, shared by the processes of one run."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "zoo"
    shared.mkdir(exist_ok=True)
    return shared


def exported(name: str, folder: Path) -> Path:
    """The ONNX file of a zoo model, made by whichever process needs it first."""
    path = folder / f"{name}.onnx"
    return path if path.exists() else export_onnx(*sample(name), path)


def run(path: Path, args: tuple[Any, ...]) -> list[Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # models this small only spin on more
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return list(session.run(None, dict(zip(names, (a.numpy() for a in args), strict=True))))


def worst(path: Path, module: nn.Module, args: tuple[Any, ...]) -> float:
    with torch.no_grad():
        expected = [t.numpy() for t in pytree.tree_leaves(module(*args))]
    return max(
        float(np.abs(got - want).max() / np.abs(want).max())
        for got, want in zip(run(path, args), expected, strict=True)
    )


@pytest.mark.parametrize("name", [*MODELS, "attention"])
def test_onnx_runtime_agrees_with_torch_on_two_shapes(name: str, folder: Path) -> None:
    path = exported(name, folder)
    for args in (sample(name).args, second(name)):
        assert worst(path, sample(name).module, args) < TOLERANCE


# -- names -----------------------------------------------------------------------------------------------------


def readers(path: Path) -> dict[str, list[str]]:
    """Weight of two or more axes -> the ops that read it."""
    graph = onnx.load(path).graph
    weights = {i.name for i in graph.initializer if len(i.dims) >= 2 and i.data_type == onnx.TensorProto.FLOAT}
    return {w: [n.op_type for n in graph.node if w in n.input] for w in weights}


@pytest.mark.parametrize("name", [m for m in MODELS if m not in ("mlp", "cnn", "vit", "whisper")])
def test_every_weight_has_the_name_of_its_parameter(name: str, folder: Path) -> None:
    module = sample(name).module
    parameters = {n for n, p in module.named_parameters(remove_duplicate=False) if p.ndim >= 2}
    found = readers(exported(name, folder))
    assert set(found) - parameters == set()
    unused = {n for n in parameters - set(found) if not n.startswith("pooler")}
    assert unused == set()
    assert all(len(ops) == 1 for ops in found.values())


def test_linear_is_matmul_on_a_transposed_weight(folder: Path) -> None:
    graph = onnx.load(exported("llama", folder)).graph
    weight = next(i for i in graph.initializer if i.name == "model.layers.0.self_attn.k_proj.weight")
    torch_weight = dict(sample("llama").module.named_parameters())[weight.name]
    assert np.array_equal(onnx.numpy_helper.to_array(weight), torch_weight.detach().numpy().T)
    node = next(n for n in graph.node if weight.name in n.input)
    assert (node.op_type, list(node.input).index(weight.name)) == ("MatMul", 1)


def test_two_dimensional_linear_is_gemm_on_the_weight_as_it_is(folder: Path) -> None:
    assert readers(exported("mlp", folder)) == {"0.weight": ["Gemm"], "2.weight": ["Gemm"]}


def test_a_tied_weight_is_two_initializers(folder: Path) -> None:
    found = readers(exported("llama_tied", folder))
    assert found["model.embed_tokens.weight"] == ["Gather"]
    assert found["lm_head.weight"] == ["MatMul"]


def test_folded_arithmetic_is_named_after_its_weight(folder: Path) -> None:
    """Gemma's norms are 1 + weight."""
    names = {i.name for i in onnx.load(exported("gemma", folder)).graph.initializer}
    assert "model.layers.0.input_layernorm.weight.add" in names


def test_sizes_inputs_and_outputs_keep_their_names(folder: Path) -> None:
    graph = onnx.load(exported("bert", folder)).graph
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    assert shapes == {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]}
    (output,) = graph.output
    assert output.name == "last_hidden_state"
    assert [d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim] == ["batch", "sequence", 64]


def test_nodes_say_where_they_came_from(folder: Path) -> None:
    path = exported("llama", folder)
    node = next(n for n in onnx.load(path).graph.node if "lm_head.weight" in n.input)
    props = {p.key: p.value for p in node.metadata_props}
    assert props["qcompiler.scope"] == "lm_head"
    assert props["qcompiler.source"].startswith("modeling_llama.py:")
    assert b'.py", line' not in path.read_bytes()
    assert str(Path.cwd()).encode() not in path.read_bytes()


def test_results_in_a_dict_give_the_outputs_their_names(tmp_path: Path) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"double": x * 2, "half": x / 2}

    path = export_onnx(Net(), (torch.ones(3),), None, tmp_path / "x.onnx")
    assert [o.name for o in onnx.load(path).graph.output] == ["double", "half"]


# -- files -----------------------------------------------------------------------------------------------------


def test_external_weights_stand_beside_and_go_again(tmp_path: Path) -> None:
    module, args, shapes = sample("mlp")
    path = export_onnx(module, args, shapes, tmp_path / "m.onnx", external=True)
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    assert worst(path, module, args) < TOLERANCE
    export_onnx(module, args, shapes, path)
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx"}
    assert worst(path, module, args) < TOLERANCE


def test_a_program_file_is_exported_too(tmp_path: Path) -> None:
    torch.export.save(program("tied"), tmp_path / "tied.pt2")
    path = export_onnx(open_program(tmp_path / "tied.pt2"), (), None, tmp_path / "tied.onnx")
    assert worst(path, sample("tied").module, second("tied")) < TOLERANCE
    (first, *_) = onnx.load(path).graph.input
    assert [d.dim_param or d.dim_value for d in first.type.tensor_type.shape.dim] == [1, "d0"]
    assert readers(path) == {"embed.weight": ["Gather"], "head.weight": ["MatMul"]}


def test_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    export_onnx(*sample("mlp"), tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)


# -- refusals --------------------------------------------------------------------------------------------------


class _Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(7)


class _Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else x[:3]


class _Eigen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = torch.linalg.eigvals(x)
        return values


class _Mismatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ones(5, 5)


@pytest.mark.parametrize(
    ("module", "x", "shapes", "told"),
    [
        (_Fixed(), torch.ones(7), ({0: Dim("n")},), r"size 0 of input 'x' .* \('n'\), but the model fixes it to 7"),
        (_Branch(), torch.ones(4), None, r"data-dependent .* at test_to_onnx.py:\d+; .* torch.cond"),
        (_Eigen(), torch.ones(4, 4), None, "No ONNX function found for aten::"),
        (_Mismatch(), torch.ones(4, 4), None, "cannot export _Mismatch to ONNX: "),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(
    module: nn.Module, x: Tensor, shapes: Any, told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=told) as e:
        export_onnx(module, (x,), shapes, tmp_path / "x.onnx")
    assert "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("cache", "writes to its buffer 'k'"),
        ("batchnorm_train", "writes to its buffer '1.running_mean'"),
        ("written_input", "writes to its argument 'x'"),
        ("several", "its results must all be tensors"),
    ],
)
def test_state_and_constants_are_refused_not_dropped(name: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        export_onnx(*sample(name), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_a_linear_inside_a_branch_keeps_its_weight(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6, bias=False), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x) + self.a(x), (x,))
            return torch.add(y, self.a(x))

    net = Net()
    path = export_onnx(net, (torch.randn(2, 3, 4),), ({0: Dim("n", max=16)},), tmp_path / "x.onnx")
    for x in (torch.ones(2, 3, 4), -torch.ones(5, 3, 4)):
        assert worst(path, net, (x,)) < TOLERANCE
    assert {"a.weight", "b.bias"} <= {i.name for i in onnx.load(path).graph.initializer}


def test_experts_are_refused_with_what_to_do(tmp_path: Path) -> None:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.MixtralForCausalLM(config)
    base = type(model)

    def forward(self: Any, input_ids: Tensor) -> Any:
        return base.forward(self, input_ids=input_ids, use_cache=False).logits

    told = r"transformers::grouped_mm_fallback; .*experts_implementation='batched_mm'"
    with pytest.raises(InputError, match=told):
        export_onnx(with_forward(model, forward), (token_ids(vocab=32),), None, tmp_path / "x.onnx")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        export_onnx(*sample("mlp"), tmp_path / "no" / "x.onnx")
