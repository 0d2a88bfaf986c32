"""The nvCOMP coder: its fallback on host threads here, cross-decoding with isal on a GPU."""

from __future__ import annotations

import logging
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtc_vllm.codec.container import (
    ContainerInfo,
    Header,
    NewSection,
    SectionKind,
    build,
    parse,
)
from kvtc_vllm.codec.entropy import (
    BY_CODER_ID,
    DEFLATE,
    MAX_UNIT_BYTES,
    Unit,
)
from kvtc_vllm.codec.entropy.unit_table import SectionBody, checked_table, unit_table
from kvtc_vllm.codec.errors import ContainerError
from kvtc_vllm.codec.kernels import deflate_nvcomp
from kvtc_vllm.codec.kernels.deflate_nvcomp import NVCOMP, NvcompCoder
from kvtc_vllm.codec.streams import SideStream


def streams(seed: int, sizes: tuple[int, ...]) -> list[bytes]:
    """Skewed bytes that shrink, except every third stream, which is noise."""
    drawn = random.Random(seed)
    return [
        drawn.randbytes(size)
        if index % 3 == 2
        else bytes(min(int(drawn.expovariate(0.2)), 255) for _ in range(size))
        for index, size in enumerate(sizes)
    ]


SIZES = (1, 3, 300, 0, 65536, 65537, 4000)


def test_the_registry_reads_deflate_with_isal():
    assert BY_CODER_ID[1] is DEFLATE
    assert NVCOMP.coder_id == DEFLATE.coder_id


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_is_isal_and_says_so_once(caplog):
    deflate_nvcomp.nvcomp_or_none.cache_clear()
    data = streams(1, SIZES)
    with caplog.at_level(logging.WARNING):
        sections = [NvcompCoder().encode(data) for _ in range(3)]
    raw = b"".join(data)
    for section in sections:
        body = memoryview(section.body)
        assert NvcompCoder().decode(section.units, body, len(raw)) == raw
        assert DEFLATE.decode(section.units, body, len(raw)) == raw
    said = [record.getMessage() for record in caplog.records]
    assert said == ["DEFLATE runs on host threads (isal): there is no CUDA device"]


