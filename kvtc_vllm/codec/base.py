"""The codec interface: one chunk of K and V <-> one blob.

Implementations are pure functions of their constructor arguments and of the
tensors: no state, no clock, no randomness. They may be called from several
threads at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import xxhash

from kvtc_vllm.codec.artifact import Geometry
from kvtc_vllm.codec.container import (
    DTYPE_CODES,
    FINGERPRINT_BYTES,
    MAX_POSITION,
    MAX_TOKENS,
    NO_FINGERPRINT,
    ContainerInfo,
    Header,
    Section,
    SectionKind,
    parse,
)
from kvtc_vllm.codec.entropy import GENERAL_CODER_IDS
from kvtc_vllm.codec.errors import CodecError, ContainerError
from kvtc_vllm.codec.section_coder import read_body

Blob = bytes | bytearray | memoryview


@dataclass(frozen=True)
class DecodedChunk:
    """k: [T, L, H, D] post-RoPE, v: [T, L, H, Dv], cache dtype; start: first position."""

    k: torch.Tensor
    v: torch.Tensor
    start: int


@dataclass(frozen=True)
class NewChunk:
    """A chunk to encode: the arguments of `ChunkCodec.encode`."""

    k: torch.Tensor
    v: torch.Tensor
    start: int
    key: bytes = b""


@dataclass(frozen=True)
class StoredChunk:
    """A chunk to decode: the arguments of `ChunkCodec.decode`."""

    blob: Blob
    start: int | None = None
    tokens: int | None = None
    key: bytes = b""


@dataclass(frozen=True)
class DecodedGroup:
    """Layers first_layer .. end_layer - 1 of a chunk: k [T, l, H, D], v [T, l, H, Dv]."""

    first_layer: int
    end_layer: int
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True)
class ExpectedSection:
    """What a reader requires of one entry of the section table."""

    kind: SectionKind
    group: int
    """Number of the layer group; `ALL_LAYERS` for a section of all layers."""
    raw_length: int
    """Bytes of the payload, at least."""
    coder_ids: Collection[int] = GENERAL_CODER_IDS
    """Numbers of the entropy coders that the reader can read the section of."""
    most_raw_length: int | None = None
    """Bytes of the payload, at most; None: exactly `raw_length`."""

    def allows(self, section: Section) -> bool:
        """Whether kind, layer group and raw length are right."""
        most = self.raw_length if self.most_raw_length is None else self.most_raw_length
        right = (section.kind, section.group) == (int(self.kind), self.group)
        return right and self.raw_length <= section.raw_length <= most


class Coder(ABC):
    """What the connector needs of a codec; see `ChunkCodec` for the contract."""

    batch: ClassVar[int] = 1
    """Chunks that it codes faster together than one by one."""

    @abstractmethod
    def encode(self, k: torch.Tensor, v: torch.Tensor, start: int, key: bytes = b"") -> bytes:
        """One chunk as a blob."""

    @abstractmethod
    def decode(
        self,
        blob: Blob,
        expect_start: int | None = None,
        expect_tokens: int | None = None,
        key: bytes = b"",
    ) -> DecodedChunk:
        """The chunk of a blob."""

    def encode_many(self, chunks: Sequence[NewChunk]) -> list[bytes | CodecError]:
        """Encode chunks, in order: a blob for each, or why there is none.

        Chunks are independent of each other; together they may be faster. Raises ValueError for
        tensors of the wrong shape or dtype.
        """
        return [_blob_or_error(self, chunk) for chunk in chunks]

    def decode_many(self, chunks: Sequence[StoredChunk]) -> list[DecodedChunk | ContainerError]:
        """Decode blobs, in order: a chunk for each, or why it is refused."""
        return [_chunk_or_error(self, chunk) for chunk in chunks]


class ChunkCodec(Coder):
    """Encodes chunks of one model on one rank. Thread-safe.

    geometry: shape of the cache.
    dtype: cache dtype, a key of `DTYPE_CODES`.
    identity: 16 bytes that name the model set-up, or zeros; a blob written under another
    identity is refused.
    device: where decoded tensors live and where the arithmetic runs.

    Raises ValueError for another dtype or an identity of another length.
    """

    codec_id: ClassVar[int]
    """Number in the container header, never reused."""
    name: ClassVar[str]
    """Key in `kvtc_vllm.codec.registry.CODECS`."""

    def __init__(
        self,
        geometry: Geometry,
        dtype: torch.dtype,
        identity: bytes = NO_FINGERPRINT,
        device: torch.device | str = "cpu",
    ) -> None:
        if dtype not in DTYPE_CODES:
            raise ValueError(f"cache dtype {dtype} is not supported, only {list(DTYPE_CODES)}")
        if len(identity) != FINGERPRINT_BYTES:
            raise ValueError(f"identity must be {FINGERPRINT_BYTES} bytes, not {len(identity)}")
        self.geometry = geometry
        self.dtype = dtype
        self.identity = identity
        self.device = torch.device(device)

    @abstractmethod
    def encode(self, k: torch.Tensor, v: torch.Tensor, start: int, key: bytes = b"") -> bytes:
        """Encode positions start .. start + T - 1.

        k: [T, L, H, D] post-RoPE, v: [T, L, H, Dv], cache dtype, any device and strides.
        key: the name under which the blob will be kept; it decodes under no other name.

        Raises CodecError if the chunk cannot be coded, after which the caller drops that store,
        and ValueError for tensors of the wrong shape or dtype.
        """

    @abstractmethod
    def max_blob_bytes(self, tokens: int) -> int:
        """Upper bound in bytes of a blob of `tokens` tokens, wherever they start."""

    def decode_groups(
        self,
        blob: Blob,
        expect_start: int | None = None,
        expect_tokens: int | None = None,
        key: bytes = b"",
    ) -> Iterator[DecodedGroup]:
        """Verify a blob, then decode it one layer group at a time, in layer order.

        Everything but the entropy-coded bytes themselves is verified before
        this returns. Raises ContainerError if the blob is corrupt or not what
        is expected; iterating may raise it too, with reason "entropy" or
        "bounds".
        """
        info = self._verified(blob, expect_start, expect_tokens, key)
        return self._groups(info, memoryview(blob))

    def decode(
        self,
        blob: Blob,
        expect_start: int | None = None,
        expect_tokens: int | None = None,
        key: bytes = b"",
    ) -> DecodedChunk:
        """Decode a whole blob. Raises ContainerError as `decode_groups` does."""
        info = self._verified(blob, expect_start, expect_tokens, key)
        groups = list(self._groups(info, memoryview(blob)))
        if len(groups) == 1:
            return DecodedChunk(groups[0].k, groups[0].v, info.header.start)
        k = torch.cat([group.k for group in groups], dim=1)
        v = torch.cat([group.v for group in groups], dim=1)
        return DecodedChunk(k, v, info.header.start)

    def verify(self, blob: Blob, key: bytes = b"") -> ContainerInfo:
        """The tables of a blob of this codec, kept under `key`. Raises ContainerError."""
        return self._verified(blob, None, None, key)

    @abstractmethod
    def _check_header(self, header: Header) -> None:
        """Raise ContainerError if the codec's own fields are not what it expects."""

    @abstractmethod
    def _expected_sections(self, header: Header) -> list[ExpectedSection]:
        """The section table that a blob with this (checked) header must have."""

    @abstractmethod
    def _groups(self, info: ContainerInfo, blob: memoryview) -> Iterator[DecodedGroup]:
        """Decode a verified blob group by group."""

    def _bound_identity(self, key: bytes) -> bytes:
        """Identity of a blob kept under `key`: a blob under a wrong name is then refused."""
        return xxhash.xxh3_128_digest(self.identity + key) if key else self.identity

    def _new_header(
        self, tokens: int, start: int, sinks: int, ratio: float, artifact: bytes, key: bytes
    ) -> Header:
        geometry = self.geometry
        return Header(
            codec_id=self.codec_id,
            dtype_code=DTYPE_CODES[self.dtype],
            sinks=sinks,
            num_layers=geometry.num_layers,
            num_kv_heads=geometry.num_kv_heads,
            head_size=geometry.head_size,
            head_size_v=geometry.head_size_v,
            num_layer_groups=len(geometry.layer_groups),
            tokens=tokens,
            start=start,
            ratio=ratio,
            artifact=artifact,
            identity=self._bound_identity(key),
        )

    def _check_tensors(self, k: torch.Tensor, v: torch.Tensor, start: int) -> None:
        geometry = self.geometry
        layers, heads = geometry.num_layers, geometry.num_kv_heads
        tokens = k.shape[0]
        for name, x, size in (("k", k, geometry.head_size), ("v", v, geometry.head_size_v)):
            if tuple(x.shape) != (tokens, layers, heads, size) or x.dtype != self.dtype:
                raise ValueError(
                    f"{name} is {x.dtype} {tuple(x.shape)}, expected {self.dtype} "
                    f"{(tokens, layers, heads, size)}"
                )
        if not 1 <= tokens <= MAX_TOKENS or not 0 <= start <= MAX_POSITION - tokens:
            raise ValueError(f"{tokens} tokens from position {start} cannot be a chunk")

    def _verified(
        self, blob: Blob, expect_start: int | None, expect_tokens: int | None, key: bytes
    ) -> ContainerInfo:
        """Parse a blob and compare it with what this codec would have written."""
        info = parse(blob)
        header = info.header
        if header.codec_id != self.codec_id:
            raise ContainerError(
                "version", f"codec {header.codec_id}, this is {self.codec_id} ({self.name})"
            )
        own = self._new_header(
            header.tokens, header.start, header.sinks, header.ratio, header.artifact, key
        )
        if header.identity != own.identity:
            raise ContainerError(
                "fingerprint", "written for another model set-up or under another name"
            )
        if header != own:
            raise ContainerError("geometry", f"{header} does not fit {own}")
        if expect_start is not None and header.start != expect_start:
            raise ContainerError(
                "geometry", f"starts at position {header.start}, not {expect_start}"
            )
        if expect_tokens is not None and header.tokens != expect_tokens:
            raise ContainerError("geometry", f"holds {header.tokens} tokens, not {expect_tokens}")
        self._check_header(header)
        expected = self._expected_sections(header)
        if len(info.sections) != len(expected) or not all(
            entry.allows(section) for section, entry in zip(info.sections, expected, strict=True)
        ):
            found = [(s.kind, s.group, s.raw_length) for s in info.sections]
            raise ContainerError("geometry", f"sections {found} are not {expected}")
        for section, entry in zip(info.sections, expected, strict=True):
            if section.coder_id not in entry.coder_ids:
                raise ContainerError("version", f"unknown entropy coder {section.coder_id}")
        return info


def _blob_or_error(codec: Coder, chunk: NewChunk) -> bytes | CodecError:
    try:
        return codec.encode(chunk.k, chunk.v, chunk.start, chunk.key)
    except CodecError as error:
        return error


def _chunk_or_error(codec: Coder, chunk: StoredChunk) -> DecodedChunk | ContainerError:
    try:
        return codec.decode(chunk.blob, chunk.start, chunk.tokens, chunk.key)
    except ContainerError as error:
        return error


def read_section(section: Section, blob: memoryview) -> bytearray:
    """Decode one verified section by a general entropy coder. Raises ContainerError("entropy")."""
    return read_body(section, stored_body(section, blob))


def stored_body(section: Section, blob: memoryview) -> memoryview:
    """The stored bytes of one verified section, a view."""
    return blob[section.offset : section.offset + section.stored_length]
