"""Rows <-> coefficients: un-rotate keys, subtract the mean, project on the basis.

A row is one token position of one layer group (see `kvtc_vllm.codec.artifact`).
Everything between the cache dtype and the coefficients is float32
(reference: KVTC, arXiv 2511.01815, section 3.1: D = (X - mean) V, X = D V^T + mean).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvtc_vllm.codec.artifact import KINDS, Kind, RankArtifact, SectionBasis, SectionName
from kvtc_vllm.codec.rope import Rope, rope_spans

SATURATING = (torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Cache dtypes in which a finite float32 may be out of range."""


def layer_ropes(artifact: RankArtifact, group: int) -> tuple[Rope | None, ...]:
    """Rotary embedding of each layer of a layer group, None where keys are not rotated."""
    first, end = artifact.geometry.layer_groups[group]
    return tuple(
        None if index is None else artifact.ropes[index] for index in artifact.layer_rope[first:end]
    )


def layer_scales(
    artifact: RankArtifact, tensor: Kind, first: int, end: int, device: torch.device
) -> torch.Tensor | None:
    """Scales of layers first .. end - 1, float32 [l, 1, 1]; None where all are 1."""
    if artifact.scales is None:
        return None
    return artifact.scales[tensor][first:end, None, None].to(device)


def rows_from_keys(
    keys: torch.Tensor, ropes: Sequence[Rope | None], positions: torch.Tensor
) -> torch.Tensor:
    """Post-RoPE keys [T, l, H, D] of one layer group -> pre-RoPE rows float32 [T, l*H*D].

    ropes: one entry per layer. positions: int64 [T], ascending. Raises
    ValueError for a position outside a RoPE table.
    """
    parts = [
        keys[:, first:end].float() if rope is None else rope.invert(keys[:, first:end], positions)
        for first, end, rope in rope_spans(ropes)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).flatten(1)


def keys_from_rows(
    rows: torch.Tensor,
    ropes: Sequence[Rope | None],
    positions: torch.Tensor,
    num_kv_heads: int,
) -> torch.Tensor:
    """Inverse of `rows_from_keys`: float32 rows [T, l*H*D] -> post-RoPE float32 [T, l, H, D]."""
    keys = rows.reshape(len(rows), len(ropes), num_kv_heads, -1)
    parts = [
        keys[:, first:end] if rope is None else rope.apply(keys[:, first:end], positions)
        for first, end, rope in rope_spans(ropes)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def chunk_rows(
    k: torch.Tensor,
    v: torch.Tensor,
    group: int,
    name: SectionName,
    artifact: RankArtifact,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Rows of one section of a chunk: float32 [T, p].

    k: [T, L, H, D] post-RoPE, v: [T, L, H, Dv], any float dtype, all layers,
    as in the cache. positions: int64 [T], ascending.
    """
    parts = [
        tensor_rows(k if tensor == "k" else v, group, tensor, artifact, positions)
        for tensor in artifact.geometry.row_parts(group, name)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def tensor_rows(
    cache: torch.Tensor, group: int, tensor: Kind, artifact: RankArtifact, positions: torch.Tensor
) -> torch.Tensor:
    """K's or V's part of `chunk_rows`. cache: [T, L, H, D or Dv], all layers."""
    first, end = artifact.geometry.layer_groups[group]
    values = cache[:, first:end].float()
    scales = layer_scales(artifact, tensor, first, end, values.device)
    if scales is not None:
        values = values * scales
    if tensor == "v":
        return values.flatten(1)
    return rows_from_keys(values, layer_ropes(artifact, group), positions)


def rows_to_cache(
    rows: torch.Tensor,
    group: int,
    tensor: Kind,
    artifact: RankArtifact,
    positions: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Inverse of `tensor_rows`: [T, l, H, D or Dv] in the cache dtype."""
    geometry = artifact.geometry
    first, end = geometry.layer_groups[group]
    if tensor == "v":
        cache = rows.reshape(len(rows), end - first, geometry.num_kv_heads, -1)
    else:
        ropes = layer_ropes(artifact, group)
        cache = keys_from_rows(rows, ropes, positions, geometry.num_kv_heads)
    return to_cache(cache, layer_scales(artifact, tensor, first, end, cache.device), dtype)


def mean_chunk(
    artifact: RankArtifact, dtype: torch.dtype, position: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token that is as the mean of calibration: K [1, L, H, D] post-RoPE, V, in `dtype`."""
    positions = torch.tensor([position])

    layers: dict[Kind, list[torch.Tensor]] = {tensor: [] for tensor in KINDS}
    for group, name in artifact.section_keys():
        mean = artifact.sections[group, name].mean[None]
        for tensor, part in artifact.geometry.row_parts(group, name).items():
            rows = mean[:, part]
            layers[tensor].append(rows_to_cache(rows, group, tensor, artifact, positions, dtype))
    return torch.cat(layers["k"], dim=1), torch.cat(layers["v"], dim=1)


def to_cache(values: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The model's values float32 [T, l, H, D] as the cache holds them, to nearest even.

    scales: of `layer_scales`.
    """
    if scales is not None:
        values = values / scales
    if dtype in SATURATING:
        # Reconstruction error may push a value past the largest finite one.
        limit = torch.finfo(dtype).max
        values = values.clamp(-limit, limit)
    return values.to(dtype)


def centred_rows(rows: torch.Tensor, section: SectionBasis) -> torch.Tensor:
    """(rows - mean) * weights, what is projected: float32 [T, p] -> float32 [T, p]."""
    centred = rows - section.mean.to(rows.device)
    if section.weights is not None:
        centred *= section.weights.to(rows.device)
    return centred


def to_coefficients(rows: torch.Tensor, section: SectionBasis, rank: int) -> torch.Tensor:
    """((rows - mean) * weights) @ basis[:, :rank]: float32 [T, p] -> float32 [T, rank]."""
    basis = section.basis[:, :rank].to(rows.device, torch.float32)
    return centred_rows(rows, section) @ basis


def from_coefficients(coefficients: torch.Tensor, section: SectionBasis) -> torch.Tensor:
    """coefficients @ basis[:, :rank]^T / weights + mean: float32 [T, rank] -> float32 [T, p]."""
    rank = coefficients.shape[1]
    basis = section.basis[:, :rank].to(coefficients.device, torch.float32)
    mean = section.mean.to(coefficients.device)
    if section.weights is not None:
        return coefficients @ basis.T / section.weights.to(coefficients.device) + mean
    return torch.addmm(mean, coefficients, basis.T)


def magnitude(x: torch.Tensor) -> float:
    """Largest absolute value of x; NaN if there is one, 0 if x is empty. Waits for the device."""
    if x.numel() == 0:
        return 0.0
    if x.dtype.itemsize == 1:
        # Without their sign, fp8 codes are in the order of their values, infinity and NaN last.
        return float((x.view(torch.uint8) & 0x7F).amax().view(x.dtype))
    return float(magnitudes(x))


def magnitudes(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Largest absolute values along `dim`, or of all of x; NaN where there is one.

    x: not fp8, not empty. Returns the dtype of x. Much faster than torch.isfinite.
    """
    low, high = torch.aminmax(x, dim=dim)
    return torch.maximum(-low, high)
