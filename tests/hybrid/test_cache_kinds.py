"""The table of a model's layers, against arithmetic done by hand."""

from __future__ import annotations

import pytest

from kvtc_vllm.artifact.cache_kinds import (
    LayerKind,
    RefusedLayersError,
    UnknownLayersError,
    expected_ratio,
    layer_kinds,
)

GEMMA = {
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
}


def test_windows_and_full_attention() -> None:
    assert layer_kinds(GEMMA) == [
        LayerKind("full", 3, 3 * 2 * 256 * 2),
        LayerKind("window 512", 15, 15 * 2 * 256 * 2, reach=511),
    ]
    # Everything is coded.
    assert expected_ratio(layer_kinds({"text_config": GEMMA}), 32768, 16) == pytest.approx(16)


def test_states_of_gated_delta_nets_are_exact() -> None:
    """Qwen3.5-4B: 49.1 MiB a boundary, 1 GiB of KV for 32,768 tokens."""
    kinds = layer_kinds(
        {
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "linear_num_value_heads": 32,
            "linear_num_key_heads": 16,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "mamba_ssm_dtype": "float32",
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8,
        }
    )
    assert [kind.kind for kind in kinds] == ["full", "state"]
    assert kinds[0].token_bytes == 32768
    assert kinds[1].state_bytes == 24 * (8192 * 3 * 2 + 32 * 128 * 128 * 4)
    assert kinds[1].state_bytes / 2**20 == pytest.approx(49.1, abs=0.05)
    assert expected_ratio(kinds, 32768, 16) == pytest.approx(9.5, abs=0.05)


def test_latents_and_local_chunks() -> None:
    (latent,) = layer_kinds({"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64})
    assert (latent.kind, latent.token_bytes) == ("latent", 70272)
    kinds = layer_kinds(
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_chunk_size": 8192,
            "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
        }
    )
    assert [(kind.kind, kind.reach) for kind in kinds] == [("full", None), ("local 8192", 8191)]


def test_what_an_engine_refuses_is_refused() -> None:
    """vLLM makes a cache of another kind as soon as the field is there."""
    latents = {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    for topk in (2048, None):
        with pytest.raises(RefusedLayersError, match="index_topk: caches of sparse attention"):
            layer_kinds({"text_config": {**latents, "index_topk": topk}})


def test_what_a_configuration_does_not_say_is_named() -> None:
    with pytest.raises(UnknownLayersError, match="no num_hidden_layers"):
        layer_kinds({})
    with pytest.raises(UnknownLayersError, match="layer type 'wavelet' is not known"):
        layer_kinds({**GEMMA, "layer_types": ["wavelet"]})


@pytest.mark.parametrize(
    "damage",
    [
        {"layer_types": 5},
        {"layer_types": None, "num_attention_heads": 0, "head_dim": None, "hidden_size": 8},
        {"num_key_value_heads": "one"},
        {"num_kv_shared_layers": "all"},
        {"head_dim": -256},
        {"text_config": "gemma"},
        {"layer_types": ["mlp"]},
    ],
)
def test_a_damaged_configuration_is_one_error(damage: dict[str, object]) -> None:
    with pytest.raises(UnknownLayersError):
        layer_kinds({**GEMMA, **damage})
