"""Hostile and damaged blobs: ContainerError or the right answer, never anything else.

Two kinds of damage. Accidents leave the checksum as it was: every one must be
found. A *resealed* blob has its checksum recomputed after the damage, as a bug
in an encoder or an attacker would: then the bounds checks behind the checksum
are on their own, and may let wrong values through but never a crash, another
exception, or an allocation that the blob's own size does not justify.
"""

from __future__ import annotations

import random
import struct
import tracemalloc
from itertools import pairwise

import pytest
import torch

from kvtc_vllm.codec import container
from kvtc_vllm.codec.base import ChunkCodec
from kvtc_vllm.codec.container import CHECKSUM_BYTES, HEADER_BYTES, checksum
from kvtc_vllm.codec.cpu.codec import CpuKvtc2Codec
from kvtc_vllm.codec.entropy import UNIT_BYTES, EncodedSection, UnitList
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.kvtc import KvtcCodec
from kvtc_vllm.codec.raw import RawCodec
from kvtc_vllm.codec.sink_rule import SinkRule
from kvtc_vllm.codec.v2.codec import Kvtc2Codec
from tests.codec.int8_codec import Int8Codec
from tests.codec.synthetic import SyntheticModel
from tests.codec.v2.made_up import step_artifact

MODEL = SyntheticModel(
    num_layers=2, num_kv_heads=1, head_size=16, layer_groups=((0, 1), (1, 2)), max_positions=256
)
TOKENS = 12
MUTATIONS = 15_000


RULE = SinkRule((0, 1), threshold=1.0)
"""Low enough to mark some tokens, none of them a sink."""


@pytest.fixture(
    scope="module",
    params=[
        "raw",
        "kvtc",
        "kvtc by int8",
        "kvtc2",
        "kvtc2 by compiled loops",
        "kvtc2 of pairs",
        "kvtc2 of pairs by compiled loops",
    ],
)
def codec(request) -> ChunkCodec:
    if request.param == "raw":
        return RawCodec(MODEL.geometry, torch.bfloat16)
    if request.param.startswith("kvtc2"):
        artifact = step_artifact(MODEL, (4.0, 8.0), RULE, paired="pairs" in request.param)
        make2 = CpuKvtc2Codec if "compiled" in request.param else Kvtc2Codec
        return make2(artifact, 4.0, torch.bfloat16)
    make = KvtcCodec if request.param == "kvtc" else Int8Codec
    return make(MODEL.artifact((4.0, 8.0)), 4.0, torch.bfloat16)


@pytest.fixture(scope="module")
def blob(codec) -> bytes:
    return codec.encode(*MODEL.chunk(TOKENS), 0)


def refused(codec: ChunkCodec, damaged: bytes) -> str:
    with pytest.raises(ContainerError) as caught:
        codec.decode(damaged)
    return caught.value.reason


