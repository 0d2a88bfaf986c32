"""The container: what is written is read, and everything else is refused by name."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from kvtc_vllm.codec.container import (
    CHECKSUM_BYTES,
    HEADER_BYTES,
    MAX_TOKENS,
    MIN_BLOB_BYTES,
    Header,
    NewSection,
    SectionKind,
    build,
    build_header,
    checksum,
    header_with,
    headers_with,
    parse,
)
from kvtc_vllm.codec.entropy import DEFLATE, RAW, EncodedSection, Unit
from kvtc_vllm.codec.errors import CodecError, ContainerError

HEADER = Header(
    codec_id=1,
    dtype_code=1,
    sinks=4,
    num_layers=32,
    num_kv_heads=8,
    head_size=128,
    head_size_v=96,
    num_layer_groups=4,
    tokens=128,
    start=1 << 40,
    ratio=16.0,
    artifact=bytes(range(16)),
    identity=bytes(range(16, 32)),
)
STREAMS = [b"abc" * 100, b"xyz12"]
RAW_LENGTH = 305
SECTIONS = [
    NewSection(SectionKind.SINKS, 0, 0xFFFF, RAW_LENGTH, RAW.encode(STREAMS)),
    NewSection(SectionKind.CODED_K, 1, 0, RAW_LENGTH, DEFLATE.encode(STREAMS)),
]
BLOB = build(HEADER, SECTIONS)


def resealed(content: bytes | bytearray) -> bytes:
    """A blob with a valid checksum over whatever was done to it."""
    return bytes(content) + checksum(bytes(content))


def patched(offset: int, fmt: str, *values: int) -> bytes:
    content = bytearray(BLOB[:-CHECKSUM_BYTES])
    struct.pack_into("<" + fmt, content, offset, *values)
    return resealed(content)


def refused(blob: bytes, reason: str) -> None:
    with pytest.raises(ContainerError) as caught:
        parse(blob)
    assert caught.value.reason == reason


def test_what_is_written_is_read():
    info = parse(BLOB)
    assert info.header == HEADER
    assert info.blob_length == len(BLOB)
    for section, written in zip(info.sections, SECTIONS, strict=True):
        assert (section.kind, section.coder_id, section.group, section.raw_length) == (
            written.kind,
            written.coder_id,
            written.group,
            written.raw_length,
        )
        assert section.units == written.encoded.units
        body = BLOB[section.offset : section.offset + section.stored_length]
        assert body == written.encoded.body
        assert section.offset % 4 == 0


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_is_read(kind):
    assert parse(kind(BLOB)) == parse(BLOB)


def test_sizes_are_those_of_the_format():
    assert HEADER_BYTES == 76
    assert len(build(HEADER, [])) == MIN_BLOB_BYTES == 92
    assert len(BLOB) == 92 + 2 * 16 + 2 * 4 + 308 + len(SECTIONS[1].encoded.body)


def test_reasons_come_in_order():
    refused(b"", "truncated")
    refused(BLOB[: MIN_BLOB_BYTES - 1], "truncated")
    refused(b"NOPE" + bytes(200), "magic")
    refused(BLOB[:4] + b"\x02\x00" + BLOB[6:], "version")
    refused(BLOB[:-1], "checksum")
    refused(BLOB + b"\0", "checksum")


def test_unknown_flags_are_another_version():
    refused(patched(8, "H", 1), "version")


@pytest.mark.parametrize("tokens", [0, MAX_TOKENS + 1, 0xFFFFFFFF])
def test_token_count_is_bounded(tokens):
    refused(patched(24, "I", tokens), "bounds")


@pytest.mark.parametrize("sections", [0, 1, 3, 0xFFFF])
def test_section_count_must_fill_the_blob(sections):
    refused(patched(22, "H", sections), "bounds")


@pytest.mark.parametrize("units", [0, 1, 3, 0xFFFFFFFF])
def test_unit_count_must_fill_the_blob(units):
    refused(patched(HEADER_BYTES + 16 + 4, "I", units), "bounds")


@pytest.mark.parametrize("stored", [0, 304, 309, 0xFFFFFFFF])
def test_stored_length_must_fill_the_blob(stored):
    refused(patched(HEADER_BYTES + 12, "I", stored), "bounds")


def test_padding_must_be_zero():
    info = parse(BLOB)
    end = info.sections[0].offset + info.sections[0].stored_length
    assert info.sections[0].stored_length == 305
    refused(patched(end, "B", 1), "bounds")


def test_fields_that_do_not_fit_cannot_be_written():
    with pytest.raises(CodecError, match="does not fit"):
        build(replace(HEADER, sinks=256), [])
    big = NewSection(SectionKind.EXACT_K, 1, 0, 1, EncodedSection((Unit(65537, 1),), b"\0"))
    with pytest.raises(CodecError, match="does not fit"):
        build(HEADER, [big])


def test_headers_of_many_chunks_are_those_of_each():
    common = build_header(replace(HEADER, start=0, identity=b""), 2)
    names = [(0, bytes(16)), (MAX_TOKENS, bytes(range(16))), ((1 << 62) + 3, b"\xff" * 16)]
    together = headers_with(common, names)
    assert [row.tobytes() for row in together] == [header_with(common, *name) for name in names]
    assert header_with(common, HEADER.start, HEADER.identity) == BLOB[:HEADER_BYTES]
