"""Tiny models with random weights, one per family with several kinds of attention."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY = 512
WINDOW = 128
LOCAL = 256
SLIDING, FULL, LOCAL_CHUNKS = "sliding_attention", "full_attention", "chunked_attention"

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
"""What the configurations of all families call alike."""


def _configuration(name: str, **changes: Any) -> Callable[[], Any]:
    def make() -> Any:
        import transformers

        return getattr(transformers, name)(**{**COMMON, **changes})

    return make


def _mixed(name: str, layers: list[str], **changes: Any) -> Callable[[], Any]:
    return _configuration(
        name,
        layer_types=layers,
        num_hidden_layers=len(layers),
        **{"sliding_window": WINDOW, **changes},
    )


_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, Callable[[], Any]] = {
    "gemma2": _mixed("Gemma2Config", [SLIDING, FULL] * 2),
    # Five groups of windows, which have one shape and are stored together.
    "gemma3": _mixed("Gemma3TextConfig", [SLIDING] * 5 + [FULL], query_pre_attn_scalar=64),
    # Two layers that read the KV of others.
    "gemma3n": _mixed(
        "Gemma3nTextConfig",
        [SLIDING, FULL] * 3,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=32,
        laurel_rank=16,
        activation_sparsity_pattern=[0.0] * 6,
        altup_num_inputs=2,
    ),
    # Heads, and blocks, of two sizes.
    "gemma4": _mixed(
        "Gemma4TextConfig",
        [SLIDING, SLIDING, FULL] * 2,
        global_head_dim=128,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=32,
    ),
    "gptoss": _mixed("GptOssConfig", [SLIDING, FULL] * 2, **_EXPERTS),
    "olmo3": _mixed("Olmo3Config", [SLIDING] * 3 + [FULL]),
    "cohere2": _mixed("Cohere2Config", [SLIDING] * 3 + [FULL]),
    # Windows alone, in one group.
    "mistral": _configuration("MistralConfig", sliding_window=WINDOW),
    "llama4": _configuration(
        "Llama4TextConfig",
        intermediate_size_mlp=256,
        num_local_experts=4,
        num_experts_per_tok=1,
        attention_chunk_size=LOCAL,
        no_rope_layers=[1, 1, 1, 0],
        layer_types=[LOCAL_CHUNKS] * 3 + [FULL],
        interleave_moe_layer_step=2,
    ),
}

_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 32,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 64,
}
STATES: dict[str, Callable[[], Any]] = {
    "granite": _configuration(
        "GraniteMoeHybridConfig",
        layer_types=["mamba", "mamba", "mamba", "attention"],
        shared_intermediate_size=128,
        position_embedding_type="rope",
        **_EXPERTS,
        **_MAMBA,
    ),
    # Attention and a state in every layer.
    "falcon": _configuration("FalconH1Config", mamba_d_ssm=256, **_MAMBA),
    "nemotron": _configuration(
        "NemotronHConfig",
        layers_block_type=["mamba", "attention", "mamba", "mlp"],
        ssm_state_size=32,
        mamba_num_heads=8,
        mamba_head_dim=32,
        n_groups=1,
        chunk_size=64,
        expand=2,
    ),
    # Gated delta nets. vLLM's CPU kernel takes heads of 128, and bfloat16 only.
    "qwen3next": _configuration(
        "Qwen3NextConfig",
        linear_num_value_heads=2,
        linear_num_key_heads=1,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        layer_types=["linear_attention"] * 3 + [FULL],
    ),
    # Short convolutions.
    "lfm2": _configuration(
        "Lfm2Config", layer_types=["conv"] * 3 + [FULL], conv_L_cache=3, head_dim=32
    ),
}
"""Families with recurrent layers."""

_LATENT = {
    "head_dim": 64,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    # The CPU kernel takes these two sizes only.
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
}
LATENTS: dict[str, Callable[[], Any]] = {
    "deepseek": _configuration("DeepseekV3Config", **_LATENT),
    "glm": _configuration("Glm4MoeLiteConfig", **_LATENT),
}
"""Families with multi-head latent attention."""

ROUTING = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
"""vLLM reads how experts are chosen; transformers does not write it any more."""

LFM2_NAMES = {
    "conv_dim": 128,
    "conv_dim_out": 128,
    "block_dim": 128,
    "block_ff_dim": 256,
    "block_auto_adjust_ff_dim": False,
}
"""vLLM reads names that transformers does not write any more."""


def make_model(family: str, directory: Path, vocabulary: int = VOCABULARY) -> Path:
    """Write a model's configuration and weights, float32, the same in every run."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = {**FAMILIES, **STATES, **LATENTS}[family]()
    config.vocab_size = vocabulary
    model = transformers.AutoModelForCausalLM.from_config(config)
    if family in STATES:
        _amplify(model)
    if family in LATENTS:
        # Or the best two tokens would be alike within what float32 rounds.
        model.lm_head.weight.data.mul_(8.0)
    model.to(torch.float32).save_pretrained(directory)
    names = LFM2_NAMES if family == "lfm2" else ROUTING if family in LATENTS else {}
    if names:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | names))
    return directory


def _amplify(model: Any) -> None:
    """Random recurrent layers hardly notice their states: let these remember, and speak up."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("A_log"):
                weight.fill_(-6.0)
            elif any(part in name for part in (".conv.", ".mamba.", ".mixer.", ".linear_attn.")):
                if ".out_proj" in name:
                    weight.mul_(10.0)
                elif ".in_proj" in name or ".conv1d" in name or ".conv.conv" in name:
                    weight.mul_(5.0)
