"""The container: header, section table, unit table, bodies, checksum. See FORMAT.md.

Reading checks in this order: minimum length, magic, version, checksum over
the whole blob, bounds of every length against the size of the blob. Nothing is
allocated from a length that has not been checked; section bodies are views.
Whether the contents fit an artifact is the codec's business.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from kvtc_vllm.codec.entropy import (
    UNIT_BYTES,
    EncodedSection,
    Unit,
    UnitList,
    aligned,
    unit_lengths,
)
from kvtc_vllm.codec.errors import CodecError, ContainerError

MAGIC = b"KVTC"
FORMAT_VERSION = 1
FINGERPRINT_BYTES = 16
NO_FINGERPRINT = bytes(FINGERPRINT_BYTES)
CHECKSUM_BYTES = 16
MAX_TOKENS = 65536
MAX_POSITION = 2**63 - 1
MAX_SINK_TOKENS = 255
ALL_LAYERS = 0xFFFF
"""Layer-group number of a section that spans all layers."""

# magic, version, codec id, flags, dtype code, sink tokens, layers, kv heads, head size K,
# head size V, layer groups, sections, tokens, first position, ratio, artifact, identity
_HEADER = struct.Struct("<4sHHHBBHHHHHHIQd16s16s")
# kind, entropy coder id, layer group, units, raw length, stored length
_SECTION = struct.Struct("<BBHIII")
_SECTION_ROW = np.dtype(
    [
        ("kind", "u1"),
        ("coder_id", "u1"),
        ("group", "<u2"),
        ("units", "<u4"),
        ("raw_length", "<u4"),
        ("stored_length", "<u4"),
    ]
)
HEADER_BYTES = _HEADER.size
_START = struct.Struct("<Q")
_START_OFFSET = struct.calcsize("<4sHHHBBHHHHHHI")
RATIO_OFFSET = struct.calcsize("<4sHHHBBHHHHHHIQ")
MIN_BLOB_BYTES = HEADER_BYTES + CHECKSUM_BYTES

DTYPE_CODES: dict[torch.dtype, int] = {
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float32: 3,
    torch.float8_e4m3fn: 4,
    torch.float8_e5m2: 5,
}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


class SectionKind(IntEnum):
    """What a section holds."""

    CODED_K = 0
    CODED_V = 1
    SINKS = 2
    EXACT_K = 3
    EXACT_V = 4
    MARKS = 5
    BEYOND_K = 6
    BEYOND_V = 7
    CODED_PAIR = 8
    BEYOND_PAIR = 9


@dataclass(frozen=True)
class Header:
    """Fixed-size part of a container. Counts and sizes are of elements, not bytes."""

    codec_id: int
    """0 raw, 1 kvtc v1, 2 kvtc v2; see `kvtc_vllm.codec.registry.name_of`."""
    dtype_code: int
    """Cache dtype, a value of `DTYPE_CODES`."""
    sinks: int
    """Leading tokens that are stored exactly."""
    num_layers: int
    """Of the whole model."""
    num_kv_heads: int
    """Per layer, of one rank."""
    head_size: int
    """Elements per head of K."""
    head_size_v: int
    """Elements per head of V."""
    num_layer_groups: int
    """Their bounds are the artifact's."""
    tokens: int
    """1 to `MAX_TOKENS`."""
    start: int
    """Position of the first token."""
    ratio: float
    """Target ratio of the bit plans, 0 for raw."""
    artifact: bytes
    """Fingerprint, 16 bytes; zero if there is none."""
    identity: bytes
    """16 bytes: the set-up and the chunk's name; zero if there is none."""


@dataclass(frozen=True)
class Section:
    """One entry of the section table and where its body lies in the blob."""

    kind: int
    """A `SectionKind`, unchecked."""
    coder_id: int
    """Number of the entropy coder, unchecked."""
    group: int
    """Number of the layer group; `ALL_LAYERS` for a section of all layers."""
    raw_length: int
    """Bytes of the payload."""
    offset: int
    """Where the body begins in the blob."""
    stored_length: int
    """Bytes of the body, without padding."""
    units: Sequence[Unit]
    """Its rows of the unit table, in order."""


@dataclass(frozen=True)
class ContainerInfo:
    """A parsed container: what `kvtc inspect` prints and what codecs read bodies by."""

    header: Header
    sections: tuple[Section, ...]
    blob_length: int


@dataclass(frozen=True)
class NewSection:
    """A section to be written."""

    kind: SectionKind
    coder_id: int
    """Number of the entropy coder that made `encoded`."""
    group: int
    """Number of the layer group; `ALL_LAYERS` for a section of all layers."""
    raw_length: int
    """Bytes of the payload before entropy coding."""
    encoded: EncodedSection


