"""Multi-head latent attention: what its cache holds of a token.

vLLM keeps one vector per token and layer: the normed latent, then the part of the key that is
rotated. Attention makes keys and values of all heads from it. Here the rotated part is K and the
latent is V, so that RoPE is undone where there is any, and each has a basis and plans of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvtc_vllm.vllm_cache.cache_dtype import PLAIN
from kvtc_vllm.vllm_cache.compat import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec


def is_latent(spec: Any) -> bool:
    """Whether a cache group of vLLM is of latents."""
    return type(spec).__name__ == "MLAAttentionSpec"


def latent_sizes(vllm_config: VllmConfig, spec: AttentionSpec) -> tuple[int, int]:
    """Elements per token of the rotated part and of the latent.

    Raises UnsupportedError for caches that hold something else besides, and for fp8.
    """
    text = vllm_config.model_config.hf_text_config
    rotated = int(getattr(text, "qk_rope_head_dim", 0) or 0)
    latent = int(getattr(text, "kv_lora_rank", 0) or 0)
    if not rotated or not latent or rotated + latent != spec.head_size:
        raise UnsupportedError(
            f"a cache of MLA with {spec.head_size} elements per token is refused: the model's "
            f"latent of {latent} and rotated key of {rotated} do not make it up, so it is one of "
            "sparse attention's, which KVTC does not read"
        )
    name = str(vllm_config.cache_config.cache_dtype)
    if name not in PLAIN:
        raise UnsupportedError(
            f"--kv-cache-dtype={name!r} is refused for MLA, whose latents and keys share a scale; "
            "use auto, bfloat16 or float16"
        )
    return rotated, latent
