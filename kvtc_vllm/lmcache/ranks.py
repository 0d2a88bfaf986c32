"""Which part of the model an LMCache object holds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvtc_vllm.codec.artifact import RankArtifact
from kvtc_vllm.codec.errors import ArtifactError


@dataclass(frozen=True)
class Shard:
    """One worker of tp x pp; vLLM numbers workers pp_rank * tp + tp_rank."""

    world: int
    rank: int
    pipeline_ranks: int

    @property
    def tp_size(self) -> int:
        """Tensor-parallel size."""
        return self.world // self.pipeline_ranks

    @property
    def tp_rank(self) -> int:
        """Rank among those that share this one's layers."""
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        """Which part of the layers."""
        return self.rank // self.tp_size


def shard_of(kv_rank: int, pipeline_ranks: int) -> Shard:
    """Read LMCache's kv_rank: world << 24 | rank << 16 | local world << 8 | local rank.

    Raises ArtifactError if it can't be a rank of such a set-up.
    """
    shard = Shard((kv_rank >> 24) & 0xFF, (kv_rank >> 16) & 0xFF, pipeline_ranks)
    if shard.world < 1 or shard.world % pipeline_ranks or shard.rank >= shard.world:
        raise ArtifactError(
            f"kv_rank {kv_rank:#010x} is rank {shard.rank} of {shard.world}, which does not "
            f"fit pipeline_ranks={pipeline_ranks}"
        )
    return shard


def layers_of_stage(artifact: RankArtifact, first: int, end: int) -> RankArtifact:
    """The artifact for layers first .. end - 1 alone.

    Raises ArtifactError unless layer groups begin and end there: what was fitted over layers of
    two pipeline stages can't be coded by either of them.
    """
    geometry = artifact.geometry
    groups = [
        (number, group)
        for number, group in enumerate(geometry.layer_groups)
        if first <= group[0] and group[1] <= end
    ]
    if sum(group[1] - group[0] for _, group in groups) != end - first:
        raise ArtifactError(
            f"layers {first}..{end - 1} of this pipeline stage are not whole layer groups of "
            f"{geometry.layer_groups}; calibrate with layer groups that divide the stages"
        )
    rule = artifact.sink_rule
    if rule is not None:
        whole = first <= rule.layers[0] and rule.layers[-1] < end
        # A stage that does not have all layers that tell sinks marks none.
        own = tuple(layer - first for layer in rule.layers)
        rule = replace(rule, layers=own) if whole else None
    return replace(
        artifact,
        sink_rule=rule,
        geometry=replace(
            geometry,
            num_layers=end - first,
            layer_groups=tuple((a - first, b - first) for _, (a, b) in groups),
        ),
        sections={
            (place, kind): section
            for place, (number, _) in enumerate(groups)
            for (owner, kind), section in artifact.sections.items()
            if owner == number
        },
        layer_rope=artifact.layer_rope[first:end],
    )


def stage_layers(num_layers: int, pipeline_ranks: int, pp_rank: int) -> tuple[int, int]:
    """First and end layer of a stage, as vLLM divides them unless told otherwise.

    What is left over after an even division goes one layer each to the last stages but the very
    last, which also holds the output head.
    """
    sizes = [num_layers // pipeline_ranks] * pipeline_ranks
    for i in range(num_layers % pipeline_ranks):
        sizes[pipeline_ranks - 2 - i] += 1
    first = sum(sizes[:pp_rank])
    return first, first + sizes[pp_rank]
