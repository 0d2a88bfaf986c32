"""Grafts of the reference model: what they start from, and the scan that trains them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from grafts import GRAFTS, LATENT, ROTATED, Graft
from scan import CHUNK, scan
from transformers import LlamaForCausalLM

MODEL = Path(__file__).parent / "model"


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def test_the_scan_is_what_transformers_computes(teacher: LlamaForCausalLM) -> None:
    torch.manual_seed(0)
    graft = GRAFTS["states"](teacher)
    mixer = graft.mixers[0].eval()
    hidden = torch.randn(2, 3 * CHUNK, 256)
    ours = mixer(hidden)
    theirs = type(mixer).forward(mixer, hidden)
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_scan_is_the_recurrence_token_by_token() -> None:
    """Over several chunks, with states that last."""
    torch.manual_seed(0)
    rows, tokens, heads, size, states = 2, 3 * CHUNK, 2, 4, 8
    x = torch.randn(rows, tokens, heads, size, dtype=torch.float64)
    b, c = torch.randn(2, rows, tokens, states, dtype=torch.float64)
    steps = torch.rand(rows, tokens, heads, dtype=torch.float64) * 0.05
    decay = -torch.tensor([0.1, 2.0], dtype=torch.float64)
    found = scan(x, steps, decay, b, c)
    state = torch.zeros(rows, heads, states, size, dtype=torch.float64)
    for token in range(tokens):
        kept = (steps[:, token] * decay).exp()[..., None, None]
        added = (x * steps[..., None])[:, token]
        state = state * kept + torch.einsum("rn,rhp->rhnp", b[:, token], added)
        wanted = torch.einsum("rn,rhnp->rhp", c[:, token], state)
        assert torch.allclose(found[:, token], wanted, atol=1e-9)


def _missed(graft: Graft, teacher: LlamaForCausalLM, layer: int, hidden: torch.Tensor) -> float:
    turned = teacher.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    attention = teacher.model.layers[layer].self_attn
    wanted = attention(hidden, position_embeddings=turned, attention_mask=None)[0]
    missed = graft.mix(layer, hidden) - wanted
    return (missed.square().mean() / wanted.square().mean()).item()


@torch.no_grad()
def test_latents_start_near_the_attention_that_they_replace(teacher: LlamaForCausalLM) -> None:
    torch.manual_seed(0)
    graft = GRAFTS["latents"](teacher)
    ids = torch.randint(7, 2048, (1, 128))
    states = teacher.model(ids, output_hidden_states=True).hidden_states
    for layer in (0, 4):
        hidden = teacher.model.layers[layer].input_layernorm(states[layer])
        assert _missed(graft, teacher, layer, hidden) < 0.9
    config = graft.model.config
    assert (config.kv_lora_rank, config.qk_rope_head_dim) == (LATENT, ROTATED)