@given(sizes=st.lists(st.integers(0, 200_000), max_size=4), seed=st.integers(0, 9))
@settings(max_examples=10)
def test_threads_give_what_one_thread_gives(sizes, seed):
    data = [random.Random(seed).randbytes(1 + size // 9) * 9 for size in sizes]
    section, alone = deflate_nvcomp.encode_on_threads(data), DEFLATE.encode(data)
    # isal's output may differ by a byte from call to call: its tables start with what was there.
    lengths = [unit.raw_length for unit in section.units]
    assert lengths == [unit.raw_length for unit in alone.units]
    assert len(section.body) == pytest.approx(len(alone.body), rel=0.02, abs=16)
    raw = b"".join(data)
    for body, units in ((section.body, section.units), (alone.body, alone.units)):
        assert deflate_nvcomp.decode_on_threads(units, memoryview(body), len(raw)) == raw


@pytest.mark.parametrize(
    ("units", "body", "raw_length"),
    [
        ([Unit(8, 8)], bytes(8), 9),
        ([Unit(8, 8)], bytes(12), 8),
        ([Unit(8, 5)], bytes(5) + b"\0\1\0", 8),
        ([Unit(8, 9)], bytes(12), 8),
        ([Unit(8, 6), Unit(4, 4)], bytes(6) + b"\1\0" + bytes(4), 12),
    ],
)
def test_units_are_checked_before_anything_is_decoded(units, body, raw_length):
    with pytest.raises(ContainerError, match="entropy"):
        checked_table(units, memoryview(body), raw_length)


def test_sections_are_checked_apart_in_one_table():
    good = DEFLATE.encode(streams(8, (300, 0, 70000)))
    bad = [Unit(8, 8)]
    data = np.frombuffer(bytes(4) + good.body + bytes(12) + good.body, np.uint8)
    second = 4 + len(good.body)
    sections = [
        SectionBody(good.units, 4, len(good.body), 70300),
        SectionBody(bad, second, 12, 8, 70300),
        SectionBody((), second, 0, 0, 70308),
        SectionBody(good.units, second + 12, len(good.body), 70300, 70320),
    ]
    table, unsound = unit_table(sections, data)
    assert unsound == [1]
    alone = checked_table(good.units, memoryview(good.body), 70300)
    both = np.concatenate((alone.offsets + 4, alone.offsets + second + 12))
    assert table.offsets.tolist() == both.tolist()
    both = np.concatenate((alone.places, alone.places + 70320))
    assert table.places.tolist() == both.tolist()
    assert len(unit_table([], data)[0].raw) == 0


def test_damaged_units_are_refused_on_threads():
    section = DEFLATE.encode(streams(2, (5000, 5000)))
    body = bytearray(section.body)
    body[10] ^= 0xFF
    with pytest.raises(ContainerError, match="entropy"):
        deflate_nvcomp.decode_on_threads(section.units, memoryview(body), 10000)


def test_a_flipped_bit_never_gets_past_the_container():
    """The checksum stands before every decoder: no unit table comes out of a damaged blob."""
    data = streams(3, (70000, 300))
    encoded = DEFLATE.encode(data)
    header = Header(1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 8.0, bytes(16), bytes(16))
    raw_length = sum(map(len, data))
    blob = build(header, [NewSection(SectionKind.CODED_K, 1, 0, raw_length, encoded)])
    assert isinstance(parse(blob), ContainerInfo)
    for at in random.Random(4).sample(range(len(blob)), 50):
        damaged = bytearray(blob)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(ContainerError):
            parse(damaged)


@pytest.fixture
def device_coder():
    """nvCOMP itself: on a GPU machine its absence is a failure of the set-up, not a skip."""
    return deflate_nvcomp.NvcompDeflate()


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [SIZES, (1,), (2, 1, 7), (65536,) * 600, tuple(range(1, 400, 7))])
def test_nvcomp_and_isal_read_each_other(device_coder, sizes):
    data = streams(5, sizes)
    raw = b"".join(data)
    ours = NvcompCoder()
    theirs = DEFLATE.encode(data)
    assert ours.decode(theirs.units, memoryview(theirs.body), len(raw)) == raw
    section = ours.encode(data)
    assert DEFLATE.decode(section.units, memoryview(section.body), len(raw)) == raw
    assert ours.decode(section.units, memoryview(section.body), len(raw)) == raw
    assert [u.raw_length for u in section.units] == [u.raw_length for u in theirs.units]
    assert len(section.body) < 1.25 * len(theirs.body) + 64 * len(section.units)


@pytest.mark.gpu
def test_units_may_lie_anywhere_and_no_byte_outside_is_written(device_coder):
    data = streams(6, (3000, 500, 700, 65536))
    section = DEFLATE.encode(data)
    tight = memoryview(section.body)
    table = checked_table(section.units, tight, sum(map(len, data)))
    body, offsets = bytearray(), []
    for offset, size in zip(table.offsets, table.stored, strict=True):
        offsets.append(len(body))
        body += tight[offset : offset + -(-size // 4) * 4].tobytes() + bytes(64)
    places, total = [], 5
    for unit in section.units:
        places.append(total)
        total += unit.raw_length + 3
    out = torch.full((total,), 0xEE, dtype=torch.uint8, device="cuda")
    stored = torch.frombuffer(body, dtype=torch.uint8).cuda()
    table = replace(table, offsets=np.array(offsets), places=np.array(places))
    torch.cuda.synchronize()
    with SideStream(torch.device("cuda")).to_end():
        found = device_coder.decompress(stored, table, out)
    assert not found.bad.any()
    expected = bytearray(b"\xee" * total)
    read = 0
    raw = b"".join(data)
    for place, unit in zip(places, section.units, strict=True):
        expected[place : place + unit.raw_length] = raw[read : read + unit.raw_length]
        read += unit.raw_length
    assert out.cpu().numpy().tobytes() == bytes(expected)


@pytest.mark.gpu
def test_it_works_on_a_side_stream_and_does_not_wait(device_coder):
    data = streams(7, (MAX_UNIT_BYTES,) * 8)
    section = DEFLATE.encode(data)
    size = sum(map(len, data))
    table = checked_table(section.units, memoryview(section.body), size)
    stored = torch.frombuffer(bytearray(section.body), dtype=torch.uint8).cuda()
    out = torch.empty(sum(map(len, data)), dtype=torch.uint8, device="cuda")
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        kept = [device_coder.decompress(stored, table, out)]
        side.synchronize()
        torch.cuda._sleep(500_000_000)
        out.zero_()
        kept.append(device_coder.decompress(stored, table, out))
        assert not side.query(), "decompress waited for the stream"
    side.synchronize()
    assert out.cpu().numpy().tobytes() == b"".join(data)
