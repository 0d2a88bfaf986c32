"""Tiny models with random weights, one per family with several kinds of attention."""

from __future__ import annotations

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


def make_model(family: str, directory: Path) -> Path:
    """Write a model's configuration and weights, float32, the same in every run."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    model.to(torch.float32).save_pretrained(directory)
    return directory
