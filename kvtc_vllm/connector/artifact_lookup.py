"""The artifact of an engine, found alike on both sides of the connector."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvtc_vllm.artifact import registry
from kvtc_vllm.artifact.card import CacheGroupCard, load_card, ratio_within
from kvtc_vllm.artifact.directory import group_directory
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.codec.registry import CODECS, max_blob_bytes
from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.connector.geometry import layer_number
from kvtc_vllm.connector.state_transfer import STATE_ELEMENT, state_geometry
from kvtc_vllm.offload.geometry import CacheGeometry, codec_geometry

if TYPE_CHECKING:
    from vllm.config import ModelConfig

logger = logging.getLogger("vllm.kvtc")


def group_cards(geometry: CacheGeometry) -> tuple[CacheGroupCard, ...]:
    """The cache groups of attention as an artifact's card has them; none if there is one."""
    if len(geometry.coded_groups) == 1:
        return ()
    return tuple(
        CacheGroupCard(
            attention=str(group.reach), layers=tuple(map(layer_number, group.layer_names))
        )
        for group in geometry.coded_groups
    )


def find_artifact(
    model: ModelConfig, config: KVTCConfig, geometry: CacheGeometry
) -> tuple[Path, str]:
    """Directory of the artifact, and the fingerprint of the model's files.

    model: vLLM's configuration of it. Raises ArtifactError if nothing fits.
    """
    identity = model_identity(model.model, model.revision)
    directory = registry.find(
        identity,
        tp_size=geometry.tp_size,
        ratio=config.target_ratio,
        model_name=model.model,
        codec=config.codec,
        quality=config.quality,
        artifact=config.artifact,
        registries=config.registry,
        groups=group_cards(geometry),
    )
    return directory, identity.identity


def with_ratio(model: ModelConfig, config: KVTCConfig, geometry: CacheGeometry) -> KVTCConfig:
    """The configuration with the ratio that its `quality` stands for, and that artifact.

    Unchanged without one. Raises ArtifactError if no artifact has a ratio of that quality.
    """
    if config.quality is None:
        return config
    directory, _ = find_artifact(model, config, geometry)
    ratio = ratio_within(load_card(directory), config.quality)
    logger.info("kvtc: quality %g is %gx of artifact %s", config.quality, ratio, directory.name)
    return msgspec.structs.replace(config, quality=None, ratio=ratio, artifact=str(directory))


def record_bounds(model: ModelConfig, config: KVTCConfig, geometry: CacheGeometry) -> list[int]:
    """By cache group, most bytes of a record on any rank, from the artifact's card alone.

    Raises ArtifactError if the codec needs an artifact and none fits.
    """
    coded = iter(_coded_bounds(model, config, geometry))
    return [
        max_blob_bytes("raw", STATE_ELEMENT, 1, geometry=state_geometry(group))
        if group.state_bytes
        else next(coded)
        for group in geometry.groups
    ]


def _coded_bounds(model: ModelConfig, config: KVTCConfig, geometry: CacheGeometry) -> list[int]:
    """Of the cache groups of attention."""
    name, tokens, groups = config.codec, config.chunk_tokens, geometry.coded_groups
    if not CODECS[name].needs_artifact:
        return [
            max_blob_bytes(name, group.dtype, tokens, geometry=codec_geometry(group))
            for group in groups
        ]
    directory, _ = find_artifact(model, config, geometry)
    cards = [load_card(group_directory(directory, n)) for n in range(len(groups))]
    return [
        max_blob_bytes(
            name,
            group.dtype,
            tokens,
            geometry=card.geometry,
            sink_tokens=card.sink_tokens,
            ratio=config.target_ratio,
        )
        for group, card in zip(groups, cards, strict=True)
    ]
