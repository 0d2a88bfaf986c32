"""The table of net ratios in docs/models.md, computed from public configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtc_vllm.artifact.cache_kinds import expected_ratio, layer_kinds
from kvtc_vllm.cli.doctor import LENGTHS
from tests.hybrid.public_configs import PUBLIC

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
RATIO = 16.0
BEHIND = 256


def row(model: str) -> str:
    """One line of the table."""
    kinds = layer_kinds(PUBLIC[model])
    layers = ", ".join(f"{kind.layers} {kind.kind}" for kind in kinds)
    everything = sum(kind.token_bytes for kind in kinds if kind.reach is None)
    nearby = sum(kind.token_bytes for kind in kinds if kind.reach is not None)
    states = sum(kind.state_bytes for kind in kinds)
    cells = [model, layers, f"{everything:,}", f"{nearby:,}" if nearby else "-"]
    cells.append(f"{states / 2**20:.0f} MiB" if states else "-")
    for tokens in LENGTHS:
        raw = sum(kind.prefix_bytes(tokens, BEHIND) for kind in kinds)
        ratio = expected_ratio(kinds, tokens, RATIO, BEHIND)
        cells.append(f"{raw / 2**20:,.0f} / {raw / ratio / 2**20:.0f} MiB, {ratio:.1f}x")
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("model", PUBLIC)
def test_the_table_is_computed(model: str) -> None:
    assert row(model) in PAGE.read_text().splitlines()


def test_layers_that_a_configuration_does_not_list() -> None:
    """Gemma 3 and Llama 4 are published without a list of layers; Nemotron-H has a pattern."""
    assert [(k.kind, k.layers) for k in layer_kinds(PUBLIC["Gemma 3 27B"])] == [
        ("full", 10),
        ("window 1024", 52),
    ]
    assert [(k.kind, k.layers) for k in layer_kinds(PUBLIC["Llama 4 Scout"])] == [
        ("full", 12),
        ("local 8192", 36),
    ]
    nemotron = {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "M-M*-M",
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 1,
        "conv_kernel": 4,
    }
    assert [(k.kind, k.layers) for k in layer_kinds(nemotron)] == [("full", 1), ("state", 3)]
