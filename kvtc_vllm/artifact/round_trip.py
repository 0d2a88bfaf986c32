"""What an artifact promises of a round trip: the error of its held-out rows.

The start-up self-test holds the engine's whole path against it, `kvtc doctor` the codec alone.
"""

from __future__ import annotations

import torch

from kvtc_vllm.artifact.rank_file import Probe
from kvtc_vllm.codec.artifact import RankArtifact, SectionName
from kvtc_vllm.codec.frame import TransformCodec
from kvtc_vllm.codec.transform import chunk_rows

GROSS_FACTOR = 4.0
GROSS_SLACK = 0.05
ROUNDINGS = 4.0
"""A round trip fails above GROSS_FACTOR x held-out + ROUNDINGS x rounding + GROSS_SLACK: one
document's rows scatter around the average, a wrong layout or RoPE gives an error near 1. rounding
is what storing these rows in the cache dtype costs by itself: next to nothing in 16 bits, where
artifacts are calibrated, not in fp8. Rows are rounded on the way in and on the way out; two equal
errors that add up have four times the square of one."""


def probe_chunk(
    codec: TransformCodec, probe: Probe, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Rows of the probe, repeated to a chunk at positions past the sinks.

    Returns K post-RoPE and V, float32 [tokens, L, H, D] each, and the position of the first token.
    """
    artifact = codec.artifact
    index = torch.arange(tokens) % probe.k.shape[0]
    limit = min((rope.max_positions for rope in artifact.ropes), default=2**31)
    start = tokens if limit >= 2 * tokens and tokens >= artifact.sink_tokens else 0
    positions = torch.arange(start, start + tokens)
    pre = probe.k[index].float()
    keys = torch.empty_like(pre)
    for layer, which in enumerate(artifact.layer_rope):
        rope = None if which is None else artifact.ropes[which]
        rows = pre[:, layer].to(rope.cos_sin.device) if rope is not None else pre[:, layer]
        keys[:, layer] = rows if rope is None else rope.apply(rows, positions).cpu()
    return keys, probe.v[index].float(), start


def all_rows(
    artifact: RankArtifact, chunk: tuple[torch.Tensor, torch.Tensor], start: int, name: SectionName
) -> torch.Tensor:
    """Rows of all layers, float32 [T, P]."""
    k, v = chunk
    positions = torch.arange(start, start + k.shape[0], device=k.device)
    groups = range(len(artifact.geometry.layer_groups))
    return torch.cat(
        [chunk_rows(k, v, group, name, artifact, positions) for group in groups], dim=1
    )


def round_trip_error(
    codec: TransformCodec,
    before: tuple[torch.Tensor, torch.Tensor],
    after: tuple[torch.Tensor, torch.Tensor],
    start: int,
    name: SectionName,
) -> float:
    """`squared_error` of a chunk, K and V as the cache has them. start: of its first token."""
    rows, other = (all_rows(codec.artifact, chunk, start, name) for chunk in (before, after))
    return squared_error(codec, rows, other, name)


def squared_error(
    codec: TransformCodec, rows: torch.Tensor, other: torch.Tensor, name: SectionName
) -> float:
    """Squared difference over the rows' squared deviation from the mean, as calibrated.

    Both of weighted rows, where the artifact has weights: its held-out errors are of these. name:
    of a section, or a tensor of pairs.
    """
    mean, weights = (x.to(rows.device) for x in _mean_and_weights(codec.artifact, name))
    deviation = (rows - mean) * weights
    total = float(deviation.double().square().sum())
    difference = (rows - other) * weights
    return float(difference.double().square().sum()) / total if total > 0 else 0.0


def _mean_and_weights(
    artifact: RankArtifact, name: SectionName
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the rows of all layers, float32 [P] each."""
    means, weights = [], []
    for group, own_name in artifact.section_keys():
        section = artifact.sections[group, own_name]
        own = torch.ones_like(section.mean) if section.weights is None else section.weights
        for tensor, part in artifact.geometry.row_parts(group, own_name).items():
            if tensor in name:
                means.append(section.mean[part])
                weights.append(own[part])
    return torch.cat(means), torch.cat(weights)


def held_out_error(codec: TransformCodec, name: SectionName) -> float:
    """Held-out error of the artifact in use, averaged over layer groups."""
    errors = [
        section.heldout_error[codec.ratio]
        for (_, own_name), section in codec.artifact.sections.items()
        if own_name == name
    ]
    return sum(errors) / len(errors)


def largest_error(held_out: float, rounding: float = 0.0) -> float:
    """Above it a round trip is not what the artifact promises. rounding: see ROUNDINGS."""
    return GROSS_FACTOR * held_out + ROUNDINGS * rounding + GROSS_SLACK