class SectionEntry(NamedTuple):
    """A row of the section table that is to be written."""

    kind: SectionKind
    coder_id: int
    group: int
    units: int
    """Rows that it has in the unit table."""
    raw_length: int
    stored_length: int


def build(header: Header, sections: Sequence[NewSection]) -> bytes:
    """Serialise a container. Raises CodecError if a length does not fit its field."""
    entries: list[SectionEntry] = []
    unit_tables: list[bytes | memoryview] = []
    bodies: list[bytes] = []
    for section in sections:
        encoded = section.encoded
        entries.append(
            SectionEntry(
                section.kind,
                section.coder_id,
                section.group,
                len(encoded.units),
                section.raw_length,
                len(encoded.body),
            )
        )
        units = encoded.units
        listed = units if isinstance(units, UnitList) else UnitList.of(unit_lengths(units))
        unit_tables.append(listed.table)
        bodies.append(encoded.body)
        bodies.append(bytes(aligned(len(encoded.body)) - len(encoded.body)))
    content = b"".join((build_head(header, entries), *unit_tables, *bodies))
    return content + checksum(content)


def build_head(header: Header, entries: Sequence[SectionEntry]) -> bytes:
    """Header and section table, after which the unit table follows.

    Raises CodecError if a length does not fit its field.
    """
    return build_header(header, len(entries)) + b"".join(map(build_entry, entries))


def build_entry(entry: SectionEntry) -> bytes:
    """A row of the section table. Raises CodecError as `build_head` does."""
    try:
        return _SECTION.pack(*entry)
    except struct.error as error:
        raise CodecError("size", f"chunk does not fit the container format: {error}") from error


def build_header(header: Header, sections: int) -> bytes:
    """Header of a container of so many sections. Raises CodecError as `build_head` does."""
    try:
        return _HEADER.pack(
            MAGIC,
            FORMAT_VERSION,
            header.codec_id,
            0,
            header.dtype_code,
            header.sinks,
            header.num_layers,
            header.num_kv_heads,
            header.head_size,
            header.head_size_v,
            header.num_layer_groups,
            sections,
            header.tokens,
            header.start,
            header.ratio,
            header.artifact,
            header.identity,
        )
    except struct.error as error:
        raise CodecError("size", f"chunk does not fit the container format: {error}") from error


def header_with(header: bytes, start: int, identity: bytes) -> bytes:
    """The header of another chunk, where nothing else differs, as among the chunks of a step.

    header: of `build_header`. start: 0 to `MAX_POSITION`. identity: 16 bytes.
    """
    begin = header[:_START_OFFSET]
    return begin + _START.pack(start) + header[RATIO_OFFSET:-FINGERPRINT_BYTES] + identity


def headers_with(header: bytes, names: Sequence[tuple[int, bytes]]) -> npt.NDArray[np.uint8]:
    """`header_with` of many chunks: uint8 [n, HEADER_BYTES]. names: start and identity of each."""
    own = np.tile(np.frombuffer(header, np.uint8), (len(names), 1))
    starts = np.array([start for start, _ in names], "<u8")
    own[:, _START_OFFSET:RATIO_OFFSET] = starts[:, None].view(np.uint8)
    identities = np.frombuffer(b"".join([identity for _, identity in names]), np.uint8)
    own[:, -FINGERPRINT_BYTES:] = identities.reshape(-1, FINGERPRINT_BYTES)
    return own


def section_rows(
    kinds: Sequence[SectionKind],
    groups: Sequence[int],
    coder_ids: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
) -> list[bytes]:
    """Section tables of many chunks of the same sections, each a part of one.

    kinds, groups: of every section. coder_ids: [chunks, sections]. sizes: units, raw and
    stored bytes, [chunks, sections, 3]; raises CodecError if one does not fit its field.
    """
    if sizes.size and sizes.max() >= 1 << 32:
        raise CodecError("size", f"a section of {sizes.max()} bytes does not fit the container")
    rows = np.zeros(sizes.shape[:2], _SECTION_ROW)
    rows["kind"], rows["group"], rows["coder_id"] = list(kinds), list(groups), coder_ids
    rows["units"], rows["raw_length"], rows["stored_length"] = np.moveaxis(sizes, 2, 0)
    return [row.tobytes() for row in rows]


class SectionTables(NamedTuple):
    """The tables of a verified container as they lie in it, for whoever reads many at once."""

    sections: npt.NDArray[np.void]
    """With the fields of `SectionEntry`, coder_id as there."""
    units: memoryview
    """The unit table, see `UnitList`."""
    body: int
    """Where the first body begins."""

    @staticmethod
    def row_dtype() -> np.dtype[np.void]:
        """Of a row of `sections`."""
        return _SECTION_ROW


