"""The decoder against itself, and against the Llama of `transformers` with the same weights."""

import pytest
import torch

from qcompiler.models import builders
from qcompiler.models.decoder import CachedDecoder, Decoder, DecoderConfig

# One rounding of a float32 sum of at most 256 terms of order one, over two layers.
TOLERANCE = 2e-5

IDS = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=["untied", "tied"])
def model(request: pytest.FixtureRequest) -> Decoder:
    return builders.tiny_llama() if request.param == "untied" else builders.tied_llama()


@torch.inference_mode()
def test_shapes_and_types(model: Decoder) -> None:
    logits = model(IDS)
    assert logits.shape == (3, 24, 256)
    assert logits.dtype == torch.float32
    assert 0.3 < logits.std() < 5


@torch.inference_mode()
def test_agrees_with_transformers(model: Decoder) -> None:
    transformers = pytest.importorskip("transformers")
    config = model.config
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_positions,
            rope_theta=config.rope_theta,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
        )
    ).eval()
    names = {
        "embedding.": "model.embed_tokens.",
        "layers.": "model.layers.",
        "norm.": "model.norm.",
        "head.": "lm_head.",
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
        ".attention.": ".self_attn.",
        ".feed_forward.": ".mlp.",
    }
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            if name.startswith(ours) or not ours.endswith(".") or ours.startswith("."):
                name = name.replace(ours, theirs, 1)
        state[name] = value
    peer.load_state_dict(state)
    torch.testing.assert_close(model(IDS), peer(IDS).logits, rtol=0, atol=TOLERANCE)


@torch.inference_mode()
def test_causal(model: Decoder) -> None:
    changed = IDS.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 256
    before, after = model(IDS), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert ((before - after)[:, 10:].abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("sizes", [[24], [8, 16], [1] * 24, [12, 1, 1, 10]])
@torch.inference_mode()
def test_cached_equals_uncached(model: Decoder, sizes: list[int]) -> None:
    cached = CachedDecoder(model)
    keys, values = model.empty_cache(batch=3)
    parts = []
    for ids in torch.split(IDS, sizes, dim=1):
        logits, keys, values = cached(ids, keys, values)
        parts.append(logits)
    assert [tuple(key.shape) for key in keys + values] == [(3, 2, 24, 32)] * 4
    torch.testing.assert_close(torch.cat(parts, dim=1), model(IDS), rtol=0, atol=TOLERANCE)


def test_tied_head_is_one_tensor() -> None:
    tied, untied = builders.tied_llama(), builders.tiny_llama()
    assert tied.head.weight is tied.embedding.weight
    assert untied.num_parameters() - tied.num_parameters() == 256 * 128


def test_parameter_count() -> None:
    """Two layers of 2 * 128 * 128 (q, o) + 2 * 64 * 128 (k, v) + 3 * 128 * 256 + 2 * 128, embeddings, norm."""
    assert builders.tiny_llama().num_parameters() == 2 * (32768 + 16384 + 98304 + 256) + 2 * 256 * 128 + 128


def test_config_round_trips_and_refuses() -> None:
    config = DecoderConfig(num_layers=3, tie_embeddings=True)
    assert DecoderConfig.from_dict(config.to_dict()) == config
    for wrong in ({"num_heads": 7}, {"num_kv_heads": 3}, {"hidden_size": 24, "num_heads": 8}):
        with pytest.raises(ValueError, match=r"multiple|even"):
            DecoderConfig.from_dict(config.to_dict() | wrong)
    with pytest.raises(TypeError):
        DecoderConfig.from_dict({"unknown": 1})