def test_every_single_bit_flip_is_found(codec, blob):
    damaged = bytearray(blob)
    for bit in range(8 * len(blob)):
        damaged[bit // 8] ^= 1 << bit % 8
        reason = refused(codec, damaged)
        assert reason in {"magic", "version", "checksum"}
        damaged[bit // 8] ^= 1 << bit % 8
    assert bytes(damaged) == blob


def test_every_truncation_is_found(codec, blob):
    for length in range(len(blob)):
        expected = "truncated" if length < HEADER_BYTES + CHECKSUM_BYTES else "checksum"
        assert refused(codec, blob[:length]) == expected


def test_every_extension_is_found(codec, blob):
    for extra in (b"\0", b"\0" * 16, blob):
        assert refused(codec, blob + extra) == "checksum"


@pytest.mark.parametrize("size", [64, 512])
def test_every_zeroed_or_swapped_piece_is_found(codec, blob, size):
    starts = range(0, len(blob) - size + 1, size)
    for start in starts:
        zeroed = blob[:start] + bytes(size) + blob[start + size :]
        if zeroed != blob:
            refused(codec, zeroed)
    for first, second in pairwise(starts):
        swapped = bytearray(blob)
        swapped[first : first + size] = blob[second : second + size]
        swapped[second : second + size] = blob[first : first + size]
        if swapped != blob:
            refused(codec, swapped)


def mutate(blob: bytes, chance: random.Random) -> bytearray:
    """One to four random edits: bits, bytes, interesting integers, cuts, repeats."""
    damaged = bytearray(blob)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(damaged))
        match chance.randrange(6):
            case 0:
                damaged[at] ^= 1 << chance.randrange(8)
            case 1:
                damaged[at] = chance.randrange(256)
            case 2:
                value = chance.choice([0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x10000, 0xFFFFFFFF])
                struct.pack_into("<I", damaged, min(at, len(damaged) - 4), value)
            case 3:
                del damaged[at : at + chance.randint(1, 16)]
            case 4:
                damaged[at:at] = damaged[at : at + chance.randint(1, 16)]
            case 5:
                end = min(at + chance.randint(1, 64), len(damaged))
                damaged[at:end] = chance.randbytes(end - at)
        if len(damaged) < 8:
            break
    return damaged


def outcome(codec: ChunkCodec, damaged: bytes | bytearray) -> str:
    """The reason of the refusal, or "decoded"; anything else that is raised is a failure."""
    try:
        codec.decode(damaged)
    except ContainerError as error:
        return error.reason
    return "decoded"


@pytest.mark.fuzz
def test_random_damage_is_always_found(codec, blob):
    chance = random.Random(1)
    for _ in range(MUTATIONS):
        damaged = mutate(blob, chance)
        assert damaged == blob or outcome(codec, damaged) != "decoded"


@pytest.mark.fuzz
def test_resealed_damage_is_refused_or_decodes(codec, blob):
    """Most edits go to the header and the tables, where the lengths are."""
    chance = random.Random(2)
    tables = HEADER_BYTES + 120
    outcomes = set()
    for i in range(MUTATIONS):
        content = blob[:-CHECKSUM_BYTES]
        if i % 4:
            content = bytes(mutate(content[:tables], chance)) + content[tables:]
        else:
            content = bytes(mutate(content, chance))
        outcomes.add(outcome(codec, content + checksum(content)))
    expected = {"version", "bounds", "geometry", "fingerprint", "decoded"}
    assert outcomes >= (expected if codec.name == "raw" else expected | {"entropy"})


def allocation_peak(codec: ChunkCodec, damaged: bytes) -> int:
    """Python-side peak: blob copies, payload and unit buffers (not torch's outputs)."""
    tracemalloc.start()
    try:
        outcome(codec, damaged)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("units", "reason"), [(4_000_000, "bounds"), (-1, "entropy")])
def test_a_table_of_bogus_units_makes_no_memory_appear(units, reason):
    """-1: as many as the section has bytes, the most that the container lets through."""
    model = SyntheticModel(
        num_layers=4, num_kv_heads=2, head_size=64, layer_groups=((0, 4),), max_positions=512
    )
    codec = KvtcCodec(model.artifact((2.0,)), 2.0, torch.bfloat16)
    blob = codec.encode(*model.chunk(256), 0)
    info = container.parse(blob)
    sections = []
    for number, section in enumerate(info.sections):
        body = blob[section.offset : section.offset + section.stored_length]
        encoded = EncodedSection(section.units, body)
        if number == 1:
            count = units if units > 0 else section.raw_length
            encoded = EncodedSection(UnitList(bytes(UNIT_BYTES * count)), bytes(4 * count - 4))
        kind = container.SectionKind(section.kind)
        sections.append(
            container.NewSection(kind, section.coder_id, section.group, section.raw_length, encoded)
        )
    raw = sum(section.raw_length for section in info.sections)
    hostile = container.build(info.header, sections)
    assert refused(codec, hostile) == reason
    assert allocation_peak(codec, hostile) < raw + (1 << 20)


# (offset in the header or first section entry, struct format) of every count and length.
COUNTS = {
    "layers": (12, "H"),
    "kv heads": (14, "H"),
    "head size": (16, "H"),
    "layer groups": (20, "H"),
    "sections": (22, "H"),
    "tokens": (24, "I"),
    "start": (28, "Q"),
    "units": (HEADER_BYTES + 4, "I"),
    "raw length": (HEADER_BYTES + 8, "I"),
    "stored length": (HEADER_BYTES + 12, "I"),
}


@pytest.mark.parametrize("field", COUNTS)
def test_no_count_makes_memory_appear(codec, blob, field):
    offset, fmt = COUNTS[field]
    largest = 2 ** (8 * struct.calcsize(fmt)) - 1
    for value in (largest, largest // 2 + 1, 65536, 65535):
        if value > largest:
            continue
        content = bytearray(blob[:-CHECKSUM_BYTES])
        struct.pack_into("<" + fmt, content, offset, value)
        resealed = bytes(content) + checksum(bytes(content))
        # Any position below 2^63 is as good as another to the raw codec.
        if field != "start" or codec.name != "raw" or value > 2**62:
            assert outcome(codec, resealed) in {"bounds", "geometry"}
        assert allocation_peak(codec, resealed) < 1 << 20
