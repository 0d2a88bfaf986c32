"""Models of other architectures, made of the reference model's weights.

A recurrent layer or latent attention learns little from nothing in minutes. So a *graft* keeps
embeddings, MLPs, norms and some attention of the reference model, and has new layers in the place
of the others, which `distil.py` then trains:

- `states`: Granite 4.0's hybrid. Six of eight layers are Mamba2, layers 1 and 5 full attention.
- `latents`: DeepSeek V3's attention in all layers, latents of 512 and a rotated key of 64, the
  only sizes that vLLM's CPU kernel takes. Dense MLPs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MethodType

import torch
from scan import mamba_forward
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

ATTENTION_LAYERS = (1, 5)
LATENT, ROTATED = 512, 64
#: Pairs that turn slower than this (radians per token) can do without rotation at first.
_SLOW = 0.01


class Graft:
    """A model to train, and which of its layers are new.

    mixers: layer -> the module in the place of the reference model's attention.
    """

    def __init__(self, model: PreTrainedModel, mixers: dict[int, nn.Module]) -> None:
        self.model = model
        self.mixers = mixers

    def mix(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What a new layer makes of normalised hidden states [rows, tokens, hidden]; the same
        shape."""
        mixer = self.mixers[layer]
        if hasattr(mixer, "in_proj"):
            return mixer(hidden)
        positions = torch.arange(hidden.shape[1])[None]
        turned = self.model.model.rotary_emb(hidden, positions)
        return mixer(hidden, position_embeddings=turned, attention_mask=None)[0]


def _common(config: LlamaConfig) -> dict[str, object]:
    """What all architectures call alike."""
    kept = """vocab_size hidden_size num_hidden_layers num_attention_heads max_position_embeddings
    rms_norm_eps bos_token_id eos_token_id pad_token_id tie_word_embeddings rope_parameters"""
    return {name: getattr(config, name) for name in kept.split()}


@torch.no_grad()
def states(teacher: LlamaForCausalLM) -> Graft:
    """Mamba2 in six of eight layers: four heads of 64, 64 states each."""
    config = teacher.config
    kinds = [
        "attention" if layer in ATTENTION_LAYERS else "mamba"
        for layer in range(config.num_hidden_layers)
    ]
    model = GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(
            **_common(config),
            num_key_value_heads=config.num_key_value_heads,
            intermediate_size=config.intermediate_size,
            shared_intermediate_size=config.intermediate_size,
            num_local_experts=0,
            num_experts_per_tok=0,
            layer_types=kinds,
            position_embedding_type="rope",
            attention_multiplier=config.head_dim**-0.5,
            mamba_n_heads=4,
            mamba_d_head=64,
            mamba_d_state=64,
            mamba_n_groups=1,
            mamba_expand=1,
            mamba_chunk_size=64,
        )
    )
    mixers = {}
    for number, (old, new) in enumerate(zip(teacher.model.layers, model.model.layers, strict=True)):
        new.shared_mlp.input_linear.weight.copy_(
            torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight])
        )
        new.shared_mlp.output_linear.weight.copy_(old.mlp.down_proj.weight)
        if number in ATTENTION_LAYERS:
            new.self_attn.load_state_dict(old.self_attn.state_dict())
        else:
            mixers[number] = new.mamba
            _spread_decays(new.mamba)
            new.mamba.forward = MethodType(mamba_forward, new.mamba)
    _copy_rest(teacher, model)
    return Graft(model, mixers)


def _spread_decays(mamba: nn.Module) -> None:
    """From heads that forget in a few tokens to one that remembers for hundreds."""
    heads = mamba.A_log.numel()
    mamba.A_log.copy_(torch.zeros(heads))
    steps = torch.logspace(-2.7, -0.5, heads)
    mamba.dt_bias.copy_(torch.log(torch.expm1(steps)))


