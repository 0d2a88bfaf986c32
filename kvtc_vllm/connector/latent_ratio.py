"""How far latents of multi-head latent attention may be coded."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

import msgspec

from kvtc_vllm.artifact.cache_kinds import LATENT_RATIO
from kvtc_vllm.codec.registry import CODECS

if TYPE_CHECKING:
    from kvtc_vllm.config import KVTCConfig
    from kvtc_vllm.offload.geometry import CacheGeometry

logger = logging.getLogger("vllm.kvtc")


def with_latent_ratio(
    config: KVTCConfig, geometry: CacheGeometry, given: Collection[str]
) -> KVTCConfig:
    """The configuration with the target ratio of a preset, or the default, capped for latents.

    given: keys that the user has set. A latent is a learnt low-rank code already, and only a
    small trained model has been measured at more; who sets `ratio` gets it.
    """
    latent = any(group.latent for group in geometry.groups)
    coded = CODECS[config.codec].needs_artifact
    if not latent or not coded or "ratio" in given or config.target_ratio <= LATENT_RATIO:
        return config
    logger.warning(
        "kvtc: target ratio %g instead of %g: of models with latent attention only a small one was "
        'measured above it; set "ratio" to have another',
        LATENT_RATIO,
        config.target_ratio,
    )
    return msgspec.structs.replace(config, ratio=LATENT_RATIO)
