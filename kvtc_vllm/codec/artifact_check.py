"""Whether the parts of an artifact fit together, before a codec computes with them."""

from __future__ import annotations

import torch

from kvtc_vllm.codec.artifact import APART, KINDS, PAIRED, RankArtifact
from kvtc_vllm.codec.container import FINGERPRINT_BYTES, MAX_SINK_TOKENS
from kvtc_vllm.codec.errors import ArtifactError


def check_artifact(artifact: RankArtifact) -> None:
    """Raise ArtifactError unless sections, shapes, scales and fingerprint fit together."""
    geometry = artifact.geometry
    if not 0 <= artifact.sink_tokens <= MAX_SINK_TOKENS:
        raise ArtifactError(
            f"sink_tokens is {artifact.sink_tokens}, 0 to {MAX_SINK_TOKENS} are right"
        )
    if len(artifact.fingerprint) != FINGERPRINT_BYTES:
        raise ArtifactError(f"fingerprint of {len(artifact.fingerprint)} bytes")
    for kind, scales in (artifact.scales or {}).items():
        good = scales.shape == (geometry.num_layers,) and scales.dtype == torch.float32
        if not good or not bool((scales.isfinite() & (scales > 0)).all()):
            raise ArtifactError(f"scales of {kind} must be a positive float32 for every layer")
    if artifact.scales is not None and set(artifact.scales) != set(KINDS):
        raise ArtifactError(f"scales are of {sorted(artifact.scales)}, not of k and v")
    either, other = (geometry.section_keys(names) for names in (APART, PAIRED))
    if sorted(artifact.sections) not in (sorted(either), sorted(other)):
        raise ArtifactError(f"sections {sorted(artifact.sections)} are not {either} or {other}")
    for (group, name), section in artifact.sections.items():
        p = geometry.row_size(group, name)
        if tuple(section.mean.shape) != (p,) or section.basis.shape[:1] != (p,):
            raise ArtifactError(f"mean or basis of section {group}{name} is not for rows of {p}")
        _check_weights(section.weights, p, f"{group}{name}")
        for coder in section.plans.values():
            if coder.total_rank > section.basis.shape[1]:
                raise ArtifactError(
                    f"a plan of section {group}{name} needs rank {coder.total_rank}"
                )


def _check_weights(weights: torch.Tensor | None, p: int, name: str) -> None:
    if weights is None:
        return
    good = tuple(weights.shape) == (p,) and weights.dtype == torch.float32
    if not good or not bool((weights.isfinite() & (weights > 0)).all()):
        raise ArtifactError(f"weights of section {name} must be {p} positive float32")