def joined_rows(tables: Sequence[SectionTables]) -> npt.NDArray[np.void]:
    """`sections` of many containers, one behind the other.

    As bytes: numpy's own concatenation compares all fields of every table with those before.
    """
    return np.frombuffer(b"".join([own.sections.tobytes() for own in tables]), _SECTION_ROW)


def section_tables(blob: memoryview, sections: int) -> SectionTables:
    """Of a container that `parse` has accepted. sections: how many it has."""
    rows = np.frombuffer(blob, _SECTION_ROW, sections, HEADER_BYTES)
    first = HEADER_BYTES + sections * _SECTION_ROW.itemsize
    body = first + int(rows["units"].sum()) * UNIT_BYTES
    return SectionTables(rows, blob[first:body], body)


def ratio_of(blob: bytes | bytearray | memoryview) -> float:
    """Target ratio in the header of a container that was verified before."""
    return float(struct.unpack_from("<d", blob, RATIO_OFFSET)[0])


def container_bytes(sections: Sequence[int]) -> int:
    """Bytes of a container whose sections take so many, unit table entries and padded body."""
    return MIN_BLOB_BYTES + sum(map(section_bytes, sections))


def section_bytes(contents: int) -> int:
    """Bytes of a section in a container: unit table entries and padded body, and its own entry."""
    return _SECTION.size + contents


def checksum(content: bytes | memoryview) -> bytes:
    """xxh3-128 of everything before the checksum, big-endian canonical form (16 bytes)."""
    return xxhash.xxh3_128_digest(content)


def parse(blob: bytes | bytearray | memoryview) -> ContainerInfo:
    """Verify and read a container.

    Raises ContainerError with reason "truncated", "magic", "version",
    "checksum" or "bounds".
    """
    view = memoryview(blob)
    if len(view) < MIN_BLOB_BYTES:
        raise ContainerError("truncated", f"{len(view)} bytes, at least {MIN_BLOB_BYTES} expected")
    fields = _HEADER.unpack_from(view)
    magic, version, flags, num_sections = fields[0], fields[1], fields[3], fields[11]
    if magic != MAGIC:
        raise ContainerError("magic", f"starts with {magic!r}")
    if version != FORMAT_VERSION:
        raise ContainerError("version", f"format {version}, this build reads {FORMAT_VERSION}")
    end = len(view) - CHECKSUM_BYTES
    if checksum(view[:end]) != bytes(view[end:]):
        raise ContainerError("checksum", f"the {len(view)} bytes were altered after writing")
    if flags:
        raise ContainerError("version", f"unknown flags {flags:#x}")
    header = Header(fields[2], *fields[4:11], *fields[12:])
    if not 1 <= header.tokens <= MAX_TOKENS:
        raise ContainerError("bounds", f"{header.tokens} tokens are outside 1..{MAX_TOKENS}")
    if header.start + header.tokens > MAX_POSITION:
        raise ContainerError("bounds", f"first position {header.start} is too large")
    return ContainerInfo(header, _sections(view[:end], num_sections), len(view))


def _sections(content: memoryview, count: int) -> tuple[Section, ...]:
    """Read section and unit tables; bodies must tile the rest of `content` exactly."""
    units_at = HEADER_BYTES + count * _SECTION.size
    if units_at > len(content):
        raise ContainerError("bounds", f"{count} sections do not fit {len(content)} bytes")
    rows = list(_SECTION.iter_unpack(content[HEADER_BYTES:units_at]))
    body_at = units_at + sum(row[3] for row in rows) * UNIT_BYTES
    if body_at + sum(aligned(row[5]) for row in rows) != len(content):
        raise ContainerError("bounds", "sections do not add up to the size of the blob")
    sections: list[Section] = []
    for kind, coder_id, group, num_units, raw_length, stored_length in rows:
        if num_units > raw_length:  # each gives a byte at least
            raise ContainerError("bounds", f"{num_units} units for {raw_length} bytes")
        units_end = units_at + num_units * UNIT_BYTES
        units = UnitList(content[units_at:units_end])
        body_end = body_at + stored_length
        if any(content[body_end : body_at + aligned(stored_length)]):
            raise ContainerError("bounds", "padding after a section is not zero")
        sections.append(Section(kind, coder_id, group, raw_length, body_at, stored_length, units))
        units_at, body_at = units_end, body_at + aligned(stored_length)
    return tuple(sections)