@torch.no_grad()
def latents(teacher: LlamaForCausalLM) -> Graft:
    """Latent attention in all layers, which starts from the reference model's keys and values."""
    config = teacher.config
    head = config.head_dim
    model = DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **_common(config),
            num_key_value_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            moe_intermediate_size=head,
            first_k_dense_replace=config.num_hidden_layers,
            n_routed_experts=1,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=1,
            q_lora_rank=None,
            kv_lora_rank=LATENT,
            qk_rope_head_dim=ROTATED,
            qk_nope_head_dim=head,
            v_head_dim=head,
        )
    )
    mixers = {}
    frequencies = teacher.model.rotary_emb.inv_freq
    for number, (old, new) in enumerate(zip(teacher.model.layers, model.model.layers, strict=True)):
        new.mlp.load_state_dict(old.mlp.state_dict())
        _start_latent(old, new.self_attn, config, frequencies)
        mixers[number] = new.self_attn
    _copy_rest(teacher, model)
    return Graft(model, mixers)


def _start_latent(
    old: nn.Module, new: nn.Module, config: LlamaConfig, frequencies: torch.Tensor
) -> None:
    """The latent is K and V of all heads and noise. One key can be rotated only: each pair of it is
    the pair of the KV head that uses it most. Slow pairs of the other head are not rotated."""
    head, pairs = config.head_dim, config.head_dim // 2
    queries, kv_heads = config.num_attention_heads, config.num_key_value_heads
    attention = old.self_attn
    q = attention.q_proj.weight.view(queries, 2, pairs, -1)
    k = attention.k_proj.weight.view(kv_heads, 2, pairs, -1)
    group = queries // kv_heads
    used = q.square().sum((1, 3)).view(kv_heads, group, pairs).sum(1) * k.square().sum((1, 3))
    owner = used.argmax(0)
    every = torch.arange(pairs)

    keys_values = torch.cat([attention.k_proj.weight, attention.v_proj.weight])
    noise = torch.randn(LATENT - len(keys_values), config.hidden_size) * keys_values.std()
    latent = torch.cat([keys_values, noise])
    size = (latent.square() @ old.input_layernorm.weight.square()).mean().sqrt()
    rotated = k[owner, :, every].flatten(0, 1)
    new.kv_a_proj_with_mqa.weight.copy_(torch.cat([latent, rotated]))

    # Scores are divided by the root of the sum of both sizes.
    gain = math.sqrt((head + ROTATED) / head)
    up = torch.zeros(queries, 2 * head, LATENT)
    down = torch.zeros(queries, head + ROTATED, config.hidden_size)
    for query in range(queries):
        kv = query // group
        plain = ((owner != kv) & (frequencies < _SLOW)).repeat(2)
        here = torch.arange(head)
        up[query, here, kv * head + here] = plain * size
        up[query, head + here, (kv_heads + kv) * head + here] = size
        down[query, :head] = q[query].flatten(0, 1) * gain
        down[query, head:] = (q[query] * (owner == kv)[:, None]).transpose(0, 1).flatten(0, 1)
        down[query, head:] *= gain
    new.kv_b_proj.weight.copy_(up.flatten(0, 1) + 0.02 * torch.randn(queries * 2 * head, LATENT))
    new.q_proj.weight.copy_(down.flatten(0, 1))
    new.o_proj.weight.copy_(attention.o_proj.weight)


def _copy_rest(teacher: LlamaForCausalLM, model: PreTrainedModel) -> None:
    """Embeddings and norms."""
    for name in ("embed_tokens", "norm"):
        getattr(model.model, name).load_state_dict(getattr(teacher.model, name).state_dict())
    model.lm_head.load_state_dict(teacher.lm_head.state_dict())
    for old, new in zip(teacher.model.layers, model.model.layers, strict=True):
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(new, name).load_state_dict(getattr(old, name).state_dict())


GRAFTS: dict[str, Callable[[LlamaForCausalLM], Graft]] = {"states": states, "latents": latents}
