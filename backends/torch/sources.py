"""Where torch models come from: ``package.module:function``, or a Hugging Face style directory."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from qcompiler.backends.torch.quiet import quietly, sentence_of
from qcompiler.errors import Error, InputError

BATCH, LENGTH = 2, 12
_OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "mpnet"})


class Sample(NamedTuple):
    """A module in eval mode, example arguments, and dynamic shapes as ``torch.export.export`` takes them."""

    module: nn.Module
    args: tuple[Any, ...]
    dynamic_shapes: Any


# -- package.module:function ---------------------------------------------------------------------------------


def resolve(spec: str) -> Sample:
    """Call the function that ``package.module:function`` names and check what it returned.

    It returns ``(module, args)`` or ``(module, args, dynamic_shapes)``. The current directory can be
    imported from. Raises InputError when the module does not import, the function is missing or fails, or
    its result is another.
    """
    module_name, colon, function_name = spec.partition(":")
    words = [*module_name.split("."), function_name]
    if not colon or not all(word.isidentifier() for word in words):
        raise InputError(f"{spec!r} is not of the form package.module:function")
    home = _import(module_name, spec)
    function = getattr(home, function_name, None)
    if function is None:
        known = [n for n in dir(home) if callable(getattr(home, n))]
        near = difflib.get_close_matches(function_name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"module {module_name!r} has no function {function_name!r}{hint}")
    if not callable(function):
        raise InputError(f"{spec!r} is {_a(function)}, not a function")
    try:
        returned = function()
    except Error:
        raise
    except Exception as e:
        raise InputError(f"{spec!r} failed: {type(e).__name__}: {sentence_of(e)}") from e
    return checked(returned, spec)


def checked(returned: Any, spec: str) -> Sample:
    """``returned`` as a :class:`Sample`, its module in eval mode; InputError says what is wrong with it."""
    wanted = "(module, args) or (module, args, dynamic_shapes)"
    if not isinstance(returned, tuple) or len(returned) not in (2, 3):
        raise InputError(f"{spec!r} returned {_a(returned)}, expected {wanted}")
    module, args, shapes = (*returned, None)[:3]
    if not isinstance(module, nn.Module):
        raise InputError(f"{spec!r} returned {_a(module)} first, expected a torch.nn.Module")
    if not isinstance(args, (tuple, list)):
        raise InputError(f"{spec!r} returned {_a(args)} second, expected a tuple of example arguments")
    return Sample(module.eval(), tuple(args), shapes)


def _import(name: str, spec: str) -> Any:
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        missing = e.name or ""
        if name == missing or name.startswith(f"{missing}."):
            raise InputError(f"{spec!r}: there is no module {missing!r} to import") from e
        raise InputError(f"{spec!r}: module {name!r} needs {missing!r}, which is not installed") from e
    except Exception as e:
        raise InputError(f"{spec!r}: importing {name!r} failed: {type(e).__name__}: {sentence_of(e)}") from e
    finally:
        if added and here in sys.path:
            sys.path.remove(here)


def _a(value: Any) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


# -- Hugging Face directories --------------------------------------------------------------------------------


def from_pretrained_dir(path: str | Path, dtype: torch.dtype = torch.float32) -> Sample:
    """The float model in ``path`` (``config.json`` and safetensors), batch and length dynamic.

    Its class is the one that ``architectures`` names, its weights are read as ``dtype``. A decoder maps
    ``input_ids`` int64 ``[batch, sequence]`` to logits ``[batch, sequence, vocab]`` without a cache; a text
    encoder takes ``attention_mask`` too; a vision model takes ``pixel_values``. The result is ``logits``
    where the model has them, else ``last_hidden_state``; its name stands in ``module.output_names``.
    Nothing is downloaded, no pickle is read and no code from the directory runs. Raises InputError when a
    file is missing or unsafe, the checkpoint is quantized or incomplete, the class is unknown, or
    transformers is not installed.
    """
    folder = Path(path)
    config = _read_config(folder)
    _refuse_quantized(folder, config)
    _need_safetensors(folder)
    transformers = _transformers()
    names = config.get("architectures") or []
    if not names:
        raise InputError(f"{folder}: config.json names no architecture")
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        why = "it needs the directory's own code, which is not run" if "auto_map" in config else "unknown to it"
        raise InputError(
            f"{folder}: transformers {transformers.__version__} has no class {names[0]} ({why}); "
            "build it yourself and pass package.module:function"
        )
    model = _load(folder, model_class, dtype)
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(
            f"{folder}: {names[0]} has an encoder and a decoder, and its inputs cannot be guessed; "
            "pass package.module:function"
        )
    return _sample(folder, model)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise InputError(f"{folder} has no config.json, so it is no model directory")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise InputError(f"{file} cannot be read: {e}") from e
    if not isinstance(config, dict):
        raise InputError(f"{file} holds {_a(config)}, expected an object")
    return config


def _refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    found = config.get("quantization_config") or config.get("compression_config")
    for name in ("quantize_config.json", "quant_config.json"):
        if not found and (folder / name).is_file():
            found = {"quant_method": name}
    if found:
        method = found.get("quant_method", "unknown") if isinstance(found, Mapping) else "unknown"
        raise InputError(
            f"QC502: {folder} is already quantized ({method}), and importing quantized checkpoints is not "
            "there yet; give the float model that it was made from"
        )


def _need_safetensors(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
            raise InputError(f"{index} is not a safetensors index") from e
        if absent := sorted(s for s in shards if not (folder / s).is_file()):
            names = ", ".join(absent[:3])
            raise InputError(f"{folder} lacks {len(absent)} of {len(shards)} weight files: {names}")
    elif not (folder / "model.safetensors").is_file():
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickles:
            raise InputError(
                f"{folder} holds its weights as a pickle ({pickles[0]}), which is not read because it can run "
                "code; convert it to safetensors"
            )
        raise InputError(f"{folder} has no model.safetensors")


def _transformers() -> Any:
    # Both are read when the libraries are first imported; an environment that says otherwise is left alone.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as e:
        raise InputError("reading a model directory needs transformers: pip install 'transformers>=5'") from e


def _load(folder: Path, model_class: Any, dtype: torch.dtype) -> Any:
    try:
        with quietly():
            model, info = model_class.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as e:
        raise InputError(f"{folder}: {model_class.__name__} cannot be read: {sentence_of(e)}") from e
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, info.get(problem) or ())):
            raise InputError(
                f"{folder}: {problem.replace('_', ' ')} of {model_class.__name__}: "
                f"{', '.join(found[:3])}{f' and {len(found) - 3} more' if len(found) > 3 else ''}"
            )
    return model


def _sample(folder: Path, model: Any) -> Sample:
    base = type(model)
    bare = base.__name__.endswith(("Model", "Encoder")) and "Head" not in base.__name__  # GPT2LMHeadModel
    output = "last_hidden_state" if bare else "logits"
    batch = Dim("batch", max=1 << 16)
    generator = torch.Generator().manual_seed(0)
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
        pixels = torch.randn(BATCH, config.num_channels, *size, generator=generator, dtype=model.dtype)
        seeing = with_forward(model, _pixels_forward(base, output), output)
        return Sample(seeing, (pixels,), {"pixel_values": {0: batch}})
    if model.main_input_name != "input_ids":
        raise InputError(
            f"{folder}: {base.__name__} takes {model.main_input_name}, of which no example can be guessed; "
            "pass package.module:function"
        )
    longest = int(getattr(config, "max_position_embeddings", None) or 1 << 16)
    if config.model_type in _OFFSET_POSITIONS:
        longest -= (config.pad_token_id or 0) + 1
    vocab = config.get_text_config().vocab_size
    ids = torch.randint(0, vocab, (BATCH, min(LENGTH, longest)), generator=generator)
    dims = {0: batch, 1: Dim("sequence", max=longest)}
    if base.__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return Sample(with_forward(model, _ids_forward(base, output), output), (ids,), {"input_ids": dims})
    masked = with_forward(model, _masked_forward(base, output), output)
    return Sample(masked, (ids, torch.ones_like(ids)), {"input_ids": dims, "attention_mask": dims})


def with_forward(model: nn.Module, forward: Callable[..., Any], output: str = "output") -> nn.Module:
    """``model`` in eval mode with another forward; parameter names and module paths stay as they are.

    A wrapper module would put a prefix before every name, so the instance is given a subclass of its own
    class.
    """
    model.__class__ = type(type(model).__name__, (type(model),), {"forward": forward, "output_names": (output,)})
    return model.eval()


def _extra(base: Any) -> dict[str, Any]:
    known = inspect.signature(base.forward).parameters
    return {"use_cache": False} if "use_cache" in known else {}


def _ids_forward(base: Any, output: str) -> Callable[..., Any]:
    extra = _extra(base)

    def forward(self: Any, input_ids: Tensor) -> Any:
        return getattr(base.forward(self, input_ids=input_ids, **extra), output)

    return forward


def _masked_forward(base: Any, output: str) -> Callable[..., Any]:
    extra = _extra(base)

    def forward(self: Any, input_ids: Tensor, attention_mask: Tensor) -> Any:
        out = base.forward(self, input_ids=input_ids, attention_mask=attention_mask, **extra)
        return getattr(out, output)

    return forward


def _pixels_forward(base: Any, output: str) -> Callable[..., Any]:
    def forward(self: Any, pixel_values: Tensor) -> Any:
        return getattr(base.forward(self, pixel_values=pixel_values), output)

    return forward
