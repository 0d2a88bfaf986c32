"""Rows of sections from the K and V of chunks, and back. Imports numba."""

from __future__ import annotations

import torch

from kvtc_vllm.codec.artifact import Kind, RankArtifact, SectionKey
from kvtc_vllm.codec.base import DecodedChunk, NewChunk
from kvtc_vllm.codec.cpu.products import Operand
from kvtc_vllm.codec.cpu.rotation import Rotation
from kvtc_vllm.codec.cpu.rows import Floats, Part, centre, uncentre
from kvtc_vllm.codec.cpu.section import FastSection
from kvtc_vllm.codec.cpu.tiles import Span, elements_of
from kvtc_vllm.codec.transform import layer_ropes, layer_scales, to_cache


class CacheRows:
    """What `centre` and `uncentre` take of an artifact's cache. Any number of threads may use it.

    dtype: of the cache. Elements of bfloat16 without scales are read and written where they are,
    all others through a float32 copy of the layer group.
    """

    def __init__(self, artifact: RankArtifact, dtype: torch.dtype) -> None:
        self._artifact = artifact
        self._dtype = dtype
        self._direct = dtype == torch.bfloat16 and artifact.scales is None
        groups = range(len(artifact.geometry.layer_groups))
        unturned = Rotation([None])
        self._rotations: dict[tuple[int, Kind], Rotation] = {(g, "v"): unturned for g in groups}
        self._rotations |= {(g, "k"): Rotation(layer_ropes(artifact, g)) for g in groups}

    def take(
        self, chunk: NewChunk, span: Span, key: SectionKey, section: FastSection, operand: Operand
    ) -> None:
        """Coded rows of a chunk's section: operand, out, those of the span."""
        group, name = key
        first, end = self._artifact.geometry.layer_groups[group]
        parts = []
        for tensor, columns in self._artifact.geometry.row_parts(group, name).items():
            values = (chunk.k if tensor == "k" else chunk.v)[span.first - chunk.start :]
            offset = first * values[0, 0].numel()
            if not self._direct:
                offset = 0
                scales = layer_scales(self._artifact, tensor, first, end, values.device)
                values = values[:, first:end].float()
                values = values if scales is None else values * scales
            rotation = self._rotations[group, tensor]
            angles = rotation.inverse_angles(span.first, span.end)
            parts.append(_part(values, offset, columns, rotation, angles))
        centre(
            tuple(parts),
            section.mean,
            section.weights,
            operand.rows,
            operand.codes,
            operand.factors,
        )

    def give(
        self,
        rows: Floats,
        factors: Floats,
        span: Span,
        key: SectionKey,
        section: FastSection,
        chunk: DecodedChunk,
    ) -> None:
        """Products times factors to a chunk's section: chunk, out. Rows are overwritten."""
        group, name = key
        first, end = self._artifact.geometry.layer_groups[group]
        parts, copies = [], []
        for tensor, columns in self._artifact.geometry.row_parts(group, name).items():
            whole = (chunk.k if tensor == "k" else chunk.v)[span.first - chunk.start :]
            out, offset = whole, first * whole[0, 0].numel()
            if not self._direct:
                out, offset = torch.empty(whole[:, first:end].shape), 0
                copies.append((tensor, out, whole))
            rotation = self._rotations[group, tensor]
            angles = rotation.angles(span.first, span.end)
            parts.append(_part(out, offset, columns, rotation, angles))
        uncentre(rows, factors, section.mean, tuple(parts))
        for tensor, out, whole in copies:
            scales = layer_scales(self._artifact, tensor, first, end, out.device)
            whole[:, first:end] = to_cache(out, scales, self._dtype)


def _part(
    values: torch.Tensor, offset: int, columns: slice, rotation: Rotation, angles: Floats
) -> Part:
    """values: [T, layers, H, D], of which the section's start at `offset` of each token."""
    return Part(
        elements_of(values),
        offset,
        columns.start,
        columns.stop,
        values.shape[-1],
        angles,
        rotation.rope_of_layer,
        rotation.halves,
        rotation.neox,
    )
