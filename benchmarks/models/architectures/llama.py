"""GGUF files of the Llama architecture."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks.models.architectures.layers import layer_tensor
from benchmarks.models.gguf_file import GgufFile
from benchmarks.models.tokenizer import byte_level_bpe, special_ids

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def weights(file: GgufFile) -> dict[str, torch.Tensor]:
    """Tensors in bfloat16 by the names that transformers gives them."""
    heads = {
        "self_attn.q_proj": file.parameter("attention.head_count"),
        "self_attn.k_proj": file.parameter("attention.head_count_kv"),
    }
    found = {}
    for name, value in file.tensors():
        target = _WHOLE.get(name) or layer_tensor(file, name, _IN_LAYER)
        for part, count in heads.items():
            if part in target:
                value = unpermute(value, count)
        found[target] = value.to(torch.bfloat16)
    return found


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a Q or K projection, [heads * d, in], in the order of transformers.

    llama.cpp rotates neighbours, so it stores the rows of a head in the order 0, d/2, 1, d/2 + 1
    and so on; transformers rotates rows that are d/2 apart.
    """
    rows, columns = weight.shape
    half = rows // heads // 2
    return weight.reshape(heads, half, 2, columns).transpose(1, 2).reshape(rows, columns)


def config(file: GgufFile, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": file.parameter("embedding_length"),
        "intermediate_size": file.parameter("feed_forward_length"),
        "num_hidden_layers": file.parameter("block_count"),
        "num_attention_heads": file.parameter("attention.head_count"),
        "num_key_value_heads": file.parameter("attention.head_count_kv"),
        "head_dim": file.parameter("rope.dimension_count"),
        "max_position_embeddings": file.parameter("context_length"),
        "rope_theta": file.floating("rope.freq_base"),
        "rms_norm_eps": file.floating("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        **special_ids(file),
    }


def tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer of SmolLM2."""
    return byte_level_bpe(file)
