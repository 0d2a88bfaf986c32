"""The artifact of an engine, found alike on both sides of the connector."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvtc_vllm.artifact import registry
from kvtc_vllm.artifact.card import CacheGroupCard, load_card, ratio_within
from kvtc_vllm.artifact.directory import group_directory
from kvtc_vllm.artifact.identity import model_identity
from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.registry import CODECS, max_blob_bytes
from kvtc_vllm.config import KVTCConfig
from kvtc_vllm.connector.stages import stage_geometry, stage_layers
from kvtc_vllm.connector.state_transfer import state_codec
from kvtc_vllm.offload.geometry import CacheGeometry, CacheGroup, codec_geometry
from kvtc_vllm.vllm_cache.geometry import layer_number

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


@dataclass(frozen=True)
class Lookup:
    """What one search for an artifact gives.

    config: with the ratio that its `quality` stands for, and that artifact. directory: of the
    artifact; None for a codec that needs none. files: fingerprint of the model's files, or empty
    without an artifact.
    """

    config: KVTCConfig
    directory: Path | None
    files: str


def look_up(model: ModelConfig, config: KVTCConfig, geometry: CacheGeometry) -> Lookup:
    """Find the artifact of an engine. model: vLLM's configuration of it.

    Raises ArtifactError if nothing fits, or has a ratio of that quality.
    """
    if not CODECS[config.codec].needs_artifact:
        return Lookup(config, None, "")
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
    if config.quality is not None:
        ratio = ratio_within(load_card(directory), config.quality)
        logger.info("kvtc: quality %g is %gx of artifact %s", config.quality, ratio, directory.name)
        config = msgspec.structs.replace(config, quality=None, ratio=ratio, artifact=str(directory))
    return Lookup(config, directory, identity.identity)


def record_bounds(model: ModelConfig, lookup: Lookup, geometry: CacheGeometry) -> list[int]:
    """By cache group, most bytes of a record on any rank, from the artifact's card alone.

    Raises ArtifactError if the card can't be read.
    """
    coded = iter(_coded_bounds(model, lookup, geometry))
    return [
        state_codec(group, lookup.config.rounds_states).max_blob_bytes(1)
        if group.state_bytes
        else next(coded)
        for group in geometry.groups
    ]


def _coded_bounds(model: ModelConfig, lookup: Lookup, geometry: CacheGeometry) -> list[int]:
    """Of the cache groups of attention."""
    config, directory, groups = lookup.config, lookup.directory, geometry.coded_groups
    name, tokens = config.codec, config.chunk_tokens
    if directory is None:
        return [
            max(
                max_blob_bytes(name, group.dtype, tokens, geometry=part)
                for part in _raw_geometries(model, geometry, group)
            )
            for group in groups
        ]
    cards = [load_card(group_directory(directory, n)) for n in range(len(groups))]
    return [
        max(
            max_blob_bytes(
                name,
                group.dtype,
                tokens,
                geometry=part,
                sink_tokens=card.sink_tokens,
                ratio=config.target_ratio,
            )
            for part in _stage_geometries(model, geometry, card.geometry)
        )
        for group, card in zip(groups, cards, strict=True)
    ]


def _stage_geometries(
    model: ModelConfig, geometry: CacheGeometry, whole: Geometry
) -> list[Geometry]:
    """An artifact's geometry by pipeline stage."""
    if geometry.pp_size == 1:
        return [whole]
    return [stage_geometry(whole, *layers) for layers in stage_layers(model, geometry)]


def _raw_geometries(
    model: ModelConfig, geometry: CacheGeometry, group: CacheGroup
) -> list[Geometry]:
    """A cache group's geometry by pipeline stage; the scheduler has that of the first."""
    own = codec_geometry(group)
    if geometry.pp_size == 1:
        return [own]
    sizes = [end - first for first, end in stage_layers(model, geometry)]
    return [replace(own, num_layers=size, layer_groups=((0, size),)) for size in sizes]
