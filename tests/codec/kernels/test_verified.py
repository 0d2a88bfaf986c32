"""The quick look at a blob's head against the thorough one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtc_vllm.codec.container import CHECKSUM_BYTES, HEADER_BYTES, checksum, parse
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.kernels.verified import ExpectedHead, has_checksum
from tests.codec.kernels.codecs import EVERY, REFERENCE, artifact_of, mark
from tests.codec.synthetic import SyntheticModel

MODEL = SyntheticModel(
    num_layers=2, num_kv_heads=1, head_size=4, head_size_v=4, layer_groups=((0, 1), (1, 2))
)
TOKENS = 32
KEY = b"chunk"


@pytest.fixture(scope="module", params=EVERY)
def codec(request):
    artifact = artifact_of(request.param, MODEL, (4.0, 8.0), fit_rows=256)
    return REFERENCE[artifact.codec](artifact, 8.0, torch.bfloat16, bytes(range(16)))


def quick(codec, blob, start):
    """What the fast path sees in a blob with a right checksum."""
    (found,) = quick_many(codec, [blob], start)
    return found


def quick_many(codec, blobs, start):
    sinks = codec._sinks(start, TOKENS)
    header = codec._new_header(TOKENS, start, sinks, 8.0, codec.artifact.fingerprint, KEY)
    other = replace(header, start=1, identity=bytes(16))
    head = ExpectedHead.of(codec._sections_of(TOKENS, sinks, 8.0), other)
    return head.match(blobs, [(start, header.identity)] * len(blobs))


def sealed(content: bytes) -> bytes:
    return content + checksum(content)


@pytest.mark.parametrize("start", [0, TOKENS])
def test_a_blob_of_ours_is_known_at_once(codec, start):
    k, v = MODEL.chunk(TOKENS, start, 3)
    blob = codec.encode(k, v, start, KEY)
    found = quick(codec, blob, start)
    assert found is not None
    assert quick(codec, codec.encode(k, mark(v, [9]), start, KEY), start) is not None
    sections = parse(blob).sections
    assert [found.section(number) for number in range(len(sections))] == list(sections)
    assert found.sinks == codec._sinks(start, TOKENS)


@pytest.mark.parametrize("start", [0, TOKENS])
def test_whatever_it_accepts_the_thorough_look_accepts(codec, start):
    """Every bit of header and section table flipped, under a right checksum."""
    blob = codec.encode(*MODEL.chunk(TOKENS, start, 3), start, KEY)
    content = bytearray(blob[:-CHECKSUM_BYTES])
    end = HEADER_BYTES + 16 * len(parse(blob).sections)
    refused = 0
    for at in range(end):
        for bit in range(8):
            content[at] ^= 1 << bit
            damaged = sealed(bytes(content))
            content[at] ^= 1 << bit
            found = quick(codec, damaged, start)
            try:
                info = codec._verified(damaged, start, TOKENS, KEY)
            except ContainerError:
                refused += 1
                assert found is None
                continue
            if found is not None:
                sections = [found.section(number) for number in range(len(info.sections))]
                assert sections == list(info.sections)
    assert refused > 4 * end


@pytest.mark.parametrize("start", [0, TOKENS])
def test_many_are_judged_as_each_alone(codec, start):
    blob = codec.encode(*MODEL.chunk(TOKENS, start, 3), start, KEY)
    content = bytearray(blob[:-CHECKSUM_BYTES])
    blobs = [blob, b"", codec.encode(*MODEL.chunk(TOKENS, start, 4), start, KEY)]
    for at in range(HEADER_BYTES - 20, HEADER_BYTES + 40):
        content[at] ^= 1
        blobs.append(sealed(bytes(content)))
        content[at] ^= 1
    together = quick_many(codec, blobs, start)
    alone = [quick(codec, each, start) for each in blobs]
    assert [found is None for found in together] == [found is None for found in alone]
    assert together[0] is not None
    assert together[1] is None
    assert together[2] is not None
    for found, each in zip(together, alone, strict=True):
        if found is not None:
            assert found.tables.sections.tobytes() == each.tables.sections.tobytes()
            assert (found.tables.units, found.tables.body) == (each.tables.units, each.tables.body)


def test_lengths_of_any_kind_are_no_error(codec):
    blob = codec.encode(*MODEL.chunk(TOKENS, 0, 3), 0, KEY)
    content = blob[:-CHECKSUM_BYTES]
    for length in range(len(content)):
        assert quick(codec, sealed(content[:length]), 0) is None
    assert quick(codec, sealed(content + bytes(4)), 0) is None


def test_another_ratio_or_name_is_left_to_the_thorough_look(codec):
    other = type(codec)(codec.artifact, 4.0, torch.bfloat16, bytes(range(16)))
    k, v = MODEL.chunk(TOKENS, 0, 3)
    assert quick(codec, other.encode(k, v, 0, KEY), 0) is None
    assert quick(codec, codec.encode(k, v, 0, b"another"), 0) is None


def test_checksums():
    blob = sealed(b"contents")
    assert has_checksum(blob)
    assert has_checksum(memoryview(blob))
    assert not has_checksum(blob[:-1])
    assert not has_checksum(b"\1" + blob[1:])
    assert not has_checksum(b"short")
    assert not has_checksum(b"")
