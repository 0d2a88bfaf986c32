"""Chunks of a batch that can't be stored or loaded, among others that can."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvtc_vllm.codec.base import read_section
from kvtc_vllm.codec.container import NewSection, SectionKind, build, parse
from kvtc_vllm.codec.entropy import DEFLATE, EncodedSection
from kvtc_vllm.codec.errors import CodecError, ContainerError
from tests.codec.kernels.codecs import REFERENCE
from tests.codec.kernels.devices import DEVICES
from tests.codec.kernels.paged_batches import (
    BLOCK,
    EACH,
    FIRST,
    IDENTITY,
    MODEL,
    SECOND,
    STORES,
    TOKENS,
    chunk_of,
    differing,
    encoded,
    filled,
    make,
    write,
)
from tests.codec.kernels.paged_caches import read_slots
from tests.codec.kernels.requests import Load, Store

from kvtc_vllm.codec.kernels.paged import block_slots  # isort: skip

# Some ten seconds each in the interpreter.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("side_stream")]


@EACH
@pytest.mark.parametrize("device", DEVICES)
def test_bad_chunks_fail_alone(artifact, device):
    codec, reference = make(artifact, device)
    filled(codec)
    good = bytes(encoded(codec)[1])
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 1
    k, v = MODEL.chunk(TOKENS, TOKENS, 6)
    other = REFERENCE[artifact.codec](artifact, 4.0, torch.bfloat16, IDENTITY)
    loads = [
        (Load(TOKENS, [0, 1], key=b"second"), bytes(damaged)),
        (Load(TOKENS, [2, 3], key=b"second"), good),
        (Load(TOKENS, [4, 5], key=b"third"), good),
        (Load(TOKENS, [6, 7], key=b"second"), _with_a_longer_body(good)),
        (Load(TOKENS, [8, 9]), other.encode(k, v, TOKENS)),
    ]
    errors = codec.load(loads, TOKENS)
    reasons = [None if error is None else error.reason for error in errors]
    assert reasons == ["checksum", None, "fingerprint", "entropy", "geometry"]
    slots = block_slots([2, 3], BLOCK).to(device)
    wanted = reference.decode(good, key=b"second")
    assert differing(read_slots(codec.cache.k, slots), wanted.k) < 0.02


def _with_a_longer_body(blob: bytes) -> bytes:
    """The blob with units that do not fill its last section, under a valid checksum."""
    *others, last = parse(blob).sections
    body = blob[last.offset : last.offset + last.stored_length]
    return resealed(blob, len(others), EncodedSection(last.units, body + bytes(4)), last.raw_length)


def resealed(blob: bytes, number: int, coded: EncodedSection, raw_length: int) -> bytes:
    """The blob with another section, under a valid checksum."""
    info = parse(blob)
    sections = [
        NewSection(
            SectionKind(s.kind),
            s.coder_id,
            s.group,
            raw_length if i == number else s.raw_length,
            coded
            if i == number
            else EncodedSection(s.units, blob[s.offset : s.offset + s.stored_length]),
        )
        for i, s in enumerate(info.sections)
    ]
    return build(info.header, sections)


def uneven(blob: bytes) -> list[bytes]:
    """Blobs of codec 2 whose marks or escapes do not fit the rest, under valid checksums."""
    first, *others = parse(blob).sections
    assert first.kind == SectionKind.MARKS
    (bitmap,) = read_section(first, memoryview(blob))
    assert bitmap == 1 << 6
    # Codes of four tokens may share a byte.
    found = [resealed(blob, 0, EncodedSection((), bytes([other])), 1) for other in (0, 0x5F, 0xFF)]
    one, last = (read_section(part, memoryview(blob)) for part in (others[0], others[-1]))
    for number, payload in ((1, one + b"\0"), (len(others), b"\xff" * len(last))):
        found.append(resealed(blob, number, DEFLATE.encode([bytes(payload)]), len(payload)))
    return found


@SECOND
@pytest.mark.parametrize("device", DEVICES)
def test_chunks_whose_marks_and_escapes_do_not_fit_fail_alone(artifact, device):
    codec, reference = make(artifact, device)
    store = STORES[1]
    k, v = chunk_of(store, 5, torch.bfloat16)
    good = reference.encode(k, v, store.start, store.key)
    bad = uneven(good)
    for blob in bad:
        with pytest.raises(ContainerError) as caught:
            reference.decode(blob, store.start, TOKENS, store.key)
        assert caught.value.reason == "bounds"
    blobs = [*bad[:3], good, *bad[3:]]
    loads = [
        (Load(store.start, [2 * i, 2 * i + 1], key=store.key), blob) for i, blob in enumerate(blobs)
    ]
    reasons = [error and error.reason for error in codec.load(loads, TOKENS)]
    assert reasons == [*["bounds"] * 3, None, *["bounds"] * (len(bad) - 3)]
    slots = block_slots([6, 7], BLOCK).to(device)
    wanted = reference.decode(good, store.start, TOKENS, store.key)
    assert differing(read_slots(codec.cache.k, slots), wanted.k) < 0.02
    assert differing(read_slots(codec.cache.v, slots), wanted.v) < 0.02


@EACH
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("token", "value"), [(0, float("nan")), (0, 3e38), (6, float("inf")), (6, 3e38)]
)
def test_chunks_that_cannot_be_coded_are_refused_alone(artifact, device, token, value):
    codec, _ = make(artifact, device)
    filled(codec)
    k, v = MODEL.chunk(TOKENS, 0, 5)
    v[token, 1, 0, 3] = value
    write(codec.cache, block_slots(STORES[0].block_ids, BLOCK), k, v)
    results = codec.encode_staged(codec.stage(STORES))
    sink = token < 4
    if sink and value == 3e38:
        assert not isinstance(results[0], CodecError)
    else:
        assert isinstance(results[0], CodecError)
        assert ("non-finite" in str(results[0])) == (value != 3e38)
    assert not isinstance(results[1], CodecError)
    late = Store([3, 9], MODEL.max_positions - 1)
    assert "RoPE" in str(codec.encode_staged(codec.stage([late]))[0])
    assert codec.encode_staged(codec.stage([])) == []
    assert codec.load([], TOKENS) == []


@FIRST
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_outside_float16_is_a_damaged_chunk(artifact, device):
    """Rows cross memory in 16 bits: what does not fit is told, not written as another number."""
    # Small weights: coefficients are in range where rows are not.
    sections = {
        key: replace(section, weights=torch.full_like(section.mean, 0.01))
        for key, section in artifact.sections.items()
    }
    artifact = replace(artifact, sections=sections)
    codec, reference = make(artifact, device, precision="float16")
    k, v = MODEL.chunk(TOKENS, TOKENS, 5, torch.float32)
    v[2] *= 2e4 / v[2].abs().max()
    v[3] *= 4e5 / v[3].abs().max()
    blobs = [reference.encode(k.bfloat16(), v.bfloat16(), TOKENS)]
    v[3] = v[4]
    blobs.append(reference.encode(k.bfloat16(), v.bfloat16(), TOKENS))
    loads = [(Load(TOKENS, [2 * i, 2 * i + 1]), blob) for i, blob in enumerate(blobs)]
    found = [error and error.reason for error in codec.load(loads, TOKENS)]
    assert found == ["bounds", None]
