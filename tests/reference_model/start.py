"""Starting weights: the usual noise, and two heads that begin by looking back.

Copying in context needs a head that brings each token its predecessor before
another head can learn to match on it. Finding the first by gradient takes most
of a small token budget, so two heads of the first layer start as "one back" and
"two back". Everything stays trainable, and the architecture is plain Llama.
"""

from __future__ import annotations

import math

import torch
from transformers import LlamaForCausalLM

#: Rotation pairs used: the fastest ones, as slow ones cannot tell neighbours apart.
_PAIRS = 10
#: Attention logit that one pair contributes at the distance looked for.
_SHARPNESS = 4.0


@torch.no_grad()
def prepare(model: LlamaForCausalLM) -> None:
    """Set the starting weights of a freshly constructed model in place."""
    config = model.config
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")) and ".layers.0." not in name:
            parameter.mul_(1.0 / math.sqrt(2 * config.num_hidden_layers))
    _look_back(model)


def _look_back(model: LlamaForCausalLM) -> None:
    config = model.config
    hidden, head = config.hidden_size, config.head_dim
    # A direction common to all tokens, as long as their own part, is what makes
    # queries and keys of these heads the same everywhere. Tied logits ignore it:
    # it adds the same amount to every token's.
    embedding = model.model.embed_tokens.weight
    common = torch.randn(hidden)
    common /= common.norm()
    embedding += common * embedding.std() * math.sqrt(hidden)
    seen = math.sqrt(hidden / 2)  # projection of a normalised state on `common`
    gain = math.sqrt(_SHARPNESS * math.sqrt(head)) / seen

    attention = model.model.layers[0].self_attn
    frequencies = model.model.rotary_emb.inv_freq[:_PAIRS]
    heads_per_key = config.num_attention_heads // config.num_key_value_heads
    for pair, frequency in enumerate(frequencies.tolist()):
        attention.k_proj.weight[pair] += gain * common
        for distance in range(1, min(2, heads_per_key) + 1):
            first = (distance - 1) * head
            angle = -distance * frequency
            attention.q_proj.weight[first + pair] += gain * math.cos(angle) * common
            attention.q_proj.weight[first + pair + head // 2] += gain * math.sin(angle) * common
