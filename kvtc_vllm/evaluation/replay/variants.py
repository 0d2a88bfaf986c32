"""Changed versions of our own codec for the ablations, made in the worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvtc_vllm.artifact.fingerprint import artifact_fingerprint
from kvtc_vllm.codec.artifact import RankArtifact, SectionBasis, SectionName
from kvtc_vllm.codec.base import Blob, Coder, DecodedChunk
from kvtc_vllm.codec.bitplan import budget_bits
from kvtc_vllm.codec.container import parse
from kvtc_vllm.codec.errors import ArtifactError
from kvtc_vllm.codec.frame import TransformCodec
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.payload import BitPlan, CoefficientGroup, bit_plan
from kvtc_vllm.codec.quantizers import REGISTRY, group_cost_bits
from kvtc_vllm.codec.registry import CODECS, open_codec


@dataclass(frozen=True)
class VariantContext:
    """What a variant starts from: an artifact with the live RoPE tables, and a target ratio."""

    artifact: RankArtifact
    ratio: float
    dtype: torch.dtype
    options: dict[str, Any]

    def codec(self, **changes: Any) -> TransformCodec:
        """Our codec with fields of the artifact changed."""
        artifact = replace(self.artifact, **changes)
        fingerprint = artifact_fingerprint(
            artifact.geometry, artifact.sections, artifact.sink_tokens, artifact.sink_rule
        )
        artifact = replace(artifact, fingerprint=fingerprint)
        return open_codec(artifact.codec, self.dtype, artifact=artifact, ratio=self.ratio)

    def with_plans(self, make: Callable[[SectionBasis, SectionName], BitPlan]) -> TransformCodec:
        """Our codec with another plan at the ratio, one per section.

        Raises ArtifactError for another codec than version 1, whose plans these are.
        """
        if self.artifact.codec != KvtcCodec.name:
            raise ArtifactError(
                f"this variant changes bit plans, and the artifact is for codec "
                f"{self.artifact.codec!r}; take one for {KvtcCodec.name!r}"
            )
        sections = {
            (group, name): replace(section, plans={self.ratio: make(section, name)})
            for (group, name), section in self.artifact.sections.items()
        }
        return self.codec(sections=sections)


def unchanged(context: VariantContext) -> TransformCodec:
    """Our codec as it is, for artifacts fitted in another way."""
    return context.codec()


def coded_sinks(context: VariantContext) -> TransformCodec:
    """The oldest tokens go through the transform like all others."""
    return context.codec(sink_tokens=0)


def rope_kept(context: VariantContext) -> TransformCodec:
    """Keys are coded as they lie in the cache; the artifact must have been fitted on such."""
    return context.codec(layer_rope=(None,) * context.artifact.geometry.num_layers)


def mixed_ratios(context: VariantContext) -> TransformCodec:
    """Keys at the plan of ratio `options["k"]`, values at that of `options["v"]`."""

    def plan(section: SectionBasis, name: SectionName) -> BitPlan:
        return replace(bit_plan(section, float(context.options[name])), ratio=context.ratio)

    return context.with_plans(plan)


def truncated(context: VariantContext) -> TransformCodec:
    """PCA without allocation: as many leading coefficients as the bits allow, all of one type.

    options: type, a quantiser; size, coefficients that share a scale.
    """
    kind, size = context.options["type"], int(context.options["size"])
    cost = group_cost_bits(REGISTRY[kind].bits, size)

    def plan(section: SectionBasis, name: SectionName) -> BitPlan:
        row_size, rank = section.basis.shape
        count = min(budget_bits(row_size, context.ratio) // cost, rank // size)
        groups = tuple(CoefficientGroup(i * size, size, kind) for i in range(count))
        return BitPlan(context.ratio, groups, float("nan"))

    return context.with_plans(plan)


class StoredWindowCodec(Coder):
    """The paper's recent window: chunks from position `raw_from` on are stored as they are.

    Only the bench can do this, since it knows where a prompt will end when it is stored.
    """

    def __init__(self, coded: TransformCodec, raw_from: int) -> None:
        self._coded = coded
        self._raw = open_codec("raw", coded.dtype, geometry=coded.geometry)
        self._raw_from = raw_from

    def encode(self, k: torch.Tensor, v: torch.Tensor, start: int, key: bytes = b"") -> bytes:
        """Encode with the codec before the window, raw in it."""
        codec = self._raw if start >= self._raw_from else self._coded
        return codec.encode(k, v, start, key)

    def decode(
        self,
        blob: Blob,
        expect_start: int | None = None,
        expect_tokens: int | None = None,
        key: bytes = b"",
    ) -> DecodedChunk:
        """Decode with the codec that wrote the blob."""
        raw = parse(blob).header.codec_id == CODECS["raw"].codec_id
        codec = self._raw if raw else self._coded
        return codec.decode(blob, expect_start, expect_tokens, key)


def stored_window(context: VariantContext) -> StoredWindowCodec:
    """options: raw_from, first position stored raw."""
    return StoredWindowCodec(context.codec(), int(context.options["raw_from"]))


VARIANTS: dict[str, Callable[[VariantContext], Coder]] = {
    "unchanged": unchanged,
    "coded-sinks": coded_sinks,
    "rope-kept": rope_kept,
    "mixed-ratios": mixed_ratios,
    "truncated": truncated,
    "stored-window": stored_window,
}
