"""Which element type the engine's KV cache has; refusals of those that KVTC does not read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvtc_vllm.vllm_cache.compat import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import CacheConfig, VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

PLAIN = {
    "auto": (torch.bfloat16, torch.float16, torch.float32),
    "bfloat16": (torch.bfloat16,),
    "float16": (torch.float16,),
    "float32": (torch.float32,),
}
"""What the elements may be, by `kv_cache_dtype`."""
FP8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
_REASONS = {
    "per_token_head": "it keeps a scale of every token and head beside the elements",
    "nvfp4": "it packs two 4-bit elements a byte and scales of blocks",
    "quant_": "it packs codes of a few bits and norms",
    "int8": "it holds integers",
    "fp8_inc": "it is Gaudi's",
    "ds_mla": "it is the cache of MLA models",
}
"""Part of the name of a format -> why it is refused."""
_ACCEPTED = "use auto, bfloat16, float16, fp8, fp8_e4m3 or fp8_e5m2"


def is_fp8(dtype: torch.dtype) -> bool:
    """Whether elements may have scales."""
    return dtype in FP8.values()


def cache_dtype(vllm_config: VllmConfig, spec: AttentionSpec) -> torch.dtype:
    """Element type of the cache that `spec` describes.

    vLLM stores fp8 as uint8. Raises UnsupportedError with one clear sentence.
    """
    config = vllm_config.cache_config
    name = str(config.cache_dtype)
    stored: torch.dtype = spec.dtype
    if stored in PLAIN.get(name, ()):
        return stored
    if name not in FP8:
        reason = next((why for part, why in _REASONS.items() if part in name), None)
        because = f", because {reason}" if reason else ""
        raise UnsupportedError(f"--kv-cache-dtype {name} is refused{because}; {_ACCEPTED}")
    return _fp8_dtype(config, name, stored)


def _fp8_dtype(config: CacheConfig, name: str, stored: torch.dtype) -> torch.dtype:
    from vllm.platforms import current_platform

    if stored not in (torch.uint8, FP8[name]):
        raise UnsupportedError(
            f"--kv-cache-dtype {name} with layers of {stored} (--kv-cache-dtype-skip-layers) is "
            "refused; KVTC reads caches of one element type"
        )
    if current_platform.is_fp8_fnuz():
        raise UnsupportedError(
            f"--kv-cache-dtype {name} is refused on this GPU, whose fp8 is the fnuz kind; "
            "use auto, bfloat16 or float16"
        )
    if getattr(config, "calculate_kv_scales", False):
        raise UnsupportedError(
            "--calculate-kv-scales is refused, because it changes scales while requests run; "
            "use scales from the checkpoint, or none"
        )
    return FP8[name]


def movable(x: torch.Tensor) -> torch.Tensor:
    """fp8 as bytes: few operations take it on every device."""
    return x.view(torch.uint8) if is_fp8(x.dtype) else x
