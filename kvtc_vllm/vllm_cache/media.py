"""What vLLM calls images and other media in its block hashes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtc_vllm.vllm_cache.compat import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_media_names(vllm_config: VllmConfig) -> None:
    """Raise UnsupportedError if media are named by when they came, not by what they are.

    Without its prefix cache and without its cache of processed media vLLM numbers them from 1 in
    every process (`_process_mm_uuids` of its renderer). So the first image of each start would have
    the KV of the first image of the start before. Within one engine no number comes twice.
    """
    media = getattr(vllm_config.model_config, "multimodal_config", None)
    if media is None or getattr(media, "language_model_only", False):
        return
    if media.mm_processor_cache_gb == 0 and not vllm_config.cache_config.enable_prefix_caching:
        raise UnsupportedError(
            "disk_path needs media that are named by their content, and vLLM numbers them with "
            "--no-enable-prefix-caching and --mm-processor-cache-gb 0; remove either"
        )
