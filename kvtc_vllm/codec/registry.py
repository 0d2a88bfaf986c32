"""Chunk codecs by name, and what opens them. One file per codec, one row here.

codec = open_codec("kvtc", torch.bfloat16, artifact=artifact, ratio=16.0)
codec = open_codec("raw", torch.bfloat16, geometry=geometry)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import overload

import torch

from kvtc_vllm.codec.artifact import Geometry, RankArtifact, SectionBasis, SectionKey
from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.bitplan import budget_bytes, over_budget
from kvtc_vllm.codec.container import NO_FINGERPRINT
from kvtc_vllm.codec.cpu import fast_kvtc, fast_kvtc2
from kvtc_vllm.codec.frame import TransformCodec, largest_blob
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.payload import read_plan
from kvtc_vllm.codec.raw import RawCodec
from kvtc_vllm.codec.section_coder import CoderTensors, SectionCoder
from kvtc_vllm.codec.v2.codec import Kvtc2Codec
from kvtc_vllm.codec.v2.plan import most_bytes, over_ratio, read_step_plan


@dataclass(frozen=True)
class ArtifactRules:
    """How a rank file's section coders are read for a codec.

    read_coder: (tensors, target ratio, expected error, columns of the basis) -> section coder;
    raises ArtifactError.
    wrong_sections: what is wrong with all sections together, in words; None if nothing is.
    max_bytes: (elements of a row of K and one of V together, target ratio, coded tokens) -> most
    bytes that both take in a blob, for any section coders that `wrong_sections` lets pass.
    pairs: whether K and V of a layer group may share a basis.
    """

    read_coder: Callable[[CoderTensors, float, float, int], SectionCoder]
    wrong_sections: Callable[[Mapping[SectionKey, SectionBasis]], str | None]
    max_bytes: Callable[[int, float, int], int]
    pairs: bool = False


@dataclass(frozen=True)
class CodecSpec:
    """A row of `CODECS`: a codec that needs an artifact is a `TransformCodec` and has rules.

    has_kernels: `kvtc_vllm.codec.kernels` can encode and decode it on a GPU. fast: a subclass of
    `codec` that reads and writes the same blobs faster on a CPU; None where it can't run.
    """

    codec: type[ChunkCodec]
    rules: ArtifactRules | None = None
    has_kernels: bool = False
    fast: Callable[[], type[TransformCodec] | None] | None = None

    @property
    def codec_id(self) -> int:
        """Number in the container header."""
        return self.codec.codec_id

    @property
    def needs_artifact(self) -> bool:
        return self.rules is not None

    @property
    def pairs(self) -> bool:
        """Whether K and V of a layer group may share a basis."""
        return self.rules is not None and self.rules.pairs


CODECS: dict[str, CodecSpec] = {
    RawCodec.name: CodecSpec(RawCodec, has_kernels=True),
    KvtcCodec.name: CodecSpec(
        KvtcCodec,
        ArtifactRules(read_plan, over_budget, budget_bytes),
        has_kernels=True,
        fast=fast_kvtc,
    ),
    Kvtc2Codec.name: CodecSpec(
        Kvtc2Codec,
        ArtifactRules(read_step_plan, over_ratio, most_bytes, pairs=Kvtc2Codec.pairs),
        has_kernels=True,
        fast=fast_kvtc2,
    ),
}


def name_of(codec_id: int) -> str | None:
    """Name of the codec with this number in the container header; None if there is none."""
    return next((name for name, spec in CODECS.items() if spec.codec_id == codec_id), None)


def max_blob_bytes(
    name: str,
    dtype: torch.dtype,
    tokens: int,
    *,
    geometry: Geometry,
    sink_tokens: int = 0,
    ratio: float = 0.0,
) -> int:
    """Upper bound in bytes of a blob of `tokens` tokens, from what an artifact's card tells.

    It holds for every codec that `open_codec` makes of this name, dtype and geometry, with any
    artifact of so many sinks at this target ratio: for whoever must reserve room and has no
    artifact loaded.
    """
    rules = CODECS[name].rules
    if rules is None:
        return open_codec(name, dtype, geometry=geometry).max_blob_bytes(tokens)
    rows = [geometry.row_size(group, "kv") for group in range(len(geometry.layer_groups))]
    largest = rules.max_bytes

    def coded_bytes(coded: int) -> list[int]:
        # One entry for K, one for V, which share what a layer group may take.
        return [size for row in rows for size in (largest(row, ratio, coded), 0)]

    return largest_blob(geometry, dtype, tokens, sink_tokens, coded_bytes)


@overload
def open_codec(
    name: str,
    dtype: torch.dtype,
    *,
    geometry: Geometry,
    identity: bytes = NO_FINGERPRINT,
    device: torch.device | str = "cpu",
) -> ChunkCodec: ...


@overload
def open_codec(
    name: str,
    dtype: torch.dtype,
    *,
    artifact: RankArtifact,
    ratio: float,
    identity: bytes = NO_FINGERPRINT,
    device: torch.device | str = "cpu",
    deflate_level: int = 1,
    fast: bool = True,
) -> TransformCodec: ...


def open_codec(
    name: str,
    dtype: torch.dtype,
    *,
    geometry: Geometry | None = None,
    artifact: RankArtifact | None = None,
    ratio: float = 0.0,
    identity: bytes = NO_FINGERPRINT,
    device: torch.device | str = "cpu",
    deflate_level: int = 1,
    fast: bool = True,
) -> ChunkCodec:
    """The codec of this name for a cache of elements `dtype`.

    artifact, ratio: for a codec that needs an artifact; it must have plans for the ratio.
    geometry: for a codec that needs none. identity, device: see `ChunkCodec`. deflate_level: see
    `TransformCodec`. fast: on a CPU, the codec's fast way if it has one that runs here; its log
    line and its class tell. False: the reference. Raises ArtifactError if the artifact does not
    go with the codec, ValueError for a name that is not in `CODECS` or arguments that do not go
    with it.
    """
    if name not in CODECS:
        raise ValueError(f"codec {name!r} is not known; allowed: {', '.join(CODECS)}")
    codec = CODECS[name].codec
    if CODECS[name].needs_artifact != (artifact is not None):
        raise ValueError(
            f"codec {name!r} {'needs an' if artifact is None else 'takes no'} artifact"
        )
    if artifact is None:
        if geometry is None:
            raise ValueError(f"codec {name!r} needs the geometry of the cache")
        return codec(geometry, dtype, identity, device)
    assert issubclass(codec, TransformCodec)
    find_fast = CODECS[name].fast
    if fast and find_fast is not None and torch.device(device).type == "cpu":
        faster = find_fast()
        codec = codec if faster is None else faster
    return codec(artifact, ratio, dtype, identity, deflate_level, device)
