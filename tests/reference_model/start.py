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
_SLOWEST_ANGLE = 0.006
#: Attention logit that each fast pair gives the distance looked for.
_NEIGHBOUR_LOGIT = 4.0
#: Attention logit of each of the two tokens that can match, about.
_MATCH_LOGIT = 16.0
#: Sizes relative to the token's own part of the state: of a trace, of what is copied.
_TRACE = 2.0
_COPY = 4.0
#: Token vectors are this much larger than other noise: traces are told apart by them.
_EMBEDDING_SCALE = 5.0


@torch.no_grad()
def prepare(model: LlamaForCausalLM) -> None:
    """Set the starting weights of a freshly constructed model in place."""
    config = model.config
    hidden, head = config.hidden_size, config.head_dim
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_(1.0 / math.sqrt(2 * config.num_hidden_layers))

    frequencies = model.model.rotary_emb.inv_freq.tolist()
    slow = [pair for pair, f in enumerate(frequencies) if f < _SLOWEST_ANGLE]
    slow = slow[: len(slow) // 2 * 2]
    # Half of the slow pairs compare the present token, the other half the one before it.
    dims_now, dims_before = (
        torch.tensor([*pairs, *(pair + head // 2 for pair in pairs)])
        for pairs in (slow[::2], slow[1::2])
    )
    count = len(dims_now)
    directions = torch.linalg.qr(torch.randn(hidden, hidden)).Q.T
    common, trace_one, trace_two, compared, copied = directions.split(
        [1, count, count, count, hidden - 1 - 3 * count]
    )

    embedding = model.model.embed_tokens.weight
    embedding *= _EMBEDDING_SCALE
    for trace in (trace_one, trace_two):  # these channels belong to the tokens before
        embedding -= embedding @ trace.T @ trace
    model.lm_head.weight.copy_(embedding / _EMBEDDING_SCALE)
    size = embedding.std().item()
    embedding += common * size * math.sqrt(hidden)
    unit = math.sqrt(0.5)  # of one direction in a normalised state, on average

    first = model.model.layers[0].self_attn
    _look_back(model, common[0], frequencies[:_FAST_PAIRS])
    first.v_proj.weight[:count] = compared
    for row, trace in ((0, trace_one), (head, trace_two)):
        first.o_proj.weight[:, row : row + count] = trace.T * (_TRACE * size / unit)

    second = model.model.layers[1].self_attn
    strength = _MATCH_LOGIT * math.sqrt(head) / (count * unit * unit * _TRACE)
    queries_a_key = config.num_attention_heads // config.num_key_value_heads
    for key_head in range(min(2, config.num_key_value_heads)):
        key_row, query_row = key_head * head, key_head * queries_a_key * head
        # The token before a candidate is this one, the one before that is this one's.
        second.q_proj.weight[query_row + dims_now] = compared * math.sqrt(strength)
        second.k_proj.weight[key_row + dims_now] = trace_one * math.sqrt(strength)
        second.q_proj.weight[query_row + dims_before] = trace_one * math.sqrt(strength / _TRACE)
        second.k_proj.weight[key_row + dims_before] = trace_two * math.sqrt(strength / _TRACE)
        moved = copied[key_head * head : (key_head + 1) * head]
        second.v_proj.weight[key_row : key_row + len(moved)] = moved
        second.o_proj.weight[:, query_row : query_row + len(moved)] = moved.T * (
            _COPY * size / unit
        )


def gentle(model: LlamaForCausalLM) -> set[int]:
    """Ids of the parameters that carry the circuit; full learning rates would erase it."""
    layers = model.model.layers
    parts = [model.model.embed_tokens, layers[0].self_attn, layers[1].self_attn]
    return {id(parameter) for part in parts for parameter in part.parameters()}


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
