"""GGUF files of the Gemma 3 architecture, text only."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks.models.architectures.layers import layer_tensor
from benchmarks.models.gguf_file import GgufFile
from benchmarks.models.tokenizer import scored_bpe, special_ids

LAYERS_PER_FULL = 6
"""Of so many layers the last attends to all tokens, the others to a window."""
LOCAL_ROPE_THETA = 10000.0
"""RoPE base of layers with a window. GGUF files do not tell it; all Gemma 3 models share it."""

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def weights(file: GgufFile) -> dict[str, torch.Tensor]:
    """Tensors in bfloat16 by the names that transformers gives them.

    Gemma multiplies by 1 + the weight of a norm. llama.cpp stores that sum.
    """
    found = {}
    for name, value in file.tensors():
        target = _WHOLE.get(name) or layer_tensor(file, name, _IN_LAYER)
        if name.endswith("norm.weight"):
            value = value - 1
        found[target] = value.to(torch.bfloat16)
    return found


def config(file: GgufFile, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Content of config.json."""
    layers = file.parameter("block_count")
    head_dim = file.parameter("attention.key_length")
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "dtype": "bfloat16",
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": file.parameter("embedding_length"),
        "intermediate_size": file.parameter("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": file.parameter("attention.head_count"),
        "num_key_value_heads": file.parameter("attention.head_count_kv"),
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "max_position_embeddings": file.parameter("context_length"),
        "rope_theta": file.floating("rope.freq_base"),
        "rope_local_base_freq": LOCAL_ROPE_THETA,
        "sliding_window": file.parameter("attention.sliding_window"),
        "layer_types": [
            "sliding_attention" if layer % LAYERS_PER_FULL else "full_attention"
            for layer in range(1, layers + 1)
        ],
        "rms_norm_eps": file.floating("attention.layer_norm_rms_epsilon"),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        **special_ids(file),
    }


def tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer of Gemma 3."""
    return scored_bpe(file)
