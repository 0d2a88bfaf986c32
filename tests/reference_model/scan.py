"""Mamba2's recurrence in chunks, as matrix products.

transformers computes the same on a CPU with an intermediate of tokens x chunk x state, which is
most of its time. Here it is tokens x chunk x heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn

CHUNK = 64


def scan(
    x: torch.Tensor, steps: torch.Tensor, decay: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """Outputs [rows, tokens, heads, size] of one recurrence per head.

    x: [rows, tokens, heads, size]; steps: [rows, tokens, heads], positive; decay: [heads],
    negative; b, c: [rows, tokens, states], shared by heads. Tokens are whole chunks of `CHUNK`.
    """
    rows, tokens, heads, size = x.shape
    count = tokens // CHUNK
    inputs = (x * steps[..., None]).view(rows, count, CHUNK, heads, size).transpose(2, 3)
    logs = (steps * decay).view(rows, count, CHUNK, heads).transpose(2, 3).cumsum(-1)
    b, c = (t.view(rows, count, 1, CHUNK, -1) for t in (b, c))

    past = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    weights = (logs[..., :, None] - logs[..., None, :]).masked_fill(~past, -torch.inf).exp()
    inside = (c @ b.transpose(-1, -2) * weights) @ inputs

    added = b.transpose(-1, -2) @ (inputs * (logs[..., -1:] - logs).exp()[..., None])
    kept = logs[..., -1].exp()[..., None, None]
    states = [torch.zeros_like(added[:, 0])]
    for chunk in range(count - 1):
        states.append(states[-1] * kept[:, chunk] + added[:, chunk])
    before = (c @ torch.stack(states, 1)) * logs.exp()[..., None]
    return (inside + before).transpose(2, 3).reshape(rows, tokens, heads, size)


def mamba_forward(self: nn.Module, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
    """For training, in the place of the layer's own: no cache, no padding, one group."""
    mamba: Any = self
    rows, tokens, _ = hidden_states.shape
    states, heads = mamba.ssm_state_size, mamba.num_heads
    gate, mixed, steps = mamba.in_proj(hidden_states).split(
        [mamba.intermediate_size, mamba.conv_dim, heads], dim=-1
    )
    mixed = functional.silu(mamba.conv1d(mixed.transpose(1, 2))[..., :tokens]).transpose(1, 2)
    x, b, c = mixed.split([mamba.intermediate_size, states, states], dim=-1)
    x = x.reshape(rows, tokens, heads, mamba.head_dim)
    steps = functional.softplus(steps + mamba.dt_bias)
    out = scan(x, steps, -mamba.A_log.exp(), b, c) + x * mamba.D[:, None]
    return mamba.out_proj(mamba.norm(out.reshape(rows, tokens, -1), gate))
