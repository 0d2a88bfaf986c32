"""Gradients where transformers caches more, or other things, than K and V of every layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
)

from kvtc_vllm.calibration.differentiable import CacheShape, Differentiable, PrefixGradients
from kvtc_vllm.codec.errors import ArtifactError
from tests.calibration.test_gradients import IDS, PREFIX, TINY, letters  # noqa: F401

pytestmark = pytest.mark.usefixtures("letters")
HEADS, SIZE = TINY["num_key_value_heads"], TINY["head_dim"]
ROTATED, LATENT = 8, 24


def hybrid(directory: Path) -> tuple[CacheShape, str]:
    """Three Mamba2 layers, then full attention. Shape of its cache, and where its V is."""
    config = GraniteMoeHybridConfig(
        **TINY,
        shared_intermediate_size=48,
        num_local_experts=0,
        num_experts_per_tok=0,
        layer_types=["mamba", "mamba", "attention", "mamba"],
        position_embedding_type="rope",
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_expand=1,
        mamba_chunk_size=8,
    )
    GraniteMoeHybridForCausalLM(config).save_pretrained(directory)
    size = TINY["hidden_size"] // TINY["num_attention_heads"]
    return CacheShape(1, HEADS, size, size, numbers=(2,)), "values"


def latent(directory: Path) -> tuple[CacheShape, str]:
    """Latents, which transformers calls keys."""
    config = DeepseekV3Config(
        **TINY | {"num_key_value_heads": TINY["num_attention_heads"]},
        q_lora_rank=None,
        kv_lora_rank=LATENT,
        qk_rope_head_dim=ROTATED,
        qk_nope_head_dim=SIZE,
        v_head_dim=SIZE,
        first_k_dense_replace=TINY["num_hidden_layers"],
    )
    DeepseekV3ForCausalLM(config).save_pretrained(directory)
    return CacheShape(TINY["num_hidden_layers"], 1, ROTATED, LATENT), "keys"


@pytest.mark.parametrize("family", [hybrid, latent], ids=lambda made: made.__name__)
def test_gradients_are_the_slopes_of_the_likelihood(family: Any, tmp_path: Path) -> None:
    """Of V, by small steps in transformers' own cache of the prefix."""
    torch.manual_seed(0)
    shape, attribute = family(tmp_path)
    (found,) = gradients(tmp_path, shape)
    network = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.tensor([IDS])
    prefix: Any = DynamicCache(config=network.config)
    with torch.no_grad():
        network(input_ids=tokens[:, :PREFIX], past_key_values=prefix)

    def likelihood(at: tuple[int, int] | None = None, step: float = 0.0) -> torch.Tensor:
        cache = copy.deepcopy(prefix)
        with torch.no_grad():
            if at is not None:
                getattr(cache.layers[shape.places[0]], attribute)[0, 0][at] += step
            logits = network(input_ids=tokens[:, PREFIX:], past_key_values=cache).logits[0]
        return torch.log_softmax(logits.double(), dim=-1)

    chances = likelihood().exp().float()
    labels = torch.multinomial(chances, 1, generator=torch.Generator().manual_seed(3))
    token = PREFIX - 5
    squares = 0.0
    for element in range(shape.head_size_v):
        above, below = (likelihood((token, element), step) for step in (1e-2, -1e-2))
        squares += float((above - below).gather(1, labels).sum() / 2e-2) ** 2
    assert float(found.energies()[1][0, 0, token]) == pytest.approx(squares, rel=0.05)
    assert found.cached_values.shape == (PREFIX, shape.layers, shape.kv_heads, shape.head_size_v)


def test_recurrent_layers_have_no_cache_of_attention(tmp_path: Path) -> None:
    shape, _ = hybrid(tmp_path)
    with pytest.raises(ArtifactError, match="its cache has 1 layers of attention"):
        gradients(tmp_path, CacheShape(4, HEADS, shape.head_size, shape.head_size))


def gradients(directory: Path, shape: CacheShape) -> list[PrefixGradients]:
    return Differentiable(directory, "cpu").gradients(
        IDS, PREFIX, [shape], torch.Generator().manual_seed(3)
    )
