"""A rank's artifacts, cache group by cache group, fitted to the live model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from kvtc_vllm.artifact.directory import group_directory, load_rank_artifact
from kvtc_vllm.codec.artifact import Kind, RankArtifact
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.rope import Rope
from kvtc_vllm.connector.stages import stage_artifact
from kvtc_vllm.connector.transfers import FoundArtifact
from kvtc_vllm.offload.geometry import CacheGroup, codec_geometry

ROPE_TOLERANCE = 0.02
"""Largest difference of a live cos/sin table from the calibrated one.

Tables are rounded to the model's dtype (bf16: 2^-9 of values up to about 1.4), and a
model may be calibrated in one dtype and served in another; another RoPE differs by
far more.
"""

Rotation = tuple[tuple[Rope, ...], tuple[int | None, ...]]
"""The live RoPE tables of a cache group, and each layer's index into them."""


def load_artifacts(
    directory: Path | None,
    groups: Sequence[CacheGroup],
    rank: int,
    layers: tuple[int, int] | None,
    rotations: Sequence[Rotation],
    scales: Sequence[dict[Kind, torch.Tensor] | None],
) -> list[FoundArtifact | None]:
    """A tensor-parallel rank's artifact of each cache group of attention, with what is live.

    directory: of all of them; None for a codec that needs none. layers: first and end of those of
    this pipeline stage; None: all. rotations, scales: by cache group. Raises ArtifactError.
    """
    if directory is None:
        return [None] * len(groups)
    return [
        _load_artifact(group_directory(directory, number), group, rank, layers, *rotation, scale)
        for number, (group, rotation, scale) in enumerate(
            zip(groups, rotations, scales, strict=True)
        )
    ]


def _load_artifact(
    directory: Path,
    group: CacheGroup,
    rank: int,
    layers: tuple[int, int] | None,
    ropes: tuple[Rope, ...],
    layer_rope: tuple[int | None, ...],
    scales: dict[Kind, torch.Tensor] | None,
) -> FoundArtifact:
    """A cache group's artifact, with the live RoPE tables and scales.

    layers: first and end of those of this pipeline stage; None: all.
    """
    artifact, _, probe = load_rank_artifact(directory, rank)
    if layers is not None:
        artifact = stage_artifact(artifact, *layers)
        probe = replace(probe, k=probe.k[:, slice(*layers)], v=probe.v[:, slice(*layers)])
    expected = codec_geometry(group, artifact.geometry.layer_groups)
    if artifact.geometry != expected:
        raise ArtifactError(
            f"{directory}: calibrated for {artifact.geometry}, the engine's cache is {expected}"
        )
    check_ropes(artifact, ropes, layer_rope, directory)
    # The live tables may be longer or of another dtype; they are what the cache was made with.
    live = replace(artifact, ropes=ropes, layer_rope=layer_rope, scales=scales)
    return FoundArtifact(live, probe, directory)


def check_ropes(
    artifact: RankArtifact,
    ropes: tuple[Rope, ...],
    layer_rope: tuple[int | None, ...],
    directory: Path,
) -> None:
    """Raise ArtifactError unless the live model rotates keys as the calibrated one did."""
    for layer, (ours, theirs) in enumerate(zip(layer_rope, artifact.layer_rope, strict=True)):
        if (ours is None) != (theirs is None):
            raise ArtifactError(
                f"{directory}: layer {layer} was calibrated "
                f"{'without' if theirs is None else 'with'} RoPE, the engine has it otherwise"
            )
        if ours is None or theirs is None:
            continue
        live, stored = ropes[ours], artifact.ropes[theirs]
        common = min(live.max_positions, stored.max_positions)
        same_shape = live.rotary_dim == stored.rotary_dim and live.neox == stored.neox
        if not same_shape or _difference(live, stored, common) > ROPE_TOLERANCE:
            raise ArtifactError(
                f"{directory}: RoPE of layer {layer} differs from the calibrated one (rope "
                "settings of the engine, such as --hf-overrides or --max-model-len); calibrate "
                "with these settings"
            )


def _difference(live: Rope, stored: Rope, positions: int) -> float:
    a = live.cos_sin[:positions].float().cpu()
    return float((a - stored.cos_sin[:positions].float().cpu()).abs().max())
