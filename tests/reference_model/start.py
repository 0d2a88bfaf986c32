"""Starting weights: the usual noise, and a copying circuit in the first two layers.

Recall in context rests on "induction": a head of one layer brings each token its
predecessor, and a head of the next finds where the present token was the
predecessor and copies what came there. To find the pair by gradient takes more
tokens than a small run sees, so a run starts from a rough hand-made one and
improves it. All of it stays trainable, and the architecture is plain Llama.

The circuit uses directions of the hidden state that are orthogonal to each other:
one common to all tokens, some that carry the predecessor, some that are compared
with it, and some that are copied.
"""

from __future__ import annotations

import math

import torch
from transformers import LlamaForCausalLM

#: Fast rotation pairs tell neighbours apart; slow ones compare far tokens.
_FAST_PAIRS = 10
_SLOWEST_ANGLE = 0.003
#: Attention logit that each fast pair gives the distance looked for.
_NEIGHBOUR_LOGIT = 4.0
#: Attention logit of a match, about.
_MATCH_LOGIT = 24.0
#: Size of the predecessor's trace, relative to the token's own part of the state.
_TRACE = 2.0
_COPY_GAIN = 0.25


@torch.no_grad()
def prepare(model: LlamaForCausalLM) -> None:
    """Set the starting weights of a freshly constructed model in place."""
    config = model.config
    hidden, head = config.hidden_size, config.head_dim
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(1.0 / math.sqrt(2 * config.num_hidden_layers))

    frequencies = model.model.rotary_emb.inv_freq
    slow = [pair for pair, f in enumerate(frequencies.tolist()) if f < _SLOWEST_ANGLE]
    compared_dims = [*slow, *(pair + head // 2 for pair in slow)]
    count = len(compared_dims)
    directions = torch.linalg.qr(torch.randn(hidden, hidden)).Q.T
    common, rest = directions[0], directions[1:]
    trace, compared, copied = rest[:count], rest[count : 2 * count], rest[2 * count :]

    embedding = model.model.embed_tokens.weight
    size = embedding.std().item()
    embedding -= embedding @ trace.T @ trace  # the channel belongs to predecessors
    # Common to all tokens and as long as their own part; tied logits ignore it.
    embedding += common * size * math.sqrt(hidden)
    unit = math.sqrt(0.5)  # of one direction in a normalised state, on average

    _look_back(model, common, frequencies.tolist()[:_FAST_PAIRS])
    first = model.model.layers[0].self_attn
    first.v_proj.weight[:count] = compared
    first.o_proj.weight[:, :count] = trace.T * (_TRACE * size / unit)

    second = model.model.layers[1].self_attn
    match = _MATCH_LOGIT * math.sqrt(head) / (count * unit * unit * _TRACE)
    queries_a_key = config.num_attention_heads // config.num_key_value_heads
    for key_head in range(min(2, config.num_key_value_heads)):
        key_row, query_row = key_head * head, key_head * queries_a_key * head
        rows = torch.tensor(compared_dims)
        second.q_proj.weight[query_row + rows] = compared * math.sqrt(match)
        second.k_proj.weight[key_row + rows] = trace * math.sqrt(match)
        moved = copied[key_head * head : (key_head + 1) * head]
        second.v_proj.weight[key_row : key_row + len(moved)] = moved
        second.o_proj.weight[:, query_row : query_row + len(moved)] = moved.T * _COPY_GAIN


def _look_back(model: LlamaForCausalLM, common: torch.Tensor, frequencies: list[float]) -> None:
    """Make the first head of the first layer attend one token back, the second two."""
    config = model.config
    head = config.head_dim
    seen = math.sqrt(config.hidden_size / 2)  # of `common` in a normalised state
    gain = math.sqrt(_NEIGHBOUR_LOGIT * math.sqrt(head)) / seen
    attention = model.model.layers[0].self_attn
    for pair, frequency in enumerate(frequencies):
        attention.k_proj.weight[pair] += gain * common
        for distance in range(1, min(2, config.num_attention_heads) + 1):
            row = (distance - 1) * head + pair
            angle = -distance * frequency
            attention.q_proj.weight[row] += gain * math.cos(angle) * common
            attention.q_proj.weight[row + head // 2] += gain * math.sin(angle) * common
