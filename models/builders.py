"""Small random-weight networks for tests and examples, built with torch alone.

Each ``*_example()`` returns ``(module, example_args, dynamic_shapes)`` for :func:`torch.export.export`. Modules
are in eval mode and float32. A ``seed`` fixes weights and inputs; torch's global generator is left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from qcompiler.models.decoder import CachedDecoder, Decoder, DecoderConfig

__all__ = [
    "Example",
    "cached_example",
    "cached_llama_example",
    "decoder_example",
    "mlp",
    "mlp_example",
    "tied_llama",
    "tied_llama_example",
    "tiny_cnn",
    "tiny_cnn_example",
    "tiny_llama",
    "tiny_llama_example",
]

Example = tuple[nn.Module, tuple[Any, ...], tuple[Any, ...]]
"""A module, its positional example arguments, and their dynamic shapes."""

_MAX_BATCH = 1024


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Run the body under ``seed`` and restore torch's CPU generator after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def mlp(
    in_features: int = 64, hidden: int = 128, out_features: int = 32, depth: int = 2, *, seed: int = 0
) -> nn.Sequential:
    """Build ``depth`` Linear-ReLU pairs and a last Linear, all with bias: ``[..., in]`` to ``[..., out]``."""
    with _seeded(seed):
        layers: list[nn.Module] = []
        width = in_features
        for _ in range(depth):
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        return nn.Sequential(*layers, nn.Linear(width, out_features)).eval()


def mlp_example(*, seed: int = 0) -> Example:
    """Return :func:`mlp` with a float32 ``[4, 64]`` input of dynamic batch."""
    with _seeded(seed + 1):
        inputs = torch.randn(4, 64)
    return mlp(seed=seed), (inputs,), ({0: Dim("batch", min=1, max=_MAX_BATCH)},)


def _llama(seed: int, tie_embeddings: bool) -> Decoder:
    """Build a two-layer decoder whose weights have unit gain, so logits are of order one."""
    config = DecoderConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_positions=256,
        tie_embeddings=tie_embeddings,
    )
    with _seeded(seed):
        model = Decoder(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                nn.init.uniform_(parameter, 0.5, 1.5)
            elif name != "embedding.weight":
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            else:
                nn.init.normal_(parameter, std=config.hidden_size**-0.5 if tie_embeddings else 1.0)
    return model


def tiny_llama(*, seed: int = 0) -> Decoder:
    """Build a random decoder: vocabulary 256, width 128, two layers, four heads over two key/value heads."""
    return _llama(seed, tie_embeddings=False)


def tied_llama(*, seed: int = 0) -> Decoder:
    """Build :func:`tiny_llama`'s sizes with the head sharing the embedding matrix."""
    return _llama(seed, tie_embeddings=True)


def decoder_example(model: Decoder, input_ids: Tensor) -> Example:
    """Return ``model`` with ``input_ids`` int64 ``[B, S]`` and both axes dynamic, up to its positions."""
    sequence = Dim("seq", min=1, max=model.config.max_positions)
    return model, (input_ids,), ({0: Dim("batch", min=1, max=_MAX_BATCH), 1: sequence},)


def cached_example(model: Decoder, input_ids: Tensor, past: int) -> Example:
    """Return the cache form of ``model`` after a prefill of ``past`` tokens.

    ``input_ids`` int64 ``[B, past + S]``: the first ``past`` fill the cache, the rest are the new tokens. Batch
    and cache length are dynamic; the number of new tokens is dynamic too unless there is just one. The cache
    and the new tokens each take at most half of the model's positions.
    """
    with torch.inference_mode():
        keys, values = model.empty_cache(input_ids.shape[0])
        _, keys, values = model.step(input_ids[:, :past], keys, values)
    # Clones made outside inference mode are ordinary tensors, which export can trace.
    args = (input_ids[:, past:], [key.clone() for key in keys], [value.clone() for value in values])
    half = model.config.max_positions // 2
    batch, cached = Dim("batch", min=1, max=_MAX_BATCH), Dim("past", min=0, max=half)
    fresh = {0: batch, 1: Dim("seq", min=1, max=half)} if args[0].shape[1] > 1 else {0: batch}
    caches = [{0: batch, 2: cached} for _ in keys]
    return CachedDecoder(model).eval(), args, (fresh, caches, list(caches))


def _ids(seed: int, batch: int, length: int) -> Tensor:
    """Draw int64 ``[batch, length]`` token ids of the tiny vocabulary."""
    with _seeded(seed):
        return torch.randint(0, 256, (batch, length))


def tiny_llama_example(*, seed: int = 0) -> Example:
    """Return :func:`tiny_llama` with int64 ``[2, 16]`` ids, batch and sequence dynamic."""
    return decoder_example(tiny_llama(seed=seed), _ids(seed + 1, 2, 16))


def tied_llama_example(*, seed: int = 0) -> Example:
    """Return :func:`tied_llama` with int64 ``[2, 16]`` ids, batch and sequence dynamic."""
    return decoder_example(tied_llama(seed=seed), _ids(seed + 1, 2, 16))


def cached_llama_example(*, seed: int = 0) -> Example:
    """Return :func:`tiny_llama`'s cache form with one new token after twelve, batch and cache dynamic."""
    return cached_example(tiny_llama(seed=seed), _ids(seed + 1, 2, 13), past=12)


class _Cnn(nn.Module):
    """Convolution, residual depthwise-separable block, strided convolution, mean pool, classifier."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.down = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.down_norm = nn.BatchNorm2d(2 * channels)
        self.classifier = nn.Linear(2 * channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return class logits float32 ``[B, classes]`` of ``images`` float32 ``[B, 3, H, W]``."""
        x = F.relu(self.stem_norm(self.stem(images)))
        x = x + self.pointwise(F.relu(self.depthwise_norm(self.depthwise(x))))
        x = F.relu(self.down_norm(self.down(x)))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


def tiny_cnn(channels: int = 16, classes: int = 10, *, seed: int = 0) -> nn.Module:
    """Build a small CNN, float32 ``[B, 3, H, W]`` to ``[B, classes]``; its batch norms have non-trivial state."""
    with _seeded(seed):
        model = _Cnn(channels, classes)
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                for centred in (norm.bias, norm.get_buffer("running_mean")):
                    nn.init.normal_(centred, std=0.2)
                for positive in (norm.weight, norm.get_buffer("running_var")):
                    nn.init.uniform_(positive, 0.5, 1.5)
    return model.eval()


def tiny_cnn_example(*, seed: int = 0) -> Example:
    """Return :func:`tiny_cnn` with a float32 ``[2, 3, 16, 16]`` input of dynamic batch."""
    with _seeded(seed + 1):
        images = torch.randn(2, 3, 16, 16)
    return tiny_cnn(seed=seed), (images,), ({0: Dim("batch", min=1, max=_MAX_BATCH)},)
