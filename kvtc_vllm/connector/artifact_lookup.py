"""The artifact of an engine, found alike on both sides of the connector."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvtc_vllm.artifact import registry
from kvtc_vllm.artifact.card import load_card
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.codec.registry import CODECS, max_blob_bytes
from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.connector.compat import UnsupportedError
from kvtc_vllm.offload.geometry import CacheGeometry, codec_geometry

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def find_artifact(model: ModelConfig, config: KVTCConfig, tp_size: int) -> tuple[Path, str]:
    """Directory of the artifact, and the fingerprint of the model's files.

    model: vLLM's configuration of it. Raises ArtifactError if nothing fits.
    """
    identity = model_identity(model.model, model.revision)
    directory = registry.find(
        identity,
        tp_size=tp_size,
        ratio=config.target_ratio,
        model_name=model.model,
        artifact=config.artifact,
        registries=config.registry,
    )
    return directory, identity.identity


def record_bounds(model: ModelConfig, config: KVTCConfig, geometry: CacheGeometry) -> list[int]:
    """By cache group, most bytes of a record on any rank, from the artifact's card alone.

    Raises ArtifactError if the codec needs an artifact and none fits, UnsupportedError if
    artifacts of such a model can't be.
    """
    name, tokens = config.codec, config.chunk_tokens
    if not CODECS[name].needs_artifact:
        return [
            max_blob_bytes(name, group.dtype, tokens, geometry=codec_geometry(group))
            for group in geometry.groups
        ]
    if len(geometry.groups) > 1:
        raise UnsupportedError(
            f"codec={name!r} serves models with one kind of attention, and this one has "
            f"{len(geometry.groups)}; use codec='raw', or --disable-hybrid-kv-cache-manager"
        )
    group = geometry.only_group
    directory, _ = find_artifact(model, config, geometry.tp_size)
    card = load_card(directory)
    bound = max_blob_bytes(
        name,
        group.dtype,
        tokens,
        geometry=card.geometry,
        sink_tokens=card.sink_tokens,
        ratio=config.target_ratio,
    )
    return [bound]
