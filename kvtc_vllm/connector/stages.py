"""Pipeline parallel: which layers a stage has, and its part of an artifact.

An artifact is of all layers. A stage takes the layer groups that are its own, so no layer group
may reach over the border of two stages (`kvtc calibrate --layers-per-group`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.distributed.utils import get_pp_indices

from kvtc_vllm.artifact.fingerprint import artifact_fingerprint
from kvtc_vllm.codec.artifact import Geometry, RankArtifact
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.kvtc import KvtcCodec

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from kvtc_vllm.offload.geometry import CacheGeometry


@dataclass(frozen=True)
class WorkerRank:
    """A worker's place, all counted from 0: among all, in its stage, and its stage."""

    world: int
    tensor: int
    stage: int


def worker_rank(geometry: CacheGeometry) -> WorkerRank:
    """Of this process; vLLM's groups of ranks must be there."""
    tensor = get_tensor_model_parallel_rank()
    stage = get_pp_group().rank_in_group if geometry.pp_size > 1 else 0
    return WorkerRank(world_rank(geometry, stage, tensor), tensor, stage)


def world_rank(geometry: CacheGeometry, stage: int, tensor: int) -> int:
    """Number of a worker among all."""
    return stage * geometry.tp_size + tensor


def stage_layers(model: ModelConfig, geometry: CacheGeometry) -> list[tuple[int, int]]:
    """First and end of every stage's layers, as vLLM divides them."""
    layers = model.get_total_num_hidden_layers()
    return [get_pp_indices(layers, stage, geometry.pp_size) for stage in range(geometry.pp_size)]


def stage_geometry(whole: Geometry, first: int, end: int) -> Geometry:
    """The part of an artifact's geometry that is of layers first .. end - 1.

    Raises ArtifactError for layer groups that are in part outside.
    """
    inside = [group for group in whole.layer_groups if group[0] < end and group[1] > first]
    if not inside or inside[0][0] != first or inside[-1][1] != end:
        sizes = ", ".join(str(b - a) for a, b in whole.layer_groups)
        raise ArtifactError(
            f"the artifact codes layers in groups of {sizes}, and a pipeline stage has layers "
            f"{first} to {end - 1}; make one with kvtc calibrate --layers-per-group, so that no "
            "group reaches over the border of two stages"
        )
    shifted = tuple((a - first, b - first) for a, b in inside)
    return replace(whole, num_layers=end - first, layer_groups=shifted)


def stage_artifact(whole: RankArtifact, first: int, end: int) -> RankArtifact:
    """The part of an artifact that is of layers first .. end - 1. Raises ArtifactError."""
    if (first, end) == (0, whole.geometry.num_layers):
        return whole
    if whole.codec != KvtcCodec.name:
        raise ArtifactError(
            f"codec {whole.codec} has one step for all layers, so pipeline stages can't share an "
            f"artifact of it; use codec {KvtcCodec.name}"
        )
    geometry = stage_geometry(whole.geometry, first, end)
    before = next(i for i, group in enumerate(whole.geometry.layer_groups) if group[0] == first)
    sections = {
        (group - before, kind): section
        for (group, kind), section in whole.sections.items()
        if 0 <= group - before < len(geometry.layer_groups)
    }
    return replace(
        whole,
        geometry=geometry,
        sections=sections,
        layer_rope=whole.layer_rope[first:end],
        fingerprint=artifact_fingerprint(geometry, sections, whole.sink_tokens, None),
        sink_rule=None,
    )
